"""A model of `fuyu_jax.load` as the harness asks it. The one module of the harness with JAX."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from fuyu_jax.data.example import Example, Image, Text, Tokens, open_image
from fuyu_jax.errors import UserError
from fuyu_jax.evals.harness import Keep, Said
from fuyu_jax.evals.metrics.text import rolling_windows
from fuyu_jax.evals.requests import Checkpoint, Given, Part, Question
from fuyu_jax.evals.settings import Settings, parse_mesh
from fuyu_jax.generate.engine import Answer
from fuyu_jax.generate.opening import load
from fuyu_jax.generate.pretrained import PretrainedModel, Score
from fuyu_jax.parallel import hosts

Pair = tuple[Example, str | Sequence[int]]


class Hosts:
    """The processes of this run."""

    def __init__(self, settings: Settings) -> None:
        hosts.start_hosts(settings.coordinator, settings.num_processes, settings.process_id)
        self.index = jax.process_index()
        self.count = jax.process_count()

    def gather(self, value: Any) -> list[Any]:
        return hosts.gather(value)

    def guard(self) -> AbstractContextManager[None]:
        return hosts.leaving_together()


class ModelAsker:
    """Asks a `PretrainedModel`.

    together: with a mesh over several hosts each runs a part of one computation.
    """

    def __init__(self, model: PretrainedModel, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self.together = model.mesh is not None and jax.process_count() > 1

    def generate(self, questions: Sequence[Question], max_new_tokens: int, keep: Keep) -> None:
        def on_answer(at: int, answer: Answer) -> None:
            said = Said(
                answer.text,
                new_tokens=len(answer.tokens),
                finished=answer.finished,
                error=answer.error or "",
            )
            keep(questions[at], said)

        self.model.generate(
            [self._example(q) for q in questions],
            max_new_tokens,
            batch_size=self.batch_size,
            on_answer=on_answer,
        )

    def likelihoods(self, questions: Sequence[Question], keep: Keep) -> None:
        # Behind the mark of an answer a model has learnt answers without a space before them.
        marked = self.model.tokenizer.answer_id is not None

        def pairs(question: Question) -> list[Pair]:
            prompt = self._example(question)
            words = question.continuations
            return [(prompt, c.removeprefix(" ") if marked else c) for c in words]

        def said(scores: Sequence[Score]) -> Said:
            return Said(logprobs=tuple(_finite(s.logprob) for s in scores))

        self._score(questions, pairs, said, keep)

    def documents(self, questions: Sequence[Question], window: int, keep: Keep) -> None:
        def said(scores: Sequence[Score]) -> Said:
            total = math.fsum(s.logprob for s in scores)
            return Said(logprobs=(_finite(total),), tokens=sum(s.tokens for s in scores))

        self._score(questions, lambda q: self._windows(q, window), said, keep)

    def usage(self) -> Mapping[str, int | float]:
        return self.model.usage()

    def _score(
        self,
        questions: Sequence[Question],
        pairs: Callable[[Question], list[Pair]],
        said: Callable[[Sequence[Score]], Said],
        keep: Keep,
    ) -> None:
        """All pairs of all questions at once; a question is kept when its last one is there."""
        asked = [pairs(q) for q in questions]
        where = [(n, k) for n, found in enumerate(asked) for k in range(len(found))]
        known: list[dict[int, Score | str]] = [{} for _ in asked]

        def on_score(at: int, score: Score | str) -> None:
            n, k = where[at]
            known[n][k] = score
            if len(known[n]) == len(asked[n]):
                errors = [s for s in known[n].values() if isinstance(s, str)]
                scores = [known[n][i] for i in range(len(asked[n]))]
                keep(questions[n], Said(error=errors[0]) if errors else said(scores))

        for question, found in zip(questions, asked, strict=True):
            if not found:  # a document without a token
                keep(question, said([]))
        if where:
            self.model.scores([pair for found in asked for pair in found], on_score=on_score)

    def _windows(self, question: Question, window: int) -> list[Pair]:
        """Each token once, behind at least one; behind images or a text in one piece."""
        (text,) = question.continuations
        if question.parts:
            return [(self._example(question), text)]
        tokenizer = self.model.tokenizer
        begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if begin < 0:
            raise UserError("perplexity: this tokenizer has nothing to begin a document with")
        ids = tokenizer.encode(text)
        pairs: list[Pair] = []
        for part in rolling_windows(len(ids), window):
            before = [begin] if part.first == 0 else ids[part.begin : part.first]
            prompt = Example(question.id, (Tokens(tuple(before)),))
            pairs.append((prompt, ids[part.first : part.stop]))
        return pairs

    def _example(self, question: Question) -> Example:
        return Example(question.id, tuple(self._segment(p) for p in question.parts))

    def _segment(self, part: Part) -> Text | Image:
        if isinstance(part, Given):
            # A language model without a mark for answers reads on.
            if self.model.tokenizer.answer_id is None:
                return Text(f" {part.text}\n\n")
            return Text(part.text, train=True)
        return Text(part) if isinstance(part, str) else open_image(part)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def open_model(checkpoint: Checkpoint, settings: Settings) -> ModelAsker:
    """Loads a checkpoint, over the mesh that was asked for."""
    model = load(checkpoint.path, dtype=settings.dtype, mesh=parse_mesh(settings.mesh))
    return ModelAsker(model, settings.batch_size)
