"""fuyu_jax: encoder-free vision-language models in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # JAX is imported only where a model is opened.
    if name == "load":
        from fuyu_jax.generate.opening import load

        return load
    raise AttributeError(f"module 'fuyu_jax' has no attribute {name!r}")
