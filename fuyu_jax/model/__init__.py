"""The encoder-free decoder: embedding of patches and text, packed attention, loss.

One parameterised block serves Fuyu and its relatives; `Decoder` stacks and scans it. Attention has
one entry, one dense reference and backends that must agree with it.
"""

from fuyu_jax.model.decoder import Decoder, count_parameters, make_decoder
from fuyu_jax.model.loss import loss_sums

__all__ = ["Decoder", "count_parameters", "loss_sums", "make_decoder"]
