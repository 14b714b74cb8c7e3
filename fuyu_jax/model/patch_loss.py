"""An auxiliary loss on patches: say from the hidden state which edges the patch holds.

The answers' cross-entropy reaches the patches only through attention that has first to find them.
This loss is there at every patch from the first step on. Its target is a histogram of oriented
gradients (Dalal & Triggs 2005), which Wei et al. 2021 ("Masked Feature Prediction") found a good
target for vision transformers; here nothing is masked, since the aim is that the first layers keep
what a linear projection of pixels cannot tell: where in a patch which edges run.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, UInt8

ORIENTATIONS = 8  # of edges, over half a turn
CELLS = 2  # a side
SIZE = CELLS * CELLS * ORIENTATIONS
_NOISE = 0.02  # gradients (of 0..1 pixels) much smaller than this count little


def edge_histograms(patches: UInt8[Array, "B P C"], patch_size: int) -> Float32[Array, "B P edges"]:
    """Share of edge strength by cell of the patch and orientation; all 0 on a blank patch.

    Args:
      patches: raw pixels, row, column, channel.
      patch_size: p, with C = 3 p².

    Of the three channels' gradients the strongest counts at a pixel; the outermost pixels have
    none.
    """
    b, n, _ = patches.shape
    p = patch_size
    x = patches.reshape(b, n, p, p, 3).astype(jnp.float32) / 255
    dy = (x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]) / 2
    dx = (x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]) / 2
    best = jnp.argmax(dx * dx + dy * dy, axis=-1)[..., None]
    dy = jnp.take_along_axis(dy, best, axis=-1)[..., 0]
    dx = jnp.take_along_axis(dx, best, axis=-1)[..., 0]
    angle = jnp.arctan2(dy, dx) * (ORIENTATIONS / jnp.pi)  # half a turn is ORIENTATIONS
    distance = jnp.abs(angle[..., None] - jnp.arange(ORIENTATIONS))
    distance = jnp.minimum(distance % ORIENTATIONS, -distance % ORIENTATIONS)
    share = jnp.maximum(1 - distance, 0) * jnp.sqrt(dx * dx + dy * dy)[..., None]
    cell = jnp.arange(1, p - 1) * CELLS // p
    member = (cell == jnp.arange(CELLS)[:, None]).astype(jnp.float32)
    sums = jnp.einsum("bnyxo,cy,dx->bncdo", share, member, member).reshape(b, n, SIZE)
    norm = jnp.sqrt(jnp.sum(sums * sums, axis=-1, keepdims=True))
    return sums / (norm + _NOISE * p)


def edge_loss(
    predicted: Float[Array, "B P edges"],
    patches: UInt8[Array, "B P C"],
    real: Bool[Array, "B P"],
    patch_size: int,
) -> Float32[Array, ""]:
    """Σ over real patches of the squared distance to their histograms."""
    target = edge_histograms(patches, patch_size)
    error = jnp.square(predicted.astype(jnp.float32) - target).sum(axis=-1)
    return jnp.sum(jnp.where(real, error, 0))
