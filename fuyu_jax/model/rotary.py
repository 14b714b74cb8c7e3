"""Rotary positions (RoFormer, arXiv:2104.09864), on the first part of each head, halves rotated
as in GPT-NeoX; angles in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def rotary_tables(
    positions: Int32[Array, "B S"], head_dim: int, fraction: float, base: float
) -> tuple[Float32[Array, "B S R"], Float32[Array, "B S R"]]:
    """cos and sin of position · base^(-2i/r), r = the rotated dimensions, R = r/2."""
    rotated = int(head_dim * fraction) // 2 * 2
    inverse = base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / max(rotated, 1))
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
