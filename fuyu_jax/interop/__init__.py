"""To and from transformers: weights, configs and folders, tensor by tensor.

`read_params` fills a sharded model from a Hugging Face folder; `python -m
fuyu_jax.interop.convert` turns a folder into a work folder and back.
"""

from fuyu_jax.interop.fuyu import Described, describe
from fuyu_jax.interop.weights import ReadReport, Weights, read_params

__all__ = ["Described", "ReadReport", "Weights", "describe", "read_params"]
