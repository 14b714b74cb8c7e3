"""The end of an evaluation: answers scored, and the files written in the data's order. No JAX."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fuyu_jax
from fuyu_jax.errors import UserError
from fuyu_jax.evals import requests
from fuyu_jax.evals.metrics.text import Counted
from fuyu_jax.evals.output import METRICS_FILE, PAGE_FILE, Line, TaskFiles, write_whole
from fuyu_jax.evals.page import PageTask, write_page
from fuyu_jax.evals.records import Record, Skipped
from fuyu_jax.evals.requests import Checkpoint, prompt_text
from fuyu_jax.evals.settings import Settings
from fuyu_jax.evals.tasks import Task, read_for, score_task


def _prediction(task: Task, line: Line) -> Any:
    """A kept answer as the metric takes it."""
    if task.ask == "generate":
        value = line["prediction"]
        return value if isinstance(value, str) else tuple(value)
    logprobs = tuple(float("-inf") if p is None else float(p) for p in line["logprobs"])
    return Counted(logprobs[0], line["tokens"]) if task.ask == "perplexity" else logprobs


_KEPT = ("prediction", "logprobs", "tokens", "finished", "new_tokens", "shots", "error")


def finish(
    settings: Settings,
    out: Path,
    tasks: Sequence[Task],
    files: Mapping[str, TaskFiles],
    records: Sequence[Record],
    answers: Mapping[str, Mapping[str, Line]],
    skipped: Sequence[Skipped],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Scores, and writes the files in the data's order."""
    found: dict[str, Any] = {}
    pages = []
    for task in tasks:
        lines = [answers[task.name][r.id] for r in records]
        kept = [{name: x[name] for name in _KEPT if name in x} for x in lines]
        errors = sum("error" in x for x in kept)
        asked = [_question(task, r) for r in records]
        if settings.predict_only:
            found[task.name] = {"task": task.name, "n": len(records), "errors": errors}
            files[task.name].finish([{**q, **k} for q, k in zip(asked, kept, strict=True)])
            continue
        predictions = [_prediction(task, line) for line in lines]
        scores, judged = score_task(task, records, predictions, settings.seed)
        found[task.name] = {**scores, "errors": errors}
        for sample in judged:
            sample.pop("prediction")  # as it was kept, which for likelihoods says more
        samples = [{**q, **k, **j} for q, k, j in zip(asked, kept, judged, strict=True)]
        files[task.name].finish(samples)
        pages.append(PageTask(task, found[task.name], records, samples))
    config = {
        k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()
    }
    metrics = {
        "fuyu_jax": fuyu_jax.__version__,
        "out": str(out),
        "config": config,
        **about,
        "records": len(records),
        **left_out(skipped),
        "tasks": found,
    }
    if pages:
        write_page(out / PAGE_FILE, pages, metrics)
    write_whole(out / METRICS_FILE, _pretty(metrics))
    return metrics


def _question(task: Task, record: Record) -> Line:
    return {
        "id": record.id,
        "subset": record.subset,
        "prompt": prompt_text(task.segments(record)),
        "images": [str(path) for path in record.images],
    }


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def left_out(skipped: Sequence[Skipped]) -> dict[str, Any]:
    return {"skipped": len(skipped), "skipped_lines": [dataclasses.asdict(s) for s in skipped]}


def default_out(settings: Settings, checkpoint: Checkpoint | None) -> Path:
    stem = settings.data.stem
    if checkpoint is None:
        return settings.data.parent / f"{stem}-eval"
    step = "" if checkpoint.step is None else f"-step_{checkpoint.step}"
    return checkpoint.home / "eval" / f"{stem}{step}"


def score_only(settings: Settings, tasks: Sequence[Task]) -> dict[str, Any]:
    """Scores what the data's lines hold, or with `resume` what was answered in `out`."""
    records, skipped = read_for(
        settings.data,
        tasks,
        predicted=not settings.resume,
        skip_bad=settings.skip_bad,
        image_dir=settings.image_dir,
        limit=settings.limit,
    )
    out = settings.out or default_out(settings, None)
    data = {"path": str(settings.data), "hash": requests.hash_file(settings.data)}
    files = {t.name: TaskFiles(out, t.name) for t in tasks}
    answers: dict[str, dict[str, Line]] = {}
    for task in tasks:
        file = files[task.name]
        if settings.resume:
            there = file.read_request()
            here = {**there, "data": data["hash"], "limit": settings.limit}
            file.check(here, resume=True)
            answers[task.name] = file.done()
            missing = [r.id for r in records if r.id not in answers[task.name]]
            if missing:
                raise UserError(
                    f'{out}: {len(missing)} of {len(records)} records of task "{task.name}" are '
                    f'not answered, the first "{missing[0]}"; go on without --score_only'
                )
        else:
            if file.request.exists():
                raise UserError(
                    f'{out} holds a model\'s answers to task "{task.name}"; give another --out, '
                    "or --resume to score those"
                )
            answers[task.name] = {r.id: _written(task, r) for r in records}
    about = {"checkpoint": None, "data": data}
    return finish(settings, out, tasks, files, records, answers, skipped, about)


def _written(task: Task, record: Record) -> Line:
    """What a record says was answered, as an answer is kept."""
    line: Line = {"id": record.id}
    if task.ask == "generate":
        given = record.prediction
        return line | {"prediction": given if isinstance(given, str) else list(given or ())}
    line["logprobs"] = [p if math.isfinite(p) else None for p in record.logprobs or ()]
    return line | ({"tokens": record.tokens} if task.ask == "perplexity" else {})
