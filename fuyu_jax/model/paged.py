"""A cache of keys and values in pages, and attention over it (PagedAttention, arXiv:2309.06180).

One pool of pages serves all rows. A row's context is a list of pages, so that rows share what they
begin alike, and a step looks at the tokens that are there, not at room for the longest.

Over a mesh every shard of rows has a pool of its own, and pages are numbered within it; keys and
values are split over `tensor` where the heads divide. Page 0 of a shard is nobody's: what is not
kept is written there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32

from fuyu_jax.parallel.shards import ROW_AXES, mesh_in_use

PAGE = 32  # tokens of a page
_GROUP = 32  # pages that a decoding step looks at together; 16 to 64 are alike on a CPU
_BLOCK = 64  # queries, and
_TOGETHER = 8  # pages, of a block where a prompt goes on
_MASKED = -1e30


class PagedCache(NamedTuple):
    """Keys and values of all layers; N pages of T tokens. Heads come before tokens: a page is then
    a matrix for each head."""

    k: Float[Array, "L N K T E"]
    v: Float[Array, "L N K T E"]

    @classmethod
    def empty(cls, layers: int, pages: int, heads: int, size: int, dtype: Any) -> "PagedCache":
        shape = (layers, pages, heads, PAGE, size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Prior(NamedTuple):
    """What of a row's prompts is in the cache already.

    pages: of all its prompts, one after another, padded with at least `SPARE`. first: where in
    `pages` a token's own prompt begins. count: tokens of that prompt in the cache.
    """

    pages: Int32[Array, "B N"]
    first: Int32[Array, "B S"]
    count: Int32[Array, "B S"]


SPARE = _TOGETHER


def cache_specs(kv_heads: int, mesh: Any) -> PagedCache:
    """How the cache lies over a mesh: pages with their rows, heads over `tensor`."""
    spec = P(None, ROW_AXES, _head_axis(kv_heads, mesh))
    return PagedCache(spec, spec)


def _head_axis(kv_heads: int, mesh: Any) -> str | None:
    return "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None


def _on_shards(
    function: Callable[..., Any], specs: Callable[[Any, str | None], Any], heads: int, *args: Any
) -> Any:
    """`function` on each shard's rows, pages and heads; `specs(rows, heads)` → (in, out)."""
    mesh = mesh_in_use()
    if mesh is None:
        return function(*args)
    ins, outs = specs(ROW_AXES, _head_axis(heads, mesh))
    return jax.shard_map(function, in_specs=ins, out_specs=outs, check_vma=False)(*args)


def write_pages(
    cache: PagedCache,
    k: Float[Array, "L B S K E"],
    v: Float[Array, "L B S K E"],
    page: Int32[Array, "B S"],
    offset: Int32[Array, "B S"],
) -> PagedCache:
    """The cache with new keys and values at `page`, `offset` of their row's shard; in place, if it
    is donated."""

    def local(ck, cv, k, v, page, offset):
        page, offset = page.reshape(-1), offset.reshape(-1)

        def put(pool, x):
            layers, heads, size = x.shape[0], x.shape[3], x.shape[4]
            # Indices with a slice between them put their own axis first.
            rows = x.reshape(layers, -1, heads, size).transpose(1, 0, 2, 3)
            return pool.at[:, page, :, offset].set(rows.astype(pool.dtype))

        return put(ck, k), put(cv, v)

    def specs(rows, heads):
        pool, new = P(None, rows, heads), P(None, rows, None, heads)
        return (pool, pool, new, new, P(rows), P(rows)), (pool, pool)

    return PagedCache(*_on_shards(local, specs, k.shape[3], *cache, k, v, page, offset))


def copy_pages(
    cache: PagedCache, source: Int32[Array, "B"], target: Int32[Array, "B"]
) -> PagedCache:
    """The cache with pages copied within their shard (0 to 0 where there is nothing to copy)."""

    def local(k, v, source, target):
        return k.at[:, target].set(k[:, source]), v.at[:, target].set(v[:, source])

    def specs(rows, heads):
        pool = P(None, rows, heads)
        return (pool, pool, P(rows), P(rows)), (pool, pool)

    return PagedCache(*_on_shards(local, specs, cache.k.shape[2], *cache, source, target))


