"""Rotary positions (RoFormer, arXiv:2104.09864), on the first part of each head, halves rotated
as in GPT-NeoX; angles in float32."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from fuyu_jax.config import ModelConfig


class RotaryScaling(NamedTuple):
    """How frequencies are stretched to longer texts than a model was first trained on.

    kind: "linear" divides all by `factor`. "llama3" (Llama 3.1) divides those whose wavelength is
    above `original_length / low_freq`, leaves those below `original_length / high_freq`, and goes
    over smoothly between. "none": neither.
    """

    kind: str
    factor: float
    low_freq: float
    high_freq: float
    original_length: int

    @classmethod
    def of(cls, config: ModelConfig) -> "RotaryScaling":
        c = config
        return cls(
            c.rotary_scaling,
            c.rotary_factor,
            c.rotary_low_freq,
            c.rotary_high_freq,
            c.rotary_original_length,
        )

    def __call__(self, frequencies: Float32[Array, "R"]) -> Float32[Array, "R"]:
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            turns = self.original_length * frequencies / (2 * jnp.pi)
            smooth = (turns - self.low_freq) / (self.high_freq - self.low_freq)
            smooth = jnp.clip(smooth, 0, 1)
            return (1 - smooth) * frequencies / self.factor + smooth * frequencies
        return frequencies


def rotary_tables(
    positions: Int32[Array, "B S"],
    head_dim: int,
    fraction: float,
    base: float,
    scaling: RotaryScaling | None = None,
) -> tuple[Float32[Array, "B S R"], Float32[Array, "B S R"]]:
    """cos and sin of position · base^(-2i/r), r = the rotated dimensions, R = r/2."""
    rotated = int(head_dim * fraction) // 2 * 2
    inverse = base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / max(rotated, 1))
    if scaling is not None:
        inverse = scaling(inverse)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B S N E"], cos: Float32[Array, "B S R"], sin: Float32[Array, "B S R"]
) -> Float[Array, "B S N E"]:
    """Rotates the first 2·R dimensions of every head; the rest passes unchanged."""
    half = cos.shape[-1]
    cos, sin = (t[:, :, None].astype(x.dtype) for t in (cos, sin))
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
