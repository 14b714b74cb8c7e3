"""The compiled functions of generation: a chunk of prompts, steps of decoding, a step of beams.

Their shapes do not depend on the prompts' lengths, so that a few compilations serve all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from fuyu_jax.batch import PackedBatch
from fuyu_jax.generate.sampling import Draw, choose
from fuyu_jax.model.decoder import Decoder
from fuyu_jax.model.paged import PagedCache, Prior, copy_pages, write_pages

ENDS = 32  # prompts that may end in one row of a chunk
STEPS = 32  # of decoding, at most, before the host looks
NOTHING = -1  # in results: no token
_SCORED = 64  # positions whose logits exist at one time


class Words(NamedTuple):
    """What may be said; the same in all calls. ends: ids that end an answer. banned: never said."""

    ends: tuple[int, ...]
    banned: tuple[int, ...]


class Chunk(NamedTuple):
    """Prompts, or parts of them, packed into a row a shard; B rows of S tokens.

    page, offset: where each token's key and value are kept (page 0: nowhere). prior: what the
    prompts have in the cache. ends: indices of prompts' last tokens, `NOTHING` for none; numbers:
    of those prompts. scored: indices whose next token is `targets`, the first `count` of each row.
    """

    batch: PackedBatch
    page: Int32[Array, "B S"]
    offset: Int32[Array, "B S"]
    prior: Prior | None
    ends: Int32[Array, "B ends"]
    numbers: Int32[Array, "B ends"]
    scored: Int32[Array, "B S"]
    targets: Int32[Array, "B S"]
    count: Int32[Array, "B"]


class Prefilled(NamedTuple):
    """What a chunk gives. first: the token behind each end. top: with beams, log-probabilities and
    ids of the likeliest. logprob, best: of `scored`, and whether the target is the likeliest."""

    first: Int32[Array, "B ends"]
    top: tuple[Float32[Array, "B ends W"], Int32[Array, "B ends W"]] | None
    logprob: Float32[Array, "B S"]
    best: Bool[Array, "B S"]


class Drawing(NamedTuple):
    """`Sampling` as arrays."""

    temperature: Float32[Array, ""]
    top_p: Float32[Array, ""]
    seed: jax.Array


def _may(logits: Float32[Array, "*any V"], words: Words) -> Float32[Array, "*any V"]:
    return logits.at[..., jnp.asarray(words.banned, jnp.int32)].set(-jnp.inf)


def _likeliest(logits: Float32[Array, "*any V"], words: Words, number: int):
    """Log-probabilities (before anything is banned) and ids of the likeliest tokens."""
    logprobs = _may(jax.nn.log_softmax(logits), words)
    best, ids = jax.lax.top_k(logprobs, number)
    return best, ids


@functools.partial(
    jax.jit, static_argnames=("graph", "words", "top", "sampled"), donate_argnames=("cache",)
)
def prefill(
    graph: nnx.GraphDef,
    params: Any,
    cache: PagedCache,
    chunk: Chunk,
    drawing: Drawing,
    *,
    words: Words,
    top: int = 0,
    sampled: bool = False,
) -> tuple[PagedCache, Prefilled]:
    """Runs a chunk, keeps its keys and values, chooses first tokens and scores what is asked."""
    model: Decoder = nnx.merge(graph, params)
    hidden, new = model.prefill(chunk.batch, cache, chunk.prior)
    cache = write_pages(cache, new.k, new.v, chunk.page, chunk.offset)
    at = jnp.maximum(chunk.ends, 0)
    logits = model.logits(jnp.take_along_axis(hidden, at[..., None], axis=1))
    best = _likeliest(logits, words, top) if top else None
    draw = None
    if sampled:
        position = jnp.take_along_axis(jnp.asarray(chunk.batch.positions), at, axis=1) + 1
        draw = Draw(*drawing, chunk.numbers.reshape(-1), position.reshape(-1))
    first = choose(_may(logits.reshape(-1, logits.shape[-1]), words), draw)
    return cache, Prefilled(first.reshape(at.shape), best, *_score(model, hidden, chunk))


def _score(model: Decoder, hidden: jax.Array, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every target, and whether it is the likeliest; in float32."""
    size = chunk.scored.shape[1]
    room = ((0, 0), (0, -size % _SCORED))
    scored, targets = jnp.pad(chunk.scored, room), jnp.pad(chunk.targets, room)

    def body(i, found):
        at = i * _SCORED
        places = jax.lax.dynamic_slice_in_dim(scored, at, _SCORED, 1)
        wanted = jax.lax.dynamic_slice_in_dim(targets, at, _SCORED, 1)
        logits = model.logits(jnp.take_along_axis(hidden, places[..., None], axis=1))
        logprobs = jax.nn.log_softmax(logits)
        here = jnp.take_along_axis(logprobs, wanted[..., None], axis=-1)[..., 0]
        likeliest = jnp.argmax(logits, axis=-1) == wanted
        return (
            jax.lax.dynamic_update_slice_in_dim(found[0], here, at, 1),
            jax.lax.dynamic_update_slice_in_dim(found[1], likeliest, at, 1),
        )

    init = (jnp.zeros(scored.shape, jnp.float32), jnp.zeros(scored.shape, bool))
    logprob, best = jax.lax.fori_loop(0, -(-jnp.max(chunk.count) // _SCORED), body, init)
    return logprob[:, :size], best[:, :size]


class Rows(NamedTuple):
    """Prompts that are being answered, one a row.

    token: the last one chosen, not yet in the cache. lengths: tokens in the cache. left: how many
    more may be said; 0: the row is done, or empty. number: of the prompt. table: pages.
    """

    token: Int32[Array, "B"]
    lengths: Int32[Array, "B"]
    left: Int32[Array, "B"]
    number: Int32[Array, "B"]
    table: Int32[Array, "B M"]


def _step(model: Decoder, cache: PagedCache, rows: Rows):
    """Logits behind each row's token, whose key and value are kept."""
    live = rows.left > 0
    lengths = jnp.where(live, rows.lengths, 0)  # a row that is done looks at nothing
    hidden, new = model.decode(rows.token, lengths, rows.table, cache)
    index = jnp.minimum(rows.lengths // cache.k.shape[3], rows.table.shape[1] - 1)
    page = jnp.take_along_axis(rows.table, index[:, None], axis=1)
    page = jnp.where(live[:, None], page, 0)
    offset = (rows.lengths % cache.k.shape[3])[:, None]
    return write_pages(cache, new.k, new.v, page, offset), model.logits(hidden)


@functools.partial(
    jax.jit, static_argnames=("graph", "words", "sampled"), donate_argnames=("cache",)
)
def decode(
    graph: nnx.GraphDef,
    params: Any,
    cache: PagedCache,
    rows: Rows,
    drawing: Drawing,
    steps: Int32[Array, ""],
    leave: Int32[Array, ""],
    *,
    words: Words,
    sampled: bool = False,
) -> tuple[PagedCache, Int32[Array, "B N"]]:
    """Decodes until `steps` are made (`STEPS` at most), or `leave` rows have ended in this call, or
    all have.

    Returns:
      The cache, and each row's new tokens: with the one that ended it, and `NOTHING` behind.
    """
    model: Decoder = nnx.merge(graph, params)
    ends = jnp.asarray(words.ends, jnp.int32)
    before = jnp.sum(rows.left > 0)
    out = jnp.full((rows.token.shape[0], STEPS), NOTHING, jnp.int32)

    def going(carry):
        i, rows, _, _ = carry
        alive = jnp.sum(rows.left > 0)
        return (i < steps) & (alive > 0) & (before - alive < leave)

    def body(carry):
        i, rows, out, cache = carry
        cache, logits = _step(model, cache, rows)
        position = rows.lengths + 1
        draw = Draw(*drawing, rows.number, position) if sampled else None
        token = choose(_may(logits, words), draw)
        live = rows.left > 0
        out = out.at[:, i].set(jnp.where(live, token, NOTHING))
        ended = (token[:, None] == ends).any(axis=1)
        left = jnp.where(live & ~ended, rows.left - 1, 0)
        rows = rows._replace(token=token, lengths=jnp.where(live, position, 0), left=left)
        return i + 1, rows, out, cache

    carry = (jnp.zeros((), jnp.int32), rows, out, cache)
    _, _, out, cache = jax.lax.while_loop(going, body, carry)
    return cache, out


@functools.partial(jax.jit, static_argnames=("graph", "words", "top"), donate_argnames=("cache",))
def beam_step(
    graph: nnx.GraphDef,
    params: Any,
    cache: PagedCache,
    rows: Rows,
    source: Int32[Array, "B"],
    target: Int32[Array, "B"],
    *,
    words: Words,
    top: int,
) -> tuple[PagedCache, tuple[Float32[Array, "B W"], Int32[Array, "B W"]]]:
    """Pages copied from `source` to `target`, then one step: the likeliest next tokens."""
    model: Decoder = nnx.merge(graph, params)
    cache = copy_pages(cache, source, target)
    cache, logits = _step(model, cache, rows)
    return cache, _likeliest(logits, words, top)
