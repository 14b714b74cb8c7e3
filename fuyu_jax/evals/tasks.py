"""The tasks: what each needs of a record, how it is asked, and what its answers are worth.

No JAX: questions are read and checked, and answers that are there already are scored, without it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any

from fuyu_jax.errors import UserError, nearest
from fuyu_jax.evals import forms
from fuyu_jax.evals.forms import Form
from fuyu_jax.evals.metrics import (
    anls,
    captions,
    chartqa,
    choice,
    grounding,
    pairs,
    text,
    vqa,
    yesno,
)
from fuyu_jax.evals.metrics.bootstrap import Metric, Units
from fuyu_jax.evals.records import Record, Skipped, read_records


@dataclass(frozen=True)
class Task:
    """A named way to ask and to score.

    form: what a record needs; its `kind` tells what is given to the metric.
    metric: its first score is the main one.
    instruction: said behind the question, in a line of its own.
    lists_choices: whether the choices stand behind the question, "A. …" a line.
    by_letter: by likelihood, whether the continuations are the choices' letters, not their words.
    """

    name: str
    about: str
    form: Form
    metric: Metric
    instruction: str = ""
    lists_choices: bool = False
    by_letter: bool = False

    @property
    def main(self) -> str:
        """The score that is named first."""
        return next(iter(self.metric.statistics))

    @property
    def ask(self) -> str:
        """How a model is asked: "generate"; "likelihood" of continuations; "perplexity"."""
        kinds = {"choices": "likelihood", "document": "perplexity"}
        return kinds.get(self.form.kind, "generate")

    def segments(self, record: Record) -> list[str | Path]:
        """What is asked: images and texts in order, with choices and instruction behind."""
        extra = []
        if self.lists_choices:
            extra += [f"{LETTERS[n]}. {c}" for n, c in enumerate(record.choices)]
        if self.instruction:
            extra.append(self.instruction)
        parts = list(record.segments)
        if not extra:
            return parts
        if parts and isinstance(parts[-1], str):
            extra.insert(0, parts.pop().rstrip("\n"))
        end = "\n" if self.ask == "generate" else ""  # a continuation brings its own space
        return [*parts, "\n".join(extra) + end]

    def continuations(self, record: Record) -> list[str]:
        """Texts whose log-probabilities are wanted, in order. The space before a choice belongs to
        it; a document stands as it is."""
        if self.form.kind == "document":
            return [record.answers[0]]
        if self.form.kind != "choices":
            raise ValueError(f"task {self.name} asks for no likelihoods")
        words = LETTERS[: len(record.choices)] if self.by_letter else record.choices
        return [f" {word}" for word in words]

    def judge(self, records: Sequence[Record], predictions: Sequence[Any]) -> Units:
        """Verdicts on answers, one a record, and what they add to the scores."""
        return self.metric.judge(self._grouped(records), predictions)

    def score(
        self, records: Sequence[Record], predictions: Sequence[Any], seed: int = 0
    ) -> dict[str, Any]:
        """`n`, `units`, `parse_failures`, `scores`, `stderr`, `by_subset`.

        Args:
          records: of this task's form.
          predictions: one a record: a text; for boxes and points also numbers; a log-probability
            for each choice; for a document its `Counted`.
          seed: of the bootstrap.
        """
        return self.metric(self._grouped(records), predictions, seed)

    def _grouped(self, records: Sequence[Record]) -> list[Record]:
        return [dataclasses.replace(r, group=self.form.group(r) or r.group) for r in records]


_SHORT = "Answer with a word or a short phrase."
_YES_NO = "Answer yes or no."
_LETTER = "Answer with the letter of the right choice."
_CAPTION = "Describe the image in one sentence."
_BOX = "Give its box as <box>top, left, bottom, right</box>."
_POINT = "Give a point on it as <point>x, y</point>."


def _tasks() -> list[Task]:
    docvqa = Task("docvqa", "documents: ANLS", forms.SHORT_ANSWERS, anls.METRIC, _SHORT)
    caption = Task(
        "caption",
        "captions: CIDEr-D, ROUGE-L, BLEU; regex tokens",
        forms.SHORT_ANSWERS,
        captions.metric(),
        _CAPTION,
    )
    return [
        Task("vqav2", "ten people's answers", forms.PEOPLE, vqa.metric(), _SHORT),
        *(
            Task(
                name, f"ten people's answers, {name} first", forms.PEOPLE, vqa.metric(name), _SHORT
            )
            for name in ("vqa_official", "vqa_normalised")
        ),
        Task(
            "okvqa", "ten people's answers, outside knowledge", forms.PEOPLE, vqa.metric(), _SHORT
        ),
        Task(
            "textvqa",
            "ten people's answers about text in pictures",
            forms.PEOPLE,
            vqa.metric("vqa_normalised"),
            _SHORT,
        ),
        docvqa,
        dataclasses.replace(docvqa, name="infovqa", about="infographics: ANLS"),
        dataclasses.replace(docvqa, name="anls", about="any short answers: ANLS"),
        Task("chartqa", "charts: within 5 %", forms.SHORT_ANSWERS, chartqa.METRIC, _SHORT),
        caption,
        dataclasses.replace(
            caption,
            name="caption_ptb",
            about="the same with the Penn Treebank tokenizer (pycocoevalcap and Java)",
            metric=captions.metric(captions.ptb_tokens),
        ),
        Task("pope", "is a thing in the picture", forms.YES_NO, yesno.POPE, _YES_NO),
        Task("mme", "two questions an image, yes or no", forms.IMAGE_PAIRS, yesno.MME, _YES_NO),
        Task(
            "mmbench",
            "right in every rotation of the choices",
            forms.ROTATIONS,
            choice.MMBENCH,
            _LETTER,
            lists_choices=True,
        ),
        Task(
            "mmmu",
            "exam questions, by choice or open",
            forms.LETTERED_OR_OPEN,
            choice.MMMU,
            lists_choices=True,
        ),
        Task(
            "scienceqa",
            "school science, by choice",
            forms.LETTERED,
            choice.SCIENCEQA,
            _LETTER,
            lists_choices=True,
        ),
        Task("multiple_choice", "the likeliest choice", forms.CHOICES, choice.LIKELIHOOD),
        Task(
            "mmlu",
            "the likeliest letter, choices being listed",
            forms.LETTER_CHOICES,
            choice.MMLU,
            "Answer:",
            lists_choices=True,
            by_letter=True,
        ),
        Task("classification", "the likeliest name", forms.CHOICES, choice.CLASSIFICATION),
        Task("winoground", "two images, two captions", forms.CAPTION_PAIRS, pairs.METRIC),
        Task("refcoco", "box at IoU ≥ 0.5", forms.BOXES, grounding.REFCOCO, _BOX),
        Task("pointing", "point inside the box", forms.BOXES, grounding.POINTING, _POINT),
        Task("perplexity", "documents", forms.DOCUMENT, text.PERPLEXITY),
        Task("exact_match", "equal to an answer", forms.SHORT_ANSWERS, text.EXACT),
        Task("demo", "the demo set, by family", forms.DEMO, text.DEMO),
        Task(
            "demo_compositional",
            "the demo set's families that combine colour and shape anew",
            forms.DEMO_COMPOSITIONAL,
            text.DEMO,
        ),
    ]


TASKS: dict[str, Task] = {task.name: task for task in _tasks()}


def find_tasks(names: str | Iterable[str]) -> list[Task]:
    """The tasks of names, or of a text with commas between them; each once.

    Raises:
      UserError: an unknown one, with the nearest; none.
    """
    given = names.split(",") if isinstance(names, str) else names
    wanted = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    if not wanted:
        raise UserError(f"no task given{nearest('', TASKS)}")
    for name in wanted:
        if name not in TASKS:
            raise UserError(f'unknown task "{name}"{nearest(name, TASKS)}')
    return [TASKS[name] for name in wanted]


def read_for(
    path: str | Path, tasks: Sequence[Task], **options: Any
) -> tuple[list[Record], list[Skipped]]:
    """Records that fit all the tasks. Options and errors: see `records.read_records`."""
    return read_records(path, {task.name: task.form for task in tasks}, **options)


@dataclass(frozen=True)
class Scored:
    """Scores of each task, its samples one by one, and the lines that were left out."""

    metrics: Mapping[str, dict[str, Any]]
    samples: Mapping[str, list[dict[str, Any]]]
    skipped: Sequence[Skipped]


def score_file(
    path: str | Path,
    tasks: str | Sequence[str],
    *,
    skip_bad: bool = False,
    image_dir: str | Path | None = None,
    limit: int = 0,
    seed: int = 0,
) -> Scored:
    """Scores a file whose lines hold what was answered.

    Args:
      path: JSON Lines; see `records`.
      tasks: names; the lines must be of the form of each.
      skip_bad: leave bad lines out and list them.
      image_dir: where image paths begin.
      limit: records at most; 0: all.
      seed: of the bootstrap.

    Raises:
      UserError: an unknown task, or a bad line.
    """
    found = find_tasks(tasks)
    records, skipped = read_for(
        path, found, predicted=True, skip_bad=skip_bad, image_dir=image_dir, limit=limit
    )
    metrics, samples = {}, {}
    for task in found:
        predictions = [task.form.prediction(r) for r in records]
        metrics[task.name], samples[task.name] = score_task(task, records, predictions, seed)
    return Scored(metrics, samples, skipped)


def score_task(
    task: Task, records: Sequence[Record], predictions: Sequence[Any], seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores and samples of one task: each judged once."""
    units = task.judge(records, predictions)
    samples = [
        {
            "id": record.id,
            "subset": record.subset,
            "prediction": prediction if isinstance(prediction, str) else list(prediction),
            "parsed": verdict.parsed,
            "expected": _expected(record),
            "score": verdict.score,
            "parse_failed": verdict.failed,
        }
        for record, prediction, verdict in zip(records, predictions, units.verdicts, strict=True)
    ]
    scores = {"task": task.name, "main": task.main, **task.metric.summarise(records, units, seed)}
    return scores, samples


def _expected(record: Record) -> list[Any]:
    """The right choice's words, the boxes, or the answers."""
    if record.choices:
        return [record.choices[record.target]]
    return [list(box) for box in record.boxes] or list(record.answers)
