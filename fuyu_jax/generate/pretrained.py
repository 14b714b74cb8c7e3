"""A model to be asked: what `fuyu_jax.load` gives."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32

from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import ModelConfig
from fuyu_jax.data.example import BadImageError, Example
from fuyu_jax.data.layout import Layout, lay_out
from fuyu_jax.data.processor import Processor
from fuyu_jax.data.rows import PatchedExample, fill_row, with_pixels
from fuyu_jax.errors import UserError
from fuyu_jax.generate.compiling import compiled
from fuyu_jax.generate.engine import Answer, Beams, Engine
from fuyu_jax.generate.sampling import Sampling
from fuyu_jax.model.decoder import Decoder
from fuyu_jax.tokenizer import Tokenizer


class Score(NamedTuple):
    """How likely a continuation is.

    logprob: natural logarithm of its probability, summed over its tokens in float32. tokens: how
    many. bytes: of its text in UTF-8. is_greedy: each token was the likeliest one.
    """

    logprob: float
    tokens: int
    bytes: int
    is_greedy: bool


@functools.partial(jax.jit, static_argnames="graph")
def _hidden(graph: nnx.GraphDef, params: Any, batch: PackedBatch) -> Array:
    return nnx.merge(graph, params)(batch)


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph: nnx.GraphDef, params: Any, hidden: Array) -> Float32[Array, "S V"]:
    return nnx.merge(graph, params).logits(hidden)


def bucket(length: int) -> int:
    """The smallest power of two, from 64 on, that holds a length."""
    return max(64, 1 << (length - 1).bit_length())


class PretrainedModel:
    """A model with its processor; prompts are as `Processor` takes them.

    A prompt is a list, in order, of texts, lists of token ids, and images (`PIL.Image`,
    `uint8[h, w, 3]`, or a `pathlib.Path`). It is laid out as in training: patches where the images
    stand, `<s>` before the first text, `<0x04>` behind the last. Token ids bring their own marks:
    nothing is put before or behind them. A language model that was never given image tokens takes
    texts and token ids alone, and gets no `<0x04>`.

    processor: prompts to arrays, and tokens to text. config: of the model. graph, params: of the
    flax module. eos_ids: what ends an answer.
    """

    def __init__(
        self,
        processor: Processor,
        config: ModelConfig,
        graph: nnx.GraphDef,
        params: Any,
        eos_ids: tuple[int, ...],
        mesh: Any = None,
    ):
        self.processor = processor
        self.config = config
        self.graph = graph
        self.params = params
        self.eos_ids = eos_ids
        self.mesh = mesh
        self._compilations = compiled().number
        self._engine = Engine(
            graph, processor.tokenizer, processor.policy, mesh=mesh, eos_ids=eos_ids, keep=True
        )

    def with_processor(self, processor: Processor) -> "PretrainedModel":
        """The same model behind another processor."""
        return PretrainedModel(
            processor, self.config, self.graph, self.params, self.eos_ids, self.mesh
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    def model(self) -> Decoder:
        """The flax module itself."""
        return nnx.merge(self.graph, self.params)

    def logits(self, prompt: Any) -> Float32[np.ndarray, "S V"]:
        """Scores of every vocabulary entry after each of a prompt's S tokens.

        Raises:
          UserError: something in the prompt cannot be taken; a prompt without a token.
          BadImageError: an image that is missing or broken.
        """
        ready = self._ready(prompt)
        hidden = self._run(ready, len(ready.layout.tokens))
        with self._on_mesh():
            logits = _logits(self.graph, self.params, hidden)
        return np.asarray(logits)[: len(ready.layout.tokens)]

    def generate(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int = 64,
        *,
        batch_size: int = 0,
        temperature: float | int = 0.0,
        top_p: float | int = 1.0,
        num_beams: int = 1,
        length_penalty: float | int = 1.0,
        seed: int = 0,
        eos_ids: Sequence[int] | None = None,
        banned: Sequence[int] = (),
        on_answer: Callable[[int, Answer], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """Answers, in the order of the prompts; they do not depend on the batch.

        Prompts are packed, a row that ends is given the next prompt, and what prompts begin alike
        (an image, demonstrations) is computed once. The cache stays for the next call: `forget`
        gives its memory back.

        Args:
          prompts: each as above.
          max_new_tokens: the longest answer.
          batch_size: answers that are decoded together (with beams: beams); by default all, but 32
            at most.
          temperature: 0 takes the likeliest token, more draws by chance.
          top_p: draws only of the likeliest tokens that together have this probability.
          num_beams: more than 1 searches for the likeliest answer.
          length_penalty: with beams: what a sum of log-probabilities is divided by is the answer's
            length to this power.
          seed: of what is drawn by chance.
          eos_ids: what ends an answer, if not what the model's own files say; may be empty.
          banned: ids that are never chosen.
          on_answer: told of each answer when it is finished, in any order. With it a missing or
            broken image is an answer with an error.
          on_text: told what is added to which answer, as it is said (not with beams).

        Raises:
          UserError: something in a prompt cannot be taken; a prompt without a token; settings
            that make no sense.
          BadImageError: an image that is missing or broken, without `on_answer`.
        """
        if isinstance(prompts, str):
            raise UserError("prompts: give a list of prompts, not one text")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: give 1 or more")
        if batch_size < 0:
            raise UserError(f"batch_size={batch_size}: give 1 or more, or 0 for all")
        sampling = Sampling(temperature, top_p, seed)
        sampling.check()
        if num_beams < 1:
            raise UserError(f"num_beams={num_beams}: give 1 or more")
        if num_beams > 1 and (temperature or on_text):
            raise UserError(
                f"num_beams={num_beams}: beams neither draw by chance (temperature) nor say "
                "anything before they are done (on_text)"
            )
        examples = [self.processor.example(p, id=f"prompt {i}") for i, p in enumerate(prompts)]
        if not examples:
            return []
        engine = self._engine
        engine.batch_size = batch_size or min(len(examples) * num_beams, 32)
        engine.max_new_tokens = max_new_tokens
        engine.eos_ids = self.eos_ids if eos_ids is None else tuple(int(t) for t in eos_ids)
        engine.banned = tuple(int(t) for t in banned)
        for example in examples:
            self._check(example.id, lay_out(example, self.tokenizer, engine.policy, ask=engine.ask))
        answers: dict[int, Answer] = {}
        for i, answer in engine.stream(
            self.params,
            examples,
            sampling=sampling,
            beams=Beams(num_beams, length_penalty) if num_beams > 1 else None,
            on_text=on_text,
        ):
            if on_answer is not None:
                on_answer(i, answer)
            elif answer.error:
                raise BadImageError(f"{examples[i].id}: {answer.error}")
            answers[i] = answer
        return [answers[i] for i in range(len(examples))]

    def score(self, prompt: Any, continuation: Any) -> Score:
        """How likely a continuation is after a prompt.

        Args:
          prompt: as above.
          continuation: a text, encoded on its own and without `|ENDOFTEXT|`; or token ids.

        Raises:
          UserError: as in `logits`; a continuation without a token.
          BadImageError: an image that is missing or broken.
        """
        return self.scores([(prompt, continuation)])[0]

    def scores(
        self,
        pairs: Sequence[tuple[Any, Any]],
        *,
        on_score: Callable[[int, Score | str], None] | None = None,
    ) -> list[Score]:
        """How likely continuations are after their prompts, in the order of the pairs.

        What prompts begin alike is computed once: give a context's choices in one call.

        Args:
          pairs: a prompt and a continuation each, as in `score`.
          on_score: told of each score when it is known, in any order, or why there is none. With it
            a missing or broken image is no error, and its score is not in the result.

        Raises:
          UserError: as in `score`.
          BadImageError: an image that is missing or broken, without `on_score`.
        """
        made = [self._pair(i, prompt, words) for i, (prompt, words) in enumerate(pairs)]
        found: dict[int, Score] = {}
        laid = [(example, layout, begin) for example, layout, begin, _ in made]
        for i, work in self._engine.score(self.params, laid):
            if isinstance(work, str):
                if on_score is None:
                    raise BadImageError(f"{made[i][0].id}: {work}")
                on_score(i, work)
                continue
            logprobs = np.asarray(work.logprobs, np.float32)
            size = len(logprobs)
            found[i] = Score(
                float(logprobs.sum(dtype=np.float32)), size, made[i][3], all(work.best)
            )
            if on_score is not None:
                on_score(i, found[i])
        return [found[i] for i in sorted(found)]

    def _pair(self, number: int, prompt: Any, words: Any) -> tuple[Example, Layout, int, int]:
        """A prompt with a continuation behind it, where that begins, and its bytes."""
        example = self.processor.example(prompt, id=f"prompt {number}")
        ask = self.tokenizer.answer_id is not None
        layout = lay_out(example, self.tokenizer, self.processor.policy, ask=ask)
        self._check(example.id, layout)
        if isinstance(words, str):
            ids = self.tokenizer.encode(words, layout.box_scale)
            size = len(words.encode("utf-8", "surrogatepass"))
        else:
            ids = [int(t) for t in words]
            size = len(self.tokenizer.decode(ids, layout.box_scale).encode())
        if not ids:
            raise UserError(f"{example.id}: the continuation has no token")
        self._check_ids(ids)
        begin = len(layout.tokens)
        tokens = np.concatenate([layout.tokens, np.asarray(ids, np.int32)])
        longer = dataclasses.replace(
            layout,
            tokens=tokens,
            positions=np.arange(len(tokens), dtype=np.int32),
            loss_weights=np.zeros(len(tokens), np.float32),
        )
        return example, longer, begin, size

    def usage(self) -> dict[str, int | float]:
        """Sums since the model was opened: tokens of prompts that were computed (`prompt_tokens`)
        and that were found in the cache (`reused_tokens`), tokens of answers (`new_tokens`),
        `prefill_seconds` and `decode_seconds` without compiling, the `compile_seconds` of both, and
        all `compilations` of this process."""
        return {
            **dataclasses.asdict(self._engine.usage),
            "compilations": compiled().number - self._compilations,
        }

    def forget(self) -> None:
        """Gives the memory of keys and values back; the next call computes anew."""
        self._engine.forget()

    def _ready(self, prompt: Any) -> PatchedExample:
        example = self.processor.example(prompt)
        ask = self.tokenizer.answer_id is not None
        layout = lay_out(example, self.tokenizer, self.processor.policy, ask=ask)
        self._check(example.id, layout)
        return with_pixels(example, layout, self.processor.policy)

    def _check(self, id: str, layout: Any) -> None:
        if layout.grids and self.tokenizer.image_id < 0:
            raise UserError(
                f"{id}: this is a language model without image tokens; `python -m "
                "fuyu_jax.interop.convert` gives it some, to be trained"
            )
        if not len(layout.tokens):
            raise UserError(f"{id}: it has no token")
        self._check_ids(layout.tokens)

    def _check_ids(self, ids: Any) -> None:
        if max(ids) >= self.config.vocab_size or min(ids) < 0:
            raise UserError(
                f"token id {max(ids) if min(ids) >= 0 else min(ids)}: the model has "
                f"0 to {self.config.vocab_size - 1}"
            )

    def _run(self, ready: PatchedExample, length: int) -> Array:
        """Hidden states of one row, with padding behind: few shapes, so few compilations."""
        size = bucket(length)
        patches = size if ready.layout.grids else 0
        batch = PackedBatch.empty(1, size, patches, self.config.patch_channels)
        fill_row(batch, 0, [ready])
        with self._on_mesh():
            return _hidden(self.graph, self.params, batch)[0]

    def _on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()
