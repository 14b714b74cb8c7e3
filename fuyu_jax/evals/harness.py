"""The loop of an evaluation: questions checked, asked, answers kept as they come, scored. No JAX.

What answers is an `Asker`: `asking.ModelAsker` over `fuyu_jax.load`, or anything else with its
methods.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fuyu_jax.errors import UserError
from fuyu_jax.evals import requests
from fuyu_jax.evals.finishing import default_out, finish, left_out, score_only
from fuyu_jax.evals.output import Line, TaskFiles
from fuyu_jax.evals.records import Record, Skipped
from fuyu_jax.evals.requests import (
    Checkpoint,
    Pictures,
    Question,
    make_question,
    request_hash,
)
from fuyu_jax.evals.settings import Settings
from fuyu_jax.evals.shots import Shots, shown_answer
from fuyu_jax.evals.tasks import Task, find_tasks, read_for
from fuyu_jax.evals.throughput import Clock

# Tokens of a document that go through the model at a time.
DOCUMENT_WINDOW = 2048
TELL_EVERY = 30.0  # seconds between lines about how far it is


@dataclass(frozen=True)
class Said:
    """What a model said: a text, or log-probabilities of continuations (None: not finite).

    tokens: of a document, those that were scored. new_tokens: of a text. finished: it ended by
    itself. error: why there is no answer.
    """

    text: str = ""
    logprobs: tuple[float | None, ...] = ()
    tokens: int = 0
    new_tokens: int = 0
    finished: bool = True
    error: str = ""


Keep = Callable[[Question, Said], None]


@runtime_checkable
class Asker(Protocol):
    """A model. Each method gets all questions of a task and calls `keep(question, said)` once for
    each, as it is answered, in any order.

    together: whether all hosts must ask the same at the same time.
    """

    together: bool

    def generate(self, questions: Sequence[Question], max_new_tokens: int, keep: Keep) -> None: ...

    def likelihoods(self, questions: Sequence[Question], keep: Keep) -> None: ...

    def documents(self, questions: Sequence[Question], window: int, keep: Keep) -> None: ...

    def usage(self) -> Mapping[str, int | float]:
        """Sums since it was made, of those it knows: see `throughput.Clock`."""
        ...


class Alone:
    """One host. Of several, `gather` gives every host's value; all must call it. Within `guard` an
    error of one ends all."""

    index = 0
    count = 1

    def __init__(self, settings: Settings) -> None:
        if settings.coordinator or settings.num_processes or settings.process_id:
            raise UserError("--coordinator: this model is asked by one process")

    def guard(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def gather(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True)
class Backend:
    """Where models come from. join: finds the other hosts; open: loads the checkpoint."""

    open: Callable[[Checkpoint, Settings], Asker]
    join: Callable[[Settings], Any] = Alone


def evaluate(settings: Settings, backend: Backend | None = None) -> dict[str, Any]:
    """Runs an evaluation and writes its files into `out`.

    Args:
      settings: what to do.
      backend: None only with `score_only`.

    Returns:
      What `metrics.json` holds.

    Raises:
      UserError: bad input, named before a model is loaded.
    """
    settings.check()
    tasks = find_tasks(settings.tasks)
    if settings.score_only:
        return score_only(settings, tasks)
    assert backend is not None and settings.checkpoint is not None
    checkpoint = requests.find_checkpoint(settings.checkpoint)
    asked = _prepare(settings, tasks, checkpoint)
    hosts = backend.join(settings)
    with hosts.guard():
        return _run(settings, tasks, checkpoint, asked, backend, hosts)


def _run(
    settings: Settings,
    tasks: Sequence[Task],
    checkpoint: Checkpoint,
    asked: "_Asked",
    backend: Backend,
    hosts: Any,
) -> dict[str, Any]:
    out = settings.out or default_out(settings, checkpoint)
    files = {t.name: TaskFiles(out, t.name, hosts.index, hosts.count) for t in tasks}
    _claim(files, asked, settings.resume, hosts)
    done = {name: f.done() for name, f in files.items()}
    counts = hosts.gather({name: len(d) for name, d in done.items()})  # and nobody writes before
    if any(c != counts[0] for c in counts):
        raise UserError(f"--out={out}: hosts see different files there; give a folder that all see")
    clock = Clock()
    asker: Asker | None = None
    for task in tasks:
        todo = [q for q in asked.questions[task.name] if q.id not in done[task.name]]
        if not todo:
            continue
        if asker is None:
            with clock.loading():
                asker = backend.open(checkpoint, settings)
        _ask(task, todo, files[task.name], asker, settings, hosts, clock)
    hosts.gather(None)  # all have written
    if hosts.index:
        hosts.gather(None)  # the first has scored
        return {}
    answers = {name: f.done() for name, f in files.items()}
    about = {
        "checkpoint": {
            "path": str(checkpoint.path),
            "step": checkpoint.step,
            "hash": checkpoint.hash,
        },
        "requests": {name: request_hash(r) for name, r in asked.request.items()},
        **asked.about,
        "throughput": clock.report(),
    }
    made = finish(settings, out, tasks, files, asked.records, answers, asked.skipped, about)
    hosts.gather(None)
    return made


@dataclass(frozen=True)
class _Asked:
    """All that was prepared before a model is loaded; `questions` and `request` by task."""

    records: list[Record]
    skipped: list[Skipped]
    questions: dict[str, list[Question]]
    request: dict[str, dict[str, Any]]
    about: dict[str, Any]


def _prepare(settings: Settings, tasks: Sequence[Task], checkpoint: Checkpoint) -> _Asked:
    """Reads, checks and makes all questions."""
    pictures = Pictures()
    options: dict[str, Any] = {
        "skip_bad": settings.skip_bad,
        "image_dir": settings.image_dir,
        "check": pictures.check,
    }
    records, skipped = read_for(settings.data, tasks, limit=settings.limit, **options)
    data = {"path": str(settings.data), "hash": requests.hash_file(settings.data)}
    about: dict[str, Any] = {"data": data}
    shots: Shots | None = None
    if settings.num_shots:
        shots = _open_shots(settings, tasks, pictures, options, about)
    questions: dict[str, list[Question]] = {}
    request: dict[str, dict[str, Any]] = {}
    for task in tasks:
        questions[task.name] = [
            make_question(
                task,
                record,
                [(s, shown_answer(task, s)) for s in shots.choose(record)] if shots else (),
                pictures,
            )
            for record in records
        ]
        request[task.name] = {
            "task": task.name,
            "data": data["hash"],
            "limit": settings.limit,
            "num_shots": settings.num_shots,
            **({"shots": about["shots"]["hash"], "seed": settings.seed} if shots else {}),
            "checkpoint": checkpoint.hash,
            "dtype": settings.dtype,
            **({"max_new_tokens": settings.max_new_tokens} if task.ask == "generate" else {}),
            **({"window": DOCUMENT_WINDOW} if task.ask == "perplexity" else {}),
            "questions": requests.asked_hash(questions[task.name], pictures),
        }
    return _Asked(records, skipped, questions, request, about)


def _open_shots(
    settings: Settings,
    tasks: Sequence[Task],
    pictures: Pictures,
    options: Mapping[str, Any],
    about: dict[str, Any],
) -> Shots:
    for task in tasks:
        if task.ask == "perplexity":
            raise UserError(f"--num_shots: task {task.name} reads documents and shows nothing")
    path = settings.shots
    assert path is not None
    path = path.expanduser()
    if path.resolve() == settings.data.expanduser().resolve():
        raise UserError(f"--shots={path}: it is the data itself; give another file")
    shown, bad = read_for(path, tasks, **options)
    for record in shown:
        if not record.answers and not record.boxes:
            raise UserError(f'{path}:{record.line}: a demonstration needs "answers"')
    about["shots"] = {
        "path": str(path),
        "hash": requests.hash_file(path),
        "records": len(shown),
        **left_out(bad),
    }
    return Shots(path, shown, settings.num_shots, settings.seed, pictures)


def _claim(files: Mapping[str, TaskFiles], asked: _Asked, resume: bool, hosts: Any) -> None:
    """The first host's word on whether the folder may be used is that of all."""
    told = ""
    if hosts.index == 0:
        try:
            for name, file in files.items():
                file.check(asked.request[name], resume)
            for name, file in files.items():
                file.claim(asked.request[name], resume)
        except UserError as error:
            told = str(error)
    told = hosts.gather(told)[0]
    if told:
        raise UserError(told)


