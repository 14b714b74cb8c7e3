"""Sources of examples: one file for each form that data comes in. Every source gives `Example`s by
index, and nothing after it knows where they came from.

`array_record` is imported by itself: it stands above `data/outline.py`, which needs `base`."""

from fuyu_jax.data.sources.base import Source
from fuyu_jax.data.sources.demo import DemoSource
from fuyu_jax.data.sources.interleaved import InterleavedSource
from fuyu_jax.data.sources.jsonl_text import JsonlTextSource
from fuyu_jax.data.sources.llava import LlavaSource
from fuyu_jax.data.sources.parquet import ParquetSource
from fuyu_jax.data.sources.tfds_source import TfdsAdapter, TfdsSource
from fuyu_jax.data.sources.webdataset import WebDatasetSource

__all__ = [
    "DemoSource",
    "InterleavedSource",
    "JsonlTextSource",
    "LlavaSource",
    "ParquetSource",
    "Source",
    "TfdsAdapter",
    "TfdsSource",
    "WebDatasetSource",
]
