"""Splash attention, JAX's Pallas kernel for TPU, on packed rows.

It skips blocks by the static mask (causal, window) and hides other segments inside the blocks that
it visits, so a row costs what one causal segment of its length costs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int32

from fuyu_jax.model.blockwise import SAVED
from fuyu_jax.parallel.shards import map_shards

LANES = 128
BLOCK = 512


def _kernel(heads: int, size: int, window: int, interpret: bool):
    block = next(b for b in (BLOCK, 256, LANES) if size % b == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    shape = (size, size)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def splash_attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segment_ids: Int32[Array, "B S"],
    scale: float,
    window: int = 0,
    interpret: bool = False,
) -> Float[Array, "B S H E"]:
    """Causal attention inside segments; any S (padded to 128), outputs of padding are 0.

    Args:
      q, k, v: heads; H is a multiple of K.
      segment_ids: 0 = padding.
      scale: of the scores.
      window: positions back that a token sees; 0 for its whole segment.
      interpret: run the kernel's operations one by one, on any machine (for tests).
    """
    size = q.shape[1]
    more = -size % LANES
    room = ((0, 0), (0, more), (0, 0), (0, 0))
    heads_first = [jnp.pad(x, room).transpose(0, 2, 1, 3) for x in (q * scale, k, v)]
    ids = jnp.pad(segment_ids, ((0, 0), (0, more)))

    def rows(q, k, v, ids):
        kernel = _kernel(q.shape[1], q.shape[2], window, interpret)
        return jax.vmap(functools.partial(_row, kernel))(q, k, v, ids)

    out = map_shards(rows, *heads_first, ids).transpose(0, 2, 1, 3)[:, :size]
    return jnp.where(segment_ids[..., None, None] > 0, out, 0).astype(q.dtype)


def _row(kernel, q, k, v, ids):
    return kernel(q, k, v, segment_ids=splash.SegmentIds(q=ids, kv=ids))
