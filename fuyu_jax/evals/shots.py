"""Few-shot demonstrations: which records of another file are shown before a question.

They are drawn for each question by a seed and its id, so that the order of the file and the batch
change nothing. What holds the question's image, or asks the same without an image, is never shown.
"""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase as LETTERS

from fuyu_jax.errors import UserError
from fuyu_jax.evals.metrics import grounding
from fuyu_jax.evals.records import Record
from fuyu_jax.evals.requests import Pictures
from fuyu_jax.evals.tasks import Task


def shown_answer(task: Task, record: Record) -> str:
    """A demonstration's right answer as a model should give it.

    The choice by its words, or by its letter where the task asks so; a box or point in its marks;
    of several people's answers the commonest.
    """
    if record.choices:
        by_letter = task.by_letter or task.lists_choices
        return LETTERS[record.target] if by_letter else record.choices[record.target]
    if record.boxes and task.form.kind == "place":
        top, left, bottom, right = record.boxes[0]
        if task.metric is grounding.POINTING:
            return f"<point>{(left + right) / 2:g}, {(top + bottom) / 2:g}</point>"
        return f"<box>{top:g}, {left:g}, {bottom:g}, {right:g}</box>"
    return Counter(record.answers).most_common(1)[0][0]


class Shots:
    """Draws demonstrations.

    Args:
      file: where they are from, for messages.
      records: what may be shown.
      count: for each question.
      seed: of the draw.
      pictures: to know an image by its contents.
    """

    def __init__(
        self, file: Path, records: Sequence[Record], count: int, seed: int, pictures: Pictures
    ):
        self._file = file
        self._records = records
        self._count = count
        self._seed = seed
        self._pictures = pictures
        self._holders: dict[object, set[int]] = {}
        for at, record in enumerate(records):
            for mark in self._marks(record):
                self._holders.setdefault(mark, set()).add(at)

    def _marks(self, record: Record) -> list[object]:
        """What a record must not share with a question."""
        if not record.images:
            return [record.segments]
        paths = [("path", path.resolve()) for path in record.images]
        return [*paths, *(("contents", self._pictures.digest(path)) for path in record.images)]

    def choose(self, record: Record) -> list[Record]:
        """The demonstrations of a question, in order.

        Raises:
          UserError: there are not enough that do not hold its image.
        """
        barred: set[int] = set()
        for mark in self._marks(record):
            barred |= self._holders.get(mark, set())
        free: Sequence[int] = range(len(self._records))
        if barred:
            free = [at for at in free if at not in barred]
        if len(free) < self._count:
            held = f"; {len(barred)} of them hold its image or question" if barred else ""
            raise UserError(
                f"{self._file}: {self._count} shots are asked for, and for record "
                f'"{record.id}" (line {record.line}) there are {len(free)} of '
                f"{len(self._records)}{held}; give more, or a smaller --num_shots"
            )
        draw = random.Random(f"{self._seed}:{record.id}")
        return [self._records[at] for at in draw.sample(free, self._count)]
