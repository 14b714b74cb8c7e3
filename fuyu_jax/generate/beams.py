"""Beam search over shared pages: beams hold what they have in common once, and copy a page only
before one of them writes into it.

The rules are those of transformers' `generate(num_beams=…, early_stopping=False)`: of a step's 2W
best candidates those that end among the first W are finished answers, the best W others go on; a
search is over when no beam, at its length, could pass the worst of W finished ones.
"""

import collections
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fuyu_jax.errors import UserError
from fuyu_jax.generate import programs
from fuyu_jax.generate.chunks import ChunkMaker
from fuyu_jax.generate.pages import Pages
from fuyu_jax.generate.prompts import Prompt
from fuyu_jax.generate.session import Session
from fuyu_jax.generate.work import Work
from fuyu_jax.model.paged import PAGE
from fuyu_jax.parallel import hosts


class _Search:
    """One prompt's search. work: of the prompt, whose pages it takes over."""

    def __init__(
        self, work: Work, width: int, penalty: float | int, ends: Sequence[int], pool: Pages
    ):
        self.work = work
        self.width = width
        self._penalty = penalty
        self._ends = ends
        self._pool = pool
        used = -(-work.prompt.length // PAGE)
        pool.release(work.pages[used:])
        first = Work(work.prompt, work.shard, work.pages[:used], work.done)
        work.pages = []
        self.beams: list[Work] = [first]
        self.scores: list[float] = [0.0]
        self.finished: list[tuple[float, list[int]]] = []

    def advance(self, logprobs: np.ndarray, ids: np.ndarray) -> bool:
        """Takes one step's likeliest tokens, [beams, 2W]; whether the search is over."""
        sums = np.asarray(self.scores, np.float32)[:, None] + logprobs
        order = np.argsort(-sums, axis=None, kind="stable")[: 2 * self.width]
        length = len(self.beams[0].said) + 1
        last = length == self.work.prompt.max_new
        kept: list[Work] = []
        scores: list[float] = []
        for rank, at in enumerate(order.tolist()):
            parent, place = divmod(at, sums.shape[1])
            score, token = float(sums[parent, place]), int(ids[parent, place])
            if not np.isfinite(score):
                continue
            said = [*self.beams[parent].said, token]
            if token in self._ends or last:
                if rank < self.width:
                    self.finished.append((score / length**self._penalty, said))
            elif len(kept) < self.width:
                pages = self.beams[parent].pages
                self._pool.hold(pages)
                kept.append(Work(self.work.prompt, self.work.shard, list(pages), said=said))
                scores.append(score)
        self.drop()
        self.beams, self.scores = kept, scores
        self.finished = sorted(self.finished, key=lambda f: -f[0])[: self.width]
        if not kept:
            return True
        full = len(self.finished) == self.width
        return full and self.finished[-1][0] >= scores[0] / length**self._penalty

    def write_pages(self) -> list[tuple[int, int]]:
        """Gives each beam a page of its own to write its last token into; (from, to) of what is to
        be copied for that, a pair a beam."""
        pairs = []
        for beam in self.beams:
            index = (beam.prompt.length + len(beam.said) - 1) // PAGE
            pair = 0, 0
            if index == len(beam.pages):
                beam.pages += self._pool.take(1)
            elif self._pool.shared(beam.pages[index]):
                (own,) = self._pool.take(1)
                pair = beam.pages[index], own
                self._pool.release([beam.pages[index]])
                beam.pages[index] = own
            pairs.append(pair)
        return pairs

    def drop(self) -> None:
        """Gives all beams' pages back."""
        for beam in self.beams:
            self._pool.release(beam.pages)
        self.beams = []


def run_beams(
    session: Session,
    params: Any,
    prompts: Sequence[Prompt],
    width: int,
    length_penalty: float | int | int = 1.0,
) -> Iterator[Work]:
    """Answers prompts by beam search; each as it is finished, in any order.

    Args:
      session: whose cache is used; its rows are shared out among beams.
      params: of the model.
      prompts: to be answered.
      width: beams of a prompt.
      length_penalty: the sum of an answer's log-probabilities is divided by its length to this.

    Raises:
      UserError: a width that makes no sense.
    """
    if not 1 <= width <= 64:
        raise UserError(f"num_beams={width}: give 1 to 64")
    if 2 * width > session.config.vocab_size:
        raise UserError(f"num_beams={width}: more than half the vocabulary")
    if not prompts:
        return
    session.make_room(prompts, width)
    try:
        yield from _search(session, params, prompts, width, length_penalty)
    except BaseException:
        session.forget()
        raise


def _search(
    session: Session, params: Any, prompts: Sequence[Prompt], width: int, penalty: float | int
) -> Iterator[Work]:
    waiting = collections.deque(prompts)
    maker = ChunkMaker(session, prompts)
    each = max(session.rows // width, 1)
    slots: list[list[_Search | None]] = [[None] * each for _ in range(session.shards)]
    ready: list[collections.deque[Work]] = [collections.deque() for _ in slots]
    drawing, _ = session.drawing(None)

    def over(search: _Search) -> Work:
        search.drop()
        search.work.said = search.finished[0][1] if search.finished else []
        return search.work

    while waiting or maker.begun or any(ready) or any(any(row) for row in slots):
        for row, queue in zip(slots, ready, strict=True):
            for i, search in enumerate(row):
                if search is not None or not queue:
                    continue
                work = queue.popleft()
                pool = session.pools[work.shard]
                begun = _Search(work, width, penalty, session.words.ends, pool)
                assert work.top is not None
                if begun.advance(work.top[0][None], work.top[1][None]):
                    yield over(begun)
                else:
                    row[i] = begun
        free = [row.count(None) for row in slots]
        if (waiting or maker.begun) and any(free) and not any(ready):
            came, ran = session.prefill(params, maker, waiting, free, drawing, top=2 * width)
            for work in came:
                if work.error:
                    yield work
                else:
                    ready[work.shard].append(work)
            if came:
                continue
            if not ran and not any(any(row) for row in slots):
                raise RuntimeError("prompts wait, and nothing runs that would give them room")
        if not any(any(row) for row in slots):
            continue
        logprobs, ids = _step(session, params, slots, width)
        for shard, row in enumerate(slots):
            for i, search in enumerate(row):
                if search is None:
                    continue
                begin = (shard * each + i) * width
                here = slice(begin, begin + len(search.beams))
                session.usage.new_tokens += 1
                if search.advance(logprobs[here], ids[here]):
                    row[i] = None
                    yield over(search)


def _step(
    session: Session, params: Any, slots: Sequence[Sequence[_Search | None]], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """One step of all beams; the likeliest next tokens of each."""
    works: list[Work | None] = []
    pairs: list[tuple[int, int]] = []
    for row in slots:
        for search in row:
            beams = search.beams if search is not None else []
            pairs += search.write_pages() if search is not None else []
            works += [*beams, *([None] * (width - len(beams)))]
            pairs += [(0, 0)] * (width - len(beams))
    source, target = np.asarray(pairs, np.int32).T
    began = session.finish_prefill()
    assert session.cache is not None
    with session.calling() as compiling:
        session.cache, found = programs.beam_step(
            session.graph,
            params,
            session.cache,
            session.rows_of(works),
            session.row_arrays(np.ascontiguousarray(source)),
            session.row_arrays(np.ascontiguousarray(target)),
            words=session.words,
            top=2 * width,
        )
    likeliest = hosts.fetch(found[0]), hosts.fetch(found[1])
    session.usage.decode_seconds += time.perf_counter() - began - sum(compiling)
    return likeliest
