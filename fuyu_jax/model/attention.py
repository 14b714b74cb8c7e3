"""Packed attention: one entry, one dense reference, and the backends that must agree with it.

What a query may see is a contiguous run of keys, because segments are contiguous: its segment
from the start (or from the window's edge) to itself, or, for a token of an image under
bidirectional image attention, to the end of that image. Two integers a query (`KeyRange`) say
all of it; no mask of S×S is made outside the reference.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from fuyu_jax.errors import UserError, nearest
from fuyu_jax.model.blockwise import blockwise_attention
from fuyu_jax.model.pallas_gpu import pallas_attention
from fuyu_jax.model.splash import splash_attention

Backend = Literal["auto", "splash", "pallas", "blockwise", "reference"]
BACKENDS: tuple[str, ...] = ("splash", "pallas", "blockwise", "reference")
# Kernels for one kind of machine.
_RUNS_ON = {"splash": ("tpu", "TPU"), "pallas": ("gpu", "GPU")}


class KeyRange(NamedTuple):
    """Keys `start <= k < stop` that each query sees; padding sees none (start = stop = 0).

    segment_ids (with the window) say the same where attention is causal; None where images are seen
    from both sides.
    """

    start: Int32[Array, "B S"]
    stop: Int32[Array, "B S"]
    segment_ids: Int32[Array, "B S"] | None = None


def _run_bounds(ids: Int32[Array, "B S"]) -> tuple[Int32[Array, "B S"], Int32[Array, "B S"]]:
    """First index and one past the last index of the run of equal ids that each place lies in."""
    size = ids.shape[1]
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), ids.shape)
    changes = ids[:, 1:] != ids[:, :-1]
    edge = jnp.ones((ids.shape[0], 1), bool)
    first = jnp.concatenate([edge, changes], axis=1)
    last = jnp.concatenate([changes, edge], axis=1)
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    stop = jax.lax.cummin(jnp.where(last, index + 1, size), axis=1, reverse=True)
    return start, stop


def key_range(
    segment_ids: Int32[Array, "B S"],
    image_ids: Int32[Array, "B S"] | None = None,
    window: int = 0,
) -> KeyRange:
    """The keys that each query sees.

    Args:
      segment_ids: 0 = padding; a segment's tokens are contiguous.
      image_ids: if given, tokens of one image (equal non-zero ids, contiguous) see all of it.
      window: at most this many positions back, itself counted in; 0 for no limit.
    """
    start, _ = _run_bounds(segment_ids)
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    stop = jnp.broadcast_to(index + 1, segment_ids.shape)
    if window:
        start = jnp.maximum(start, index + 1 - window)
    if image_ids is not None:
        image_start, image_stop = _run_bounds(image_ids * jnp.int32(2**16) + segment_ids)
        inside = image_ids > 0
        stop = jnp.where(inside, image_stop, stop)
        start = jnp.where(inside, jnp.minimum(start, image_start), start)
    real = segment_ids > 0
    causal = segment_ids if image_ids is None else None
    return KeyRange(jnp.where(real, start, 0), jnp.where(real, stop, 0), causal)


def dense_mask(keys: KeyRange, size: int) -> jax.Array:
    """bool [B,S,T]: what `KeyRange` says, written out (for the reference, tests and pictures)."""
    t = jnp.arange(size)
    return (t >= keys.start[..., None]) & (t < keys.stop[..., None])


def reference_probabilities(
    q: Float[Array, "B S H E"], k: Float[Array, "B T K E"], keys: KeyRange, scale: float
) -> Float32[Array, "B H S T"]:
    """Dense softmax(q·k·scale) in float32; all zeros for queries that see nothing."""
    b, s, h, e = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, s, kv, h // kv, e)
    scores = jnp.einsum("bskge,btke->bkgst", grouped, k, preferred_element_type=jnp.float32)
    mask = dense_mask(keys, k.shape[1])[:, None, None]
    scores = jnp.where(mask, scores * scale, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return (weights / jnp.where(total == 0, 1, total)).reshape(b, h, s, k.shape[1])


def reference_attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    keys: KeyRange,
    scale: float,
) -> Float[Array, "B S H E"]:
    """The dense form; O(S·T) memory."""
    b, s, h, e = q.shape
    kv = k.shape[2]
    weights = reference_probabilities(q, k, keys, scale).reshape(b, kv, h // kv, s, k.shape[1])
    out = jnp.einsum(
        "bkgst,btke->bskge", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out.reshape(b, s, h, e).astype(q.dtype)


def choose_backend(
    name: str, *, platform: str | None = None, image_attention: str = "causal"
) -> str:
    """The backend that `name` stands for: "auto" is splash on TPU where it can say the mask,
    pallas on GPU, and blockwise everywhere else.

    Args:
      name: "auto" or a backend.
      platform: "cpu", "gpu" or "tpu"; None for JAX's own.
      image_attention: the model's; splash knows causal attention alone.

    Raises:
      UserError: a name that is not a backend, or a backend that cannot do this here.
    """
    platform = platform or jax.default_backend()
    causal = image_attention == "causal"
    if name == "auto":
        if platform == "gpu":
            return "pallas"
        return "splash" if platform == "tpu" and causal else "blockwise"
    if name not in BACKENDS:
        raise UserError(
            f'attention backend "{name}" is unknown{nearest(name, ("auto", *BACKENDS))}'
        )
    if name in _RUNS_ON and platform != _RUNS_ON[name][0]:
        raise UserError(
            f'attention backend "{name}" runs on {_RUNS_ON[name][1]} and this is {platform}; '
            '"blockwise" runs everywhere'
        )
    if name == "splash" and not causal:
        raise UserError(
            f'attention backend "splash" is causal and model.image_attention is {image_attention}; '
            '"blockwise" does both'
        )
    return name


def attend(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    keys: KeyRange,
    *,
    window: int = 0,
    backend: str = "auto",
    scale: float | None = None,
) -> Float[Array, "B S H E"]:
    """`attention` for callers that have made their `KeyRange` once for all layers.

    `window` is the one that `keys` were made with. A backend that is named is run, whatever the
    platform, since one may compile for another machine; `choose_backend` has checked it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend not in BACKENDS:
        kind = "causal" if keys.segment_ids is not None else "bidirectional"
        backend = choose_backend(backend, image_attention=kind)
    if backend == "reference":
        return reference_attention(q, k, v, keys, scale)
    if backend == "splash":
        if keys.segment_ids is None:
            raise UserError('attention backend "splash" is causal; "blockwise" does image_ids too')
        return splash_attention(q, k, v, keys.segment_ids, scale, window)
    if backend == "pallas":
        return pallas_attention(q, k, v, keys.start, keys.stop, scale)
    return blockwise_attention(q, k, v, keys.start, keys.stop, scale)


def attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segment_ids: Int32[Array, "B S"],
    *,
    image_ids: Int32[Array, "B S"] | None = None,
    window: int = 0,
    backend: str = "auto",
    scale: float | None = None,
) -> Float[Array, "B S H E"]:
    """Causal attention inside segments.

    Args:
      q, k, v: heads; H is a multiple of K (grouped queries).
      segment_ids: 0 = padding, whose outputs are 0.
      image_ids: tokens of one image see all of it.
      window: positions back that a token sees; 0 for its whole segment.
      backend: "splash" (TPU; causal alone), "pallas" (GPU), "blockwise" (pure JAX, visits only the
        key blocks that segments reach), "reference" (dense) or "auto".
      scale: of the scores; E^-0.5 if not given.
    """
    keys = key_range(segment_ids, image_ids, window)
    return attend(q, k, v, keys, window=window, backend=backend, scale=scale)
