"""Sources of examples: one file for each form that data comes in. Every source gives `Example`s by
index, and nothing after it knows where they came from."""

from fuyu_jax.data.sources.base import Source
from fuyu_jax.data.sources.demo import DemoSource
from fuyu_jax.data.sources.llava import LlavaSource

__all__ = ["DemoSource", "LlavaSource", "Source"]
