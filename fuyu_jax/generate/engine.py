"""Greedy generation in batches with a KV cache.

Prompts are sorted by length and grouped into batches of one shape a bucket (powers of two), so
that prompts of all lengths take few compilations.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from fuyu_jax.batch import PackedBatch
from fuyu_jax.data.example import BadImageError, Example
from fuyu_jax.data.layout import Layout, LayoutPolicy, lay_out
from fuyu_jax.data.rows import PatchedExample, fill_row, with_pixels
from fuyu_jax.model.decoder import Decoder
from fuyu_jax.parallel.mesh import batch_sharding, row_devices
from fuyu_jax.tokenizer import Tokenizer

SMALLEST_BUCKET = 64


class Answer(NamedTuple):
    """What the model said.

    tokens: without `|ENDOFTEXT|`. finished: it ended by itself. error: why there is no answer.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    error: str = ""


def bucket(length: int) -> int:
    """The smallest power of two, from 64 on, that holds a length."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


NOTHING = -1  # in the result, after a row's end


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "eos_ids", "banned"))
def generate_tokens(
    graph: nnx.GraphDef,
    params: Any,
    batch: PackedBatch,
    lengths: Int32[Array, "B"],
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    banned: tuple[int, ...],
) -> Int32[Array, "B N"]:
    """Greedy continuations of one prompt a row.

    Args:
      graph, params: the model.
      batch: one segment a row, beginning at index 0.
      lengths: of the prompts.
      max_new_tokens: N; the loop stops before where every row has ended.
      eos_ids: each ends a row; what follows in the result is `NOTHING`.
      banned: ids that are never chosen.
    """
    model: Decoder = nnx.merge(graph, params)
    rows = jnp.arange(lengths.shape[0])
    hidden, cache = model.prefill(batch, batch.tokens.shape[1] + max_new_tokens)

    def choose(hidden):
        logits = model.logits(hidden).at[:, jnp.asarray(banned, jnp.int32)].set(-jnp.inf)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    first = choose(hidden[rows, lengths - 1])
    out = jnp.full((lengths.shape[0], max_new_tokens), NOTHING, jnp.int32)
    ends = jnp.asarray(eos_ids, jnp.int32)

    def going(carry):
        i, _, done, _, _ = carry
        return (i < max_new_tokens) & ~done.all()

    def body(carry):
        i, token, done, out, cache = carry
        out = out.at[:, i].set(jnp.where(done, NOTHING, token))
        done = done | (token[:, None] == ends).any(axis=1)
        at = lengths + i
        hidden, cache = model.decode(token, at, at, cache)
        return i + 1, choose(hidden), done, out, cache

    # Rows of length 0 are filling and are done before they begin.
    carry = (jnp.zeros((), jnp.int32), first, lengths == 0, out, cache)
    return jax.lax.while_loop(going, body, carry)[3]


class Engine:
    """Answers prompts.

    Args:
      graph: the model's graph definition; parameters are given at each call.
      tokenizer, policy: as in training.
      batch_size: prompts at a time.
      max_new_tokens: the longest answer.
      mesh: lays the prompts of a batch over its devices, where their number divides.
      eos_ids: what ends an answer, if not the tokenizer's `|ENDOFTEXT|` alone; may be empty.
      banned: ids that are never chosen, if not padding and the marks of layouts.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        tokenizer: Tokenizer,
        policy: LayoutPolicy,
        *,
        batch_size: int = 32,
        max_new_tokens: int = 64,
        mesh: Mesh | None = None,
        eos_ids: tuple[int, ...] | None = None,
        banned: tuple[int, ...] | None = None,
    ):
        self.mesh = mesh
        self.graph = graph
        self.tokenizer = tokenizer
        self.policy = policy
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        t = tokenizer
        self.eos_ids = (t.eos_id,) if eos_ids is None else eos_ids
        # A placeholder has no patch here, and padding and `<s>` are never an answer's.
        marks = (t.pad_id, t.bos_id, t.image_id, t.newline_id, t.answer_id)
        self.banned = (
            tuple(token for token in marks if token is not None) if banned is None else banned
        )
        # A language model that never saw `<0x04>` goes on where the text ends.
        self.ask = t.answer_id is not None

    def answer(
        self, params: Any, prompts: Sequence[Example], *, blind: bool = False
    ) -> list[Answer]:
        """Answers in the order of the prompts.

        Args:
          params: of the model.
          prompts: examples without their last answer (`split_answer`).
          blind: all patches zeroed: what the model can tell without its eyes.
        """
        answers: list[Answer | None] = [None] * len(prompts)
        for index, answer in self.stream(params, prompts, blind=blind):
            answers[index] = answer
        assert all(a is not None for a in answers)
        return [a for a in answers if a is not None]

    def stream(
        self, params: Any, prompts: Sequence[Example], *, blind: bool = False
    ) -> Iterator[tuple[int, Answer]]:
        """(index, answer) batch by batch, shortest prompts first.

        A prompt whose image is missing or broken is answered with an error.
        """
        layouts = [lay_out(p, self.tokenizer, self.policy, ask=self.ask) for p in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(layouts[i].tokens))
        for at in range(0, len(order), self.batch_size):
            group = order[at : at + self.batch_size]
            ready: list[tuple[int, PatchedExample]] = []
            for i in group:
                try:
                    ready.append((i, with_pixels(prompts[i], layouts[i], self.policy)))
                except BadImageError as error:
                    yield i, Answer("", (), False, str(error))
            if ready:
                yield from self._answer_batch(params, ready, blind)

    def _answer_batch(
        self, params: Any, ready: list[tuple[int, PatchedExample]], blind: bool
    ) -> Iterator[tuple[int, Answer]]:
        layouts = [example.layout for _, example in ready]
        batch, lengths = self._batch([example for _, example in ready], layouts)
        if blind:
            batch = batch._replace(patches=np.zeros_like(batch.patches))
        tokens = self._generate(params, batch, lengths)
        for (i, example), row in zip(ready, np.asarray(tokens).tolist(), strict=False):
            ends = (at for at, t in enumerate(row) if t == NOTHING or t in self.eos_ids)
            end = next(ends, len(row))
            finished, kept = end < len(row), row[:end]
            text = self.tokenizer.decode(kept, example.layout.box_scale)
            yield i, Answer(text, tuple(kept), finished)

    def _generate(self, params: Any, batch: PackedBatch, lengths: np.ndarray) -> jax.Array:
        mesh = self.mesh
        spread = mesh is not None and self.batch_size % row_devices(mesh) == 0
        sharding = batch_sharding(mesh) if spread else None
        with jax.set_mesh(mesh) if spread else contextlib.nullcontext():
            return generate_tokens(
                self.graph,
                params,
                jax.device_put(batch, sharding),
                jax.device_put(lengths, sharding),
                max_new_tokens=self.max_new_tokens,
                eos_ids=self.eos_ids,
                banned=self.banned,
            )

    def _batch(
        self, examples: list[PatchedExample], layouts: list[Layout]
    ) -> tuple[PackedBatch, np.ndarray]:
        size = bucket(max(len(x.tokens) for x in layouts))
        patches = max(x.num_patches for x in layouts)
        # Patches are never more than tokens, so one bucket serves both.
        room = size if patches else 0
        channels = self.policy.patch_size**2 * 3
        batch = PackedBatch.empty(self.batch_size, size, room, channels)
        lengths = np.zeros(self.batch_size, np.int32)
        for row, example in enumerate(examples):
            fill_row(batch, row, [example])
            lengths[row] = len(example.layout.tokens)
        return batch, lengths
