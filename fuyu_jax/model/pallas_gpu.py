"""Attention for GPU: kernels in Pallas (compiled by Triton) over the same ranges of keys as
`model/blockwise.py`, by FlashAttention-2's recurrences (arXiv:2307.08691).

A program has one block of queries (or of keys, for their gradients) and walks over the blocks
that its ranges reach, so a row costs what its segments cost. Blocks that all its queries see
wholly need no mask. Grouped heads share their keys in place; nothing of S×S is made.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from fuyu_jax.model.blockwise import SAVED
from fuyu_jax.parallel.shards import map_shards

_MASKED = -1e30
_LOG2E = math.log2(math.e)  # the kernels' exponentials are powers of two


class Blocks(NamedTuple):
    """Sizes of blocks, powers of two from 16 on: queries and keys forward, both backward."""

    queries: int = 128
    keys: int = 64
    backward: int = 64


BLOCKS = Blocks()


def _bounds(start: jax.Array, stop: jax.Array, queries: int, keys: int) -> Int32[Array, "B N 4"]:
    """Of each block of queries the key blocks [low, high) that it reaches, and of those
    [low, inner) and [outer, high) that some query does not see wholly."""
    rows = start.shape[0]
    start, stop = start.reshape(rows, -1, queries), stop.reshape(rows, -1, queries)
    far = jnp.iinfo(jnp.int32).max
    low = jnp.min(jnp.where(stop > start, start, far), axis=-1) // keys
    high = -(-jnp.max(stop, axis=-1) // keys)
    low = jnp.minimum(low, high)
    inner = jnp.clip(-(-jnp.max(start, axis=-1) // keys), low, high)
    outer = jnp.clip(jnp.min(stop, axis=-1) // keys, inner, high)
    return jnp.stack([low, inner, outer, high], axis=-1).astype(jnp.int32)


def _reached_by(bounds: Int32[Array, "B N 4"], blocks: int) -> Int32[Array, "B M 2"]:
    """Of each block of keys the query blocks [first, end) between which all lie that reach it."""
    j = jnp.arange(blocks)
    reach = (bounds[:, :, :1] <= j) & (j < bounds[:, :, 3:])
    first = jnp.argmax(reach, axis=1)
    end = reach.shape[1] - jnp.argmax(reach[:, ::-1], axis=1)
    return jnp.stack([first, jnp.where(reach.any(axis=1), end, first)], axis=-1).astype(jnp.int32)


def _seen(start: jax.Array, stop: jax.Array, at: jax.Array, keys: int) -> jax.Array:
    t = at + jnp.arange(keys)
    return (t[None, :] >= start[:, None]) & (t[None, :] < stop[:, None])


def _walk(bounds_ref: Any, body: Any, carry: Any) -> Any:
    """`body(masked)(j, carry)` over a query block's key blocks: at its edges masked."""
    low, inner, outer, high = (bounds_ref[n] for n in range(4))
    carry = jax.lax.fori_loop(low, inner, body(True), carry)
    carry = jax.lax.fori_loop(inner, outer, body(False), carry)
    return jax.lax.fori_loop(outer, high, body(True), carry)


def _forward_kernel(q_ref, k_ref, v_ref, start_ref, stop_ref, bounds_ref, out_ref, lse_ref, *, of):
    scale, size = of
    q, start, stop = q_ref[...], start_ref[...], stop_ref[...]

    def body(masked: bool):
        def turn(j, carry):
            peak, total, out = carry
            here = pl.ds(j * size, size)
            s = plgpu.dot(q, k_ref[here, :].T) * (scale * _LOG2E)
            seen = _seen(start, stop, j * size, size)
            s = jnp.where(seen, s, _MASKED) if masked else s
            new_peak = jnp.maximum(peak, jnp.max(s, axis=1))
            p = jnp.exp2(s - new_peak[:, None])
            p = jnp.where(seen, p, 0.0) if masked else p
            shrink = jnp.exp2(peak - new_peak)
            v = v_ref[here, :]
            out = out * shrink[:, None] + plgpu.dot(p.astype(v.dtype), v)
            return new_peak, total * shrink + jnp.sum(p, axis=1), out

        return turn

    zero = jnp.zeros(q.shape[:1], jnp.float32)
    init = (zero + _MASKED, zero, jnp.zeros(q.shape, jnp.float32))
    peak, total, out = _walk(bounds_ref, body, init)
    # A query that sees nothing: output 0, and a log-sum-exp under which 2^x gives 0 backward.
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(empty, -_MASKED, peak + jnp.log2(total))


