"""Filling a chunk: which prompts, or parts of them, are run together, and the arrays for it."""

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fuyu_jax.batch import PackedBatch
from fuyu_jax.data.example import BadImageError
from fuyu_jax.generate.programs import ENDS, NOTHING, Chunk
from fuyu_jax.generate.prompts import Prompt
from fuyu_jax.generate.work import Work
from fuyu_jax.model.paged import PAGE, SPARE, Prior

if TYPE_CHECKING:
    from fuyu_jax.generate.session import Session

SMALL, LARGE = 256, 1024  # tokens of a chunk's row
_LOOKED_AT = 256  # waiting prompts, for one chunk


class Part(NamedTuple):
    """A work's `count` tokens in a chunk. end: its place among the row's ends, if the prompt ends
    here. scored: how many of its targets, from the row's `score_at`-th on."""

    work: Work
    count: int
    end: int | None
    score_at: int
    scored: int


class Made(NamedTuple):
    """A chunk, what is in it, and works that failed before they began."""

    chunk: Chunk
    parts: list[Part]
    failed: list[Work]


class _Filling:
    """The arrays of a chunk, a row a shard, as they are filled."""

    def __init__(self, rows: int, size: int, patches: int, channels: int, priors: int):
        def zeros(*shape: int) -> np.ndarray:
            return np.zeros((rows, *shape), np.int32)

        self.size = size
        self.batch = PackedBatch.empty(rows, size, patches, channels)
        self.page, self.offset = zeros(size), zeros(size)
        self.prior = Prior(zeros(priors + SPARE), zeros(size), zeros(size))
        self.ends, self.numbers = zeros(ENDS) + NOTHING, zeros(ENDS)
        self.scored, self.targets, self.count = zeros(size), zeros(size), zeros()
        self.at = [0] * rows
        self._patch_at = [0] * rows
        self._prior_at = [0] * rows
        self._segments = [0] * rows
        self._ends_at = [0] * rows
        self.parts: list[Part] = []

    def is_full(self, row: int) -> bool:
        return self.at[row] >= self.size or self._ends_at[row] >= ENDS

    def put(self, work: Work, whole_images: bool) -> bool:
        """Lays as much of a work into its shard's row as fits; whether that is anything."""
        row, prompt, start = work.shard, work.prompt, work.done
        stop = min(prompt.length, start + self.size - self.at[row])
        if whole_images and stop < prompt.length and (span := prompt.inside(stop)):
            stop = span.start
        pages = work.pages[: -(-start // PAGE)]
        room = self.prior.pages.shape[1] - SPARE - self._prior_at[row]
        if stop <= start or self.is_full(row) or len(pages) > room:
            return False
        at, count = self.at[row], stop - start
        here, tokens = slice(at, at + count), prompt.layout.tokens
        self._segments[row] += 1
        positions = np.arange(start, stop)
        self.batch.tokens[row, here] = tokens[start:stop]
        self.batch.segment_ids[row, here] = self._segments[row]
        self.batch.positions[row, here] = positions
        self.page[row, here] = np.asarray(work.pages)[positions // PAGE]
        self.offset[row, here] = positions % PAGE
        patches, coordinates = prompt.patches(start, stop)
        places = slice(self._patch_at[row], self._patch_at[row] + len(patches))
        self.batch.patches[row, places] = patches
        self.batch.patch_coords[row, places] = coordinates
        self._patch_at[row] = places.stop
        first = self._prior_at[row]
        self.prior.pages[row, first : first + len(pages)] = pages
        self.prior.first[row, here] = first
        self.prior.count[row, here] = start
        self._prior_at[row] += len(pages)
        end = None
        if stop == prompt.length and prompt.max_new:
            end = self._ends_at[row]
            self.ends[row, end] = at + count - 1
            self.numbers[row, end] = prompt.number
            self._ends_at[row] += 1
        score_at, scored = int(self.count[row]), 0
        if prompt.begin:
            # A token is predicted where the one before it is.
            wanted = np.arange(max(start, prompt.begin - 1), min(stop, prompt.length - 1))
            scored = len(wanted)
            self.scored[row, score_at : score_at + scored] = wanted - start + at
            self.targets[row, score_at : score_at + scored] = tokens[wanted + 1]
            self.count[row] += scored
        self.at[row] += count
        self.parts.append(Part(work, count, end, score_at, scored))
        return True

    def chunk(self) -> Chunk:
        prior = self.prior if self.prior.count.any() else None
        return Chunk(
            self.batch,
            self.page,
            self.offset,
            prior,
            self.ends,
            self.numbers,
            self.scored,
            self.targets,
            self.count,
        )


class ChunkMaker:
    """Fills chunks from prompts that wait.

    Args:
      session: whose pages are given out.
      prompts: all of a call: without images no room for patches is sent.
    """

    def __init__(self, session: "Session", prompts: Sequence[Prompt]):
        self._session = session
        self._images = any(p.spans for p in prompts)
        self._large = LARGE
        if session.whole_images:
            longest = max((s.stop - s.start for p in prompts for s in p.spans), default=1)
            self._large = max(LARGE, 1 << (longest - 1).bit_length())
        self._begun: list[Work] = []

    @property
    def begun(self) -> int:
        """Works of which a part has been run, or none for want of room."""
        return len(self._begun)

    def fill(self, waiting: collections.deque[Prompt], room: list[int]) -> Made:
        """Takes what fits: works that have begun, then prompts from the front of `waiting`.

        Args:
          waiting: prompts; those that are taken are taken out.
          room: answers of each shard that may be begun.
        """
        session = self._session
        size = self._size(waiting, sum(room))
        filling = _Filling(
            session.shards,
            size,
            size if self._images else 0,
            session.config.patch_channels,
            session.table_size * 4,
        )
        for work in self._begun:
            filling.put(work, session.whole_images)
        failed = self._admit(waiting, list(room), filling)
        laid = {part.work: part.count for part in filling.parts}
        self._begun = [
            w
            for w in dict.fromkeys([*self._begun, *laid])
            if w.done + laid.get(w, 0) < w.prompt.length
        ]
        return Made(filling.chunk(), filling.parts, failed)

    def _size(self, waiting: collections.deque[Prompt], room: int) -> int:
        """Tokens of a row: few where few wait."""
        total = sum(w.prompt.length - w.done for w in self._begun)
        for i, prompt in enumerate(waiting):
            if total > SMALL or i >= max(room, 1):
                break
            total += prompt.length
        return SMALL if total <= SMALL else self._large

    def _admit(
        self, waiting: collections.deque[Prompt], room: list[int], filling: _Filling
    ) -> list[Work]:
        """Begins prompts while there is room; those that must wait for what is in this chunk are
        passed over."""
        session = self._session
        failed: list[Work] = []
        passed: list[Prompt] = []
        looked = 0
        shards = range(session.shards)
        while waiting and looked < _LOOKED_AT:
            prompt = waiting.popleft()
            looked += 1
            open_ = [s for s in shards if not filling.is_full(s)]
            if prompt.max_new:
                open_ = [s for s in open_ if room[s] > 0]
            if not open_:
                passed.append(prompt)
                break
            try:
                # Where most of it is already, then where most room is.
                shard = max(open_, key=lambda s: (session.known(prompt, s), -filling.at[s]))
                work = session.admit(prompt, shard)
            except BadImageError as error:
                failed.append(Work(prompt, error=str(error)))
                continue
            if work is None:
                passed.append(prompt)
                if not session.waits_for_others(prompt, shard):
                    break  # for pages: the next would only take them from it
                continue
            room[shard] -= prompt.max_new > 0
            if not filling.put(work, session.whole_images):
                # It has its pages, and comes first in the next chunk.
                self._begun.append(work)
                break
        waiting.extendleft(reversed(passed))
        return failed
