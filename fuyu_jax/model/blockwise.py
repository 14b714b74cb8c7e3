"""Attention in blocks, in pure JAX, with its own gradient (FlashAttention-2's recurrences,
arXiv:2307.08691), which visits only the key blocks that a query block's ranges reach.

The range of a loop is known only at run time, so the loops are `while` loops, and reverse-mode
differentiation needs the hand-written backward pass below.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from fuyu_jax.parallel.shards import map_shards

# 64 × 64 was the fastest or near it for head sizes 32 and 64 on CPU (docs/performance.md).
BLOCK = 64
_MASKED = -1e30
SAVED = "attention"  # name, for remat policies, of what the backward pass wants of the forward one


def _block_bounds(start: jax.Array, stop: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Key blocks [low, high) that hold every key some query of this block sees."""
    sees = stop > start
    low = jnp.min(jnp.where(sees, start, jnp.iinfo(jnp.int32).max)) // block
    high = -(-jnp.max(stop) // block)
    return low, high


def _slice(x: jax.Array, axis: int, at: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, at, size, axis)


def _masked_scores(q, k, start, stop, at, scale):
    """Scores [K,G,bq,bk] in float32 and where they count; q [K,G,bq,E], k [K,bk,E]."""
    scores = jnp.einsum("kgqe,kte->kgqt", q, k, preferred_element_type=jnp.float32) * scale
    t = at + jnp.arange(k.shape[1])
    seen = (t >= start[:, None]) & (t < stop[:, None])
    return jnp.where(seen, scores, _MASKED), seen


def _forward_row(q, k, v, start, stop, scale, block):
    """One row: q [K,G,S,E], k and v [K,S,E], start and stop [S] → out [K,G,S,E], lse [K,G,S]."""
    heads, groups, size, width = q.shape

    def query_block(i):
        qi = _slice(q, 2, i * block, block)
        starts, stops = _slice(start, 0, i * block, block), _slice(stop, 0, i * block, block)
        low, high = _block_bounds(starts, stops, block)

        def body(carry):
            j, peak, total, out = carry
            at = j * block
            s, seen = _masked_scores(qi, _slice(k, 1, at, block), starts, stops, at, scale)
            new_peak = jnp.maximum(peak, s.max(-1))
            p = jnp.where(seen, jnp.exp(s - new_peak[..., None]), 0)
            shrink = jnp.exp(peak - new_peak)
            add = jnp.einsum(
                "kgqt,kte->kgqe",
                p.astype(v.dtype),
                _slice(v, 1, at, block),
                preferred_element_type=jnp.float32,
            )
            return j + 1, new_peak, total * shrink + p.sum(-1), out * shrink[..., None] + add

        zero = jnp.zeros((heads, groups, block), jnp.float32)
        init = (low, zero + _MASKED, zero, jnp.zeros((heads, groups, block, width), jnp.float32))
        _, peak, total, out = jax.lax.while_loop(lambda c: c[0] < high, body, init)
        # A query that sees nothing: output 0, and a log-sum-exp under which exp() gives 0 below.
        empty = total == 0
        out = out / jnp.where(empty, 1, total)[..., None]
        lse = jnp.where(empty, -_MASKED, peak + jnp.log(jnp.where(empty, 1, total)))
        return out.astype(q.dtype), lse

    out, lse = jax.lax.map(query_block, jnp.arange(size // block))
    out = jnp.moveaxis(out, 0, 2).reshape(heads, groups, size, width)
    return out, jnp.moveaxis(lse, 0, 2).reshape(heads, groups, size)


def _backward_row(q, k, v, start, stop, out, lse, d_out, scale, block):
    """Gradients of one row; the same walk over blocks as forward, scores computed again."""
    size = q.shape[2]
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def query_block(i, carry):
        dq, dk, dv = carry
        here = i * block
        qi, doi = _slice(q, 2, here, block), _slice(d_out, 2, here, block)
        lsei, deltai = _slice(lse, 2, here, block), _slice(delta, 2, here, block)
        starts, stops = _slice(start, 0, here, block), _slice(stop, 0, here, block)
        low, high = _block_bounds(starts, stops, block)

        def body(inner):
            j, dqi, dk, dv = inner
            at = j * block
            kj, vj = _slice(k, 1, at, block), _slice(v, 1, at, block)
            s, seen = _masked_scores(qi, kj, starts, stops, at, scale)
            p = jnp.where(seen, jnp.exp(s - lsei[..., None]), 0)
            f32 = {"preferred_element_type": jnp.float32}
            dvj = jnp.einsum("kgqt,kgqe->kte", p.astype(doi.dtype), doi, **f32)
            dp = jnp.einsum("kgqe,kte->kgqt", doi, vj, **f32)
            ds = (p * (dp - deltai[..., None]) * scale).astype(q.dtype)
            dqi = dqi + jnp.einsum("kgqt,kte->kgqe", ds, kj, **f32)
            dkj = jnp.einsum("kgqt,kgqe->kte", ds, qi, **f32)
            dk = jax.lax.dynamic_update_slice_in_dim(dk, _slice(dk, 1, at, block) + dkj, at, 1)
            dv = jax.lax.dynamic_update_slice_in_dim(dv, _slice(dv, 1, at, block) + dvj, at, 1)
            return j + 1, dqi, dk, dv

        init = (low, jnp.zeros(qi.shape, jnp.float32), dk, dv)
        _, dqi, dk, dv = jax.lax.while_loop(lambda c: c[0] < high, body, init)
        dq = jax.lax.dynamic_update_slice_in_dim(dq, dqi.astype(q.dtype), here, 2)
        return dq, dk, dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dq, dk, dv = jax.lax.fori_loop(0, size // block, query_block, (jnp.zeros_like(q), zeros, zeros))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(q, k, v, start, stop, scale, block):
    return _blockwise_forward(q, k, v, start, stop, scale, block)[0]


def _blockwise_forward(q, k, v, start, stop, scale, block):
    row = functools.partial(_forward_row, scale=scale, block=block)
    out, lse = map_shards(
        lambda *rows: jax.lax.map(lambda args: row(*args), rows), q, k, v, start, stop
    )
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, start, stop, out, lse)


def _blockwise_backward(scale, block, saved, d_out):
    row = functools.partial(_backward_row, scale=scale, block=block)
    dq, dk, dv = map_shards(lambda *rows: jax.lax.map(lambda args: row(*args), rows), *saved, d_out)
    return dq, dk, dv, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _by_heads(q, k, v, start, stop, block):
    """q [B,K,G,S,E], k and v [B,K,S,E], of whole blocks, and their size."""
    b, s, h, e = q.shape
    kv = k.shape[2]
    block = min(block, -(-s // 8) * 8)
    more = -s % block
    if more:
        q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
        start, stop = (jnp.pad(x, ((0, 0), (0, more))) for x in (start, stop))
    grouped = q.reshape(b, s + more, kv, h // kv, e).transpose(0, 2, 3, 1, 4)
    return (grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), start, stop), block


def _by_tokens(x, shape):
    """[B,K,G,S,...] as [B,S,H,...], of so many tokens."""
    b, s, h, _ = shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, x.shape[3], h, x.shape[4])[:, :s]


def blockwise_attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    start: Int32[Array, "B S"],
    stop: Int32[Array, "B S"],
    scale: float,
    block: int = BLOCK,
) -> Float[Array, "B S H E"]:
    """Attention of each query over keys `start <= t < stop`, without a mask of S×S.

    Any S is taken: what is short of a whole block is padded with queries that see nothing.
    """
    args, block = _by_heads(q, k, v, start, stop, block)
    out = _blockwise(*args, scale, block)
    return _by_tokens(out, q.shape)


def blockwise_with_lse(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    start: Int32[Array, "B S"],
    stop: Int32[Array, "B S"],
    scale: float,
    block: int = BLOCK,
) -> tuple[Float[Array, "B S H E"], Float[Array, "B S H"]]:
    """`blockwise_attention` and the log-sum-exp of its scores, without a gradient.

    A query that sees nothing has output 0, and a log-sum-exp so large that its share is all.
    """
    args, block = _by_heads(q, k, v, start, stop, block)
    out, saved = _blockwise_forward(*args, scale, block)
    return _by_tokens(out, q.shape), _by_tokens(saved[-1][..., None], q.shape)[..., 0]
