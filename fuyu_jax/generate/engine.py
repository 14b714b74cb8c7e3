"""Answers to prompts: laid out as in training, run by a `Session`, decoded to text."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh

from fuyu_jax.data.example import Example
from fuyu_jax.data.layout import Layout, LayoutPolicy, lay_out
from fuyu_jax.errors import UserError
from fuyu_jax.generate.beams import run_beams
from fuyu_jax.generate.programs import STEPS, Words
from fuyu_jax.generate.prompts import Prompt
from fuyu_jax.generate.sampling import Sampling
from fuyu_jax.generate.session import Session
from fuyu_jax.generate.work import Usage, Work
from fuyu_jax.tokenizer import Tokenizer

_STREAMED = 4  # steps between calls of `on_text`
_UNFINISHED = "\ufffd"  # what a text ends with where a character's bytes are not all there


class Answer(NamedTuple):
    """What the model said.

    tokens: without what ended it. finished: it ended by itself. error: why there is no answer.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    error: str = ""


class Beams(NamedTuple):
    """Beam search: `number` of beams, and what a sum of log-probabilities is divided by: the number
    of tokens to this power."""

    number: int
    length_penalty: float = 1.0


class Engine:
    """Answers prompts.

    Args:
      graph: the model's graph definition; parameters are given at each call.
      tokenizer, policy: as in training.
      batch_size: prompts that are answered at a time.
      max_new_tokens: the longest answer.
      mesh: rows over its `data` and `fsdp`, heads over `tensor`.
      eos_ids: what ends an answer, if not the tokenizer's `|ENDOFTEXT|` alone; may be empty.
      banned: ids that are never chosen, if not padding and the marks of layouts.
      keep: the cache stays between calls, and what is in it is used again: only where the
        parameters are always the same.
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
        keep: bool = False,
        usage: Usage | None = None,
    ):
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
        self.keep = keep
        self.mesh = mesh
        self.usage = usage or Usage()
        self._session: Session | None = None

    def answer(
        self, params: Any, prompts: Sequence[Example], *, blind: bool = False
    ) -> list[Answer]:
        """Greedy answers in the order of the prompts.

        Args:
          params: of the model.
          prompts: examples without their last answer (`split_answer`).
          blind: all patches zeroed: what the model can tell without its eyes.
        """
        answers = dict(self.stream(params, prompts, blind=blind))
        return [answers[i] for i in range(len(prompts))]

    def stream(
        self,
        params: Any,
        prompts: Sequence[Example],
        *,
        blind: bool = False,
        sampling: Sampling | None = None,
        beams: Beams | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """(index, answer) as they are finished, in any order.

        A prompt whose image is missing or broken is answered with an error.

        Args:
          params, prompts, blind: as in `answer`.
          sampling: how tokens are chosen; the likeliest if not given.
          beams: search for the likeliest answer instead.
          on_text: told what is added to which prompt's answer, as it is said.
        """
        laid = [lay_out(p, self.tokenizer, self.policy, ask=self.ask) for p in prompts]
        made: list[Prompt] = []
        for i, (example, layout) in enumerate(zip(prompts, laid, strict=True)):
            made.append(self._prompt(i, example, layout, max_new=self.max_new_tokens, blind=blind))
        told: dict[int, str] = {}

        def tell(work: Work) -> None:
            text = self._text(work)
            i, before = work.prompt.number, told.get(work.prompt.number, "")
            if on_text and len(text) > len(before) and not text.endswith(_UNFINISHED):
                told[i] = text
                on_text(i, text[len(before) :])

        session = self._open(params)
        try:
            if beams is not None:
                works = run_beams(session, params, _alike_together(made), *beams)
            else:
                works = session.run(
                    params,
                    _alike_together(made),
                    sampling,
                    steps=_STREAMED if on_text else STEPS,
                    on_said=tell if on_text else None,
                )
            for work in works:
                yield work.prompt.number, self._answer(work)
        finally:
            if not self.keep:
                session.forget()

    def score(
        self, params: Any, pairs: Sequence[tuple[Example, Layout, int]]
    ) -> Iterator[tuple[int, Work | str]]:
        """(index, log-probabilities) of continuations as they are known, in any order; a text says
        why there are none.

        Args:
          pairs: an example, its layout with the continuation's tokens behind the prompt's, and
            the index of the first of those.
        """
        made = []
        for i, (example, layout, begin) in enumerate(pairs):
            made.append(self._prompt(i, example, layout, begin=begin))
        session = self._open(params)
        try:
            for work in session.run(params, _alike_together(made)):
                yield work.prompt.number, work.error or work
        finally:
            if not self.keep:
                session.forget()

    def _open(self, params: Any) -> Session:
        """The session, with the settings of now."""
        if self._session is None:
            config = nnx.merge(self.graph, params).config
            self._session = Session(self.graph, config, mesh=self.mesh, usage=self.usage)
        self._session.set(Words(self.eos_ids, self.banned), self.batch_size)
        return self._session

    def forget(self) -> None:
        """Gives the cache's memory back."""
        if self._session is not None:
            self._session.forget()

    def _prompt(self, number: int, example: Example, layout: Layout, **settings: Any) -> Prompt:
        if not len(layout.tokens):
            raise UserError(f"{example.id}: the prompt has no token")
        image_id = self.tokenizer.image_id
        return Prompt(number, example, layout, self.policy, image_id=image_id, **settings)

    def _said(self, work: Work) -> tuple[list[int], bool]:
        """What was said before it ended, and whether it ended."""
        end = next((i for i, t in enumerate(work.said) if t in self.eos_ids), len(work.said))
        return work.said[:end], end < len(work.said)

    def _text(self, work: Work) -> str:
        return self.tokenizer.decode(self._said(work)[0], work.prompt.layout.box_scale)

    def _answer(self, work: Work) -> Answer:
        if work.error:
            return Answer("", (), False, work.error)
        said, finished = self._said(work)
        return Answer(self._text(work), tuple(said), finished)


def _alike_together(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts that begin alike one after another, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.beginning, []).append(prompt)
    return [p for group in groups.values() for p in group]