def _dq_kernel(
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    stop_ref,
    bounds_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    dq_ref,
    *,
    of,
):
    scale, size = of
    q, d_out = q_ref[...], d_out_ref[...]
    start, stop, lse, delta = start_ref[...], stop_ref[...], lse_ref[...], delta_ref[...]

    def body(masked: bool):
        def turn(j, dq):
            here = pl.ds(j * size, size)
            k = k_ref[here, :]
            p = jnp.exp2(plgpu.dot(q, k.T) * (scale * _LOG2E) - lse[:, None])
            p = jnp.where(_seen(start, stop, j * size, size), p, 0.0) if masked else p
            ds = p * (plgpu.dot(d_out, v_ref[here, :].T) - delta[:, None])
            return dq + plgpu.dot(ds.astype(k.dtype), k)

        return turn

    dq = _walk(bounds_ref, body, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref, k_ref, v_ref, start_ref, stop_ref, ends_ref, d_out_ref, lse_ref, delta_ref, *refs, of
):
    dk_ref, dv_ref = refs
    scale, size = of
    k, v = k_ref[...], v_ref[...]
    at = pl.program_id(0) * size
    zero = jnp.zeros(k.shape, jnp.float32)

    def head(g, carry):
        def turn(i, carry):
            dk, dv = carry
            here = pl.ds(i * size, size)
            q, d_out = q_ref[g, here, :], d_out_ref[g, here, :]
            p = jnp.exp2(plgpu.dot(q, k.T) * (scale * _LOG2E) - lse_ref[g, here][:, None])
            p = jnp.where(_seen(start_ref[here], stop_ref[here], at, size), p, 0.0)
            dv = dv + plgpu.dot(p.astype(d_out.dtype).T, d_out)
            ds = p * (plgpu.dot(d_out, v.T) - delta_ref[g, here][:, None])
            return dk + plgpu.dot(ds.astype(q.dtype).T, q), dv

        return jax.lax.fori_loop(ends_ref[0], ends_ref[1], turn, carry)

    dk, dv = jax.lax.fori_loop(0, q_ref.shape[0], head, (zero, zero))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _specs(groups: int, size: int, width: int, block: int):
    """How a program of (block, head, row) sees arrays: its block of queries, a row's whole keys,
    its block of [B,S], of [B,N,n], and of [B,H,S]."""
    own = pl.BlockSpec((None, None, block, width), lambda i, h, b: (b, h, i, 0))
    whole = pl.BlockSpec((None, None, size, width), lambda i, h, b: (b, h // groups, 0, 0))
    ends = pl.BlockSpec((None, block), lambda i, h, b: (b, i))
    bounds = pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0))
    sums = pl.BlockSpec((None, None, block), lambda i, h, b: (b, h, i))
    return own, whole, ends, bounds, sums


def _params(q: jax.Array, stages: int) -> plgpu.CompilerParams:
    # Blocks of float32 take twice the room: three stages of heads of 128 pass what a Hopper has.
    return plgpu.CompilerParams(
        num_warps=4 if q.shape[-1] <= 64 else 8, num_stages=stages if q.dtype.itemsize < 4 else 1
    )