def _ask(
    task: Task,
    todo: list[Question],
    files: TaskFiles,
    asker: Asker,
    settings: Settings,
    hosts: Any,
    clock: Clock,
) -> None:
    """Asks all that is left, the shortest first, and writes each answer as it comes.

    Raises:
      RuntimeError: the asker left questions out.
    """
    todo = sorted(todo, key=lambda q: (q.size, q.id))
    mine = {q.id for q in todo[hosts.index :: hosts.count]}
    if not asker.together:
        todo = [q for q in todo if q.id in mine]
    answered: set[str] = set()
    told = time.monotonic()

    def keep(question: Question, said: Said) -> None:
        nonlocal told
        if question.id in mine and question.id not in answered:
            files.append([_line(task, question, said)])
        answered.add(question.id)
        if hosts.index == 0 and time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            print(f"{task.name}: {len(answered)} of {len(todo)}", flush=True)

    try:
        with clock.asking(task.name, asker, len(todo)):
            if task.ask == "generate":
                asker.generate(todo, settings.max_new_tokens, keep)
            elif task.ask == "likelihood":
                asker.likelihoods(todo, keep)
            else:
                asker.documents(todo, DOCUMENT_WINDOW, keep)
    finally:
        files.close()
    if missing := [q.id for q in todo if q.id not in answered]:
        raise RuntimeError(f"task {task.name}: no answer to {len(missing)}, such as {missing[0]}")


def _line(task: Task, question: Question, said: Said) -> Line:
    """An answer as it is kept."""
    line: Line = {"id": question.id}
    if task.ask == "generate":
        line |= {"prediction": said.text, "finished": said.finished, "new_tokens": said.new_tokens}
    else:
        line["logprobs"] = list(said.logprobs) or [None] * len(question.continuations)
        if task.ask == "perplexity":
            line["tokens"] = said.tokens
    if question.shots:
        line["shots"] = list(question.shots)
    if said.error:
        line["error"] = said.error
    return line
