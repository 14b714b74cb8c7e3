"""Data into shards ahead of training: `python -m fuyu_jax.data.prepare SOURCE OUT`."""

from fuyu_jax.data.prepare.run import prepare

__all__ = ["prepare"]