def _forward(q, k, v, start, stop, scale, blocks, interpret):
    """q [B,H,S,E], k and v [B,K,S,E] → out [B,H,S,E], log2-sum-exp [B,H,S]."""
    rows, heads, size, width = q.shape
    own, whole, ends, bounds, sums = _specs(heads // k.shape[1], size, width, blocks.queries)
    return pl.pallas_call(
        functools.partial(_forward_kernel, of=(scale, blocks.keys)),
        grid=(size // blocks.queries, heads, rows),
        in_specs=[own, whole, whole, ends, ends, bounds],
        out_specs=[own, sums],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ],
        compiler_params=_params(q, 3),
        interpret=interpret,
        name="packed_attention_forward",
    )(q, k, v, start, stop, _bounds(start, stop, blocks.queries, blocks.keys))


def _backward(q, k, v, start, stop, out, lse, d_out, scale, blocks, interpret):
    rows, heads, size, width = q.shape
    kv, block = k.shape[1], blocks.backward
    groups = heads // kv
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    limits = _bounds(start, stop, block, block)
    own, whole, ends, bounds, sums = _specs(groups, size, width, block)
    common = {"compiler_params": _params(q, 2), "interpret": interpret}
    dq = pl.pallas_call(
        functools.partial(_dq_kernel, of=(scale, block)),
        grid=(size // block, heads, rows),
        in_specs=[own, whole, whole, ends, ends, bounds, own, sums, sums],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="packed_attention_dq",
        **common,
    )(q, k, v, start, stop, limits, d_out, lse, delta)
    # A program has a block of keys and all queries of its heads' group.
    group = pl.BlockSpec((None, groups, size, width), lambda j, h, b: (b, h, 0, 0))
    group_sums = pl.BlockSpec((None, groups, size), lambda j, h, b: (b, h, 0))
    row = pl.BlockSpec((None, size), lambda j, h, b: (b, 0))
    reached = pl.BlockSpec((None, None, 2), lambda j, h, b: (b, j, 0))
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, of=(scale, block)),
        grid=(size // block, kv, rows),
        in_specs=[group, own, own, row, row, reached, group, group_sums, group_sums],
        out_specs=[own, own],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="packed_attention_dkv",
        **common,
    )(q, k, v, start, stop, _reached_by(limits, size // block), d_out, lse, delta)
    return dq, dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, start, stop, scale, blocks, interpret):
    return _attention_forward(q, k, v, start, stop, scale, blocks, interpret)[0]


def _attention_forward(q, k, v, start, stop, scale, blocks, interpret):
    kernel = functools.partial(_forward, scale=scale, blocks=blocks, interpret=interpret)
    out, lse = map_shards(kernel, q, k, v, start, stop)
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, start, stop, out, lse)


def _attention_backward(scale, blocks, interpret, saved, d_out):
    kernel = functools.partial(_backward, scale=scale, blocks=blocks, interpret=interpret)
    dq, dk, dv = map_shards(kernel, *saved, d_out)
    return dq, dk, dv, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def pallas_attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    start: Int32[Array, "B S"],
    stop: Int32[Array, "B S"],
    scale: float,
    blocks: Blocks = BLOCKS,
    interpret: bool = False,
) -> Float[Array, "B S H E"]:
    """Attention of each query over keys `start <= t < stop`; a query that sees none gives 0.

    Any S and E are taken: S is padded to whole blocks with queries that see nothing, E to a power
    of two from 16 on.

    Args:
      q, k, v: heads; H is a multiple of K.
      start, stop: of the run of keys that each query sees.
      scale: of the scores.
      blocks: sizes; each but the largest divides the largest.
      interpret: run the kernels' operations one by one, on any machine (for tests).
    """
    size, width = q.shape[1], q.shape[3]
    more = -size % max(blocks)
    wide = max(16, pl.next_power_of_2(width)) - width
    room = ((0, 0), (0, more), (0, 0), (0, wide))
    heads_first = [jnp.pad(x, room).transpose(0, 2, 1, 3) for x in (q, k, v)]
    start, stop = (jnp.pad(x, ((0, 0), (0, more))) for x in (start, stop))
    out = _attention(*heads_first, start, stop, scale, blocks, interpret)
    return out.transpose(0, 2, 1, 3)[:, :size, :, :width]