# --- One new token a row ---


def decode_attention(
    q: Float[Array, "B H E"],
    k: Float[Array, "B K E"],
    v: Float[Array, "B K E"],
    cache: PagedCache,
    layer: Int32[Array, ""],
    table: Int32[Array, "B M"],
    lengths: Int32[Array, "B"],
    *,
    window: int = 0,
    scale: float,
) -> Float[Array, "B H E"]:
    """Attention of each row's new token over its pages and itself.

    The work is that of the pages that rows have, of all rows together.

    Args:
      q, k, v: of the new tokens, which are not in the cache yet.
      cache: of all layers.
      layer: which.
      table: each row's pages in order.
      lengths: tokens of each row in the cache; the new token's position.
      window: positions back that a token sees; 0 for all.
      scale: of the scores.
    """

    def local(q, k, v, ck, cv, layer, table, lengths):
        b, h, e = q.shape
        kv = k.shape[1]
        f32 = {"preferred_element_type": jnp.float32}
        grouped = q.reshape(b, kv, h // kv, e)
        low = jnp.maximum(lengths + 1 - window, 0) // PAGE if window else jnp.zeros_like(lengths)
        pages = -(-lengths // PAGE) - low
        ends = jnp.cumsum(pages)

        def body(group, carry):
            peak, total, out = carry
            item = group * _GROUP + jnp.arange(_GROUP)
            row = jnp.minimum((item[:, None] >= ends).sum(1), b - 1)
            index = item - (ends - pages - low)[row]
            page = table[row, jnp.clip(index, 0, table.shape[1] - 1)]
            scores = jnp.einsum("nkge,nkte->nkgt", grouped[row], ck[layer, page], **f32) * scale
            t = index[:, None] * PAGE + jnp.arange(PAGE)
            seen = (t < lengths[row, None]) & (item < ends[-1])[:, None]
            if window:
                seen &= t > lengths[row, None] - window
            seen = seen[:, None, None]
            here = jnp.max(jnp.where(seen, scores, _MASKED), axis=-1)
            p = jnp.where(seen, jnp.exp(scores - here[..., None]), 0)
            values = cv[layer, page]
            part = jnp.einsum("nkgt,nkte->nkge", p.astype(values.dtype), values, **f32)
            own = (row == jnp.arange(b)[:, None])[..., None, None]  # [B, n, 1, 1]
            top = jnp.maximum(peak, jnp.max(jnp.where(own, here, _MASKED), axis=1))
            share = jnp.where(own, jnp.exp(here - top[:, None]), 0)
            shrink = jnp.exp(peak - top)
            total = total * shrink + jnp.einsum("bnkg,nkg->bkg", share, p.sum(-1))
            out = out * shrink[..., None] + jnp.einsum("bnkg,nkge->bkge", share, part)
            return top, total, out

        # What each row begins with: itself.
        peak = jnp.einsum("bkge,bke->bkg", grouped, k, **f32) * scale
        out = jnp.broadcast_to(v.astype(jnp.float32)[:, :, None], grouped.shape)
        groups = -(-ends[-1] // _GROUP)
        _, total, out = jax.lax.fori_loop(0, groups, body, (peak, jnp.ones_like(peak), out))
        return (out / total[..., None]).reshape(b, h, e).astype(q.dtype)

    def specs(rows, heads):
        new, pool = P(rows, heads), P(None, rows, heads)
        return (new, new, new, pool, pool, P(), P(rows), P(rows)), new

    return _on_shards(local, specs, k.shape[1], q, k, v, *cache, layer, table, lengths)


# --- A prompt that goes on ---


def prior_attention(
    q: Float[Array, "B S H E"],
    cache: PagedCache,
    layer: Int32[Array, ""],
    prior: Prior,
    positions: Int32[Array, "B S"],
    *,
    window: int = 0,
    scale: float,
) -> tuple[Float32[Array, "B S H E"], Float32[Array, "B S H"]]:
    """Attention of a prompt's tokens over what of it is in the cache, and its log-sum-exp (very
    small where that is nothing), to be merged with attention over the tokens themselves.

    Args:
      positions: of the tokens in their prompts.
    """

    def local(q, ck, cv, layer, pages, first, count, positions):
        def row(args):
            return _prior_row(*args, ck, cv, layer, window, scale)

        return jax.lax.map(row, (q, pages, first, count, positions))

    def specs(rows, heads):
        pool = P(None, rows, heads)
        ins = (P(rows, None, heads), pool, pool, P(), *(P(rows) for _ in range(4)))
        return ins, (P(rows, None, heads), P(rows, None, heads))

    args = (*cache, layer, prior.pages, prior.first, prior.count, positions)
    return _on_shards(local, specs, cache.k.shape[2], q, *args)


def _prior_row(q, pages, first, count, positions, ck, cv, layer, window, scale):
    """One row: q [S,H,E] → out [S,H,E] and log-sum-exp [S,H]; block by block, as in
    `model/blockwise.py`."""
    s, h, e = q.shape
    kv = ck.shape[2]
    more = -s % _BLOCK
    q = jnp.pad(q, ((0, more), (0, 0), (0, 0))).reshape(-1, _BLOCK, kv, h // kv, e)
    first, count, positions = (
        jnp.pad(x, (0, more)).reshape(-1, _BLOCK) for x in (first, count, positions)
    )
    f32 = {"preferred_element_type": jnp.float32}

    def block(args):
        q, first, count, positions = args
        q = q.transpose(1, 2, 0, 3)  # [K, g, block, E]
        begin = jnp.maximum(positions + 1 - window, 0) if window else jnp.zeros_like(count)
        sees = count > begin
        low = jnp.min(jnp.where(sees, first + begin // PAGE, jnp.iinfo(jnp.int32).max))
        high = jnp.max(jnp.where(sees, first - (-count // PAGE), 0))

        def body(carry):
            at, peak, total, out = carry
            page = jax.lax.dynamic_slice_in_dim(pages, at, _TOGETHER)
            scores = jnp.einsum("kgqe,nkte->kgqnt", q, ck[layer, page], **f32) * scale
            t = (at + jnp.arange(_TOGETHER) - first[:, None])[..., None] * PAGE + jnp.arange(PAGE)
            seen = (t >= begin[:, None, None]) & (t < count[:, None, None])
            top = jnp.maximum(peak, jnp.max(jnp.where(seen, scores, _MASKED), axis=(-1, -2)))
            p = jnp.where(seen, jnp.exp(scores - top[..., None, None]), 0)
            values = cv[layer, page]
            part = jnp.einsum("kgqnt,nkte->kgqe", p.astype(values.dtype), values, **f32)
            shrink = jnp.exp(peak - top)
            total = total * shrink + p.sum((-1, -2))
            return at + _TOGETHER, top, total, out * shrink[..., None] + part

        zero = jnp.zeros(q.shape[:-1], jnp.float32)
        init = (low, zero + _MASKED, zero, jnp.zeros(q.shape, jnp.float32))
        _, peak, total, out = jax.lax.while_loop(lambda c: c[0] < high, body, init)
        some = jnp.where(total == 0, 1, total)
        lse = jnp.where(total == 0, _MASKED, peak + jnp.log(some))
        out = out / some[..., None]
        return out.transpose(2, 0, 1, 3), lse.transpose(2, 0, 1)

    out, lse = jax.lax.map(block, (q, first, count, positions))
    return out.reshape(-1, h, e)[:s], lse.reshape(-1, h)[:s]


def merge(
    one: Float[Array, "*any E"],
    one_lse: Float32[Array, "*any"],
    other: Float[Array, "*any E"],
    other_lse: Float32[Array, "*any"],
) -> Float32[Array, "*any E"]:
    """Attention over two sets of keys from attention over each, with their log-sum-exps."""
    top = jnp.maximum(one_lse, other_lse)
    a, b = jnp.exp(one_lse - top)[..., None], jnp.exp(other_lse - top)[..., None]
    return (one.astype(jnp.float32) * a + other.astype(jnp.float32) * b) / (a + b)
