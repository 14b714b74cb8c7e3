"""`eval.py`: its flags, and which of the two ways of evaluating they mean."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuyu_jax import cli
from fuyu_jax.errors import UserError
from fuyu_jax.evals.harness import Backend, evaluate
from fuyu_jax.evals.output import METRICS_FILE
from fuyu_jax.evals.settings import Settings
from fuyu_jax.evals.tasks import TASKS

# Flags of `Settings`: what each is, and what its value looks like. Those without a value are
# switches.
_HELP = {
    "tasks": ("NAMES", f"with commas between them: {', '.join(TASKS)}"),
    "data": ("FILE", "JSON Lines with the questions; see docs/evaluation.md"),
    "num_shots": ("N", "demonstrations before each question (0)"),
    "shots": ("FILE", "JSON Lines that demonstrations are drawn from"),
    "mesh": ("AXES", "devices, such as data=2,fsdp=-1"),
    "dtype": ("DTYPE", "float32 or bfloat16 (float32)"),
    "seed": ("N", "of demonstrations and standard errors (0)"),
    "image_dir": ("DIR", "where image paths begin (the file's folder)"),
    "skip_bad": ("", "leave bad lines out, and list them"),
    "resume": ("", "go on with the answers in --out"),
    "predict_only": ("", "answers alone, no scores"),
    "coordinator": ("HOST:PORT", "several hosts: of process 0"),
    "num_processes": ("N", "several hosts: how many processes"),
    "process_id": ("I", "several hosts: which of them, from 0"),
    "score_only": ("", "score answers that are in the data (or, with --resume, in --out)"),
}
_BOTH = ("checkpoint", "out", "limit", "batch_size", "max_new_tokens")


def make_parser(description: str) -> argparse.ArgumentParser:
    """All flags; what is not given is None."""
    flags = cli.parser(description)
    flags.add_argument("--checkpoint", help="a work folder, one of its checkpoints, or a model's")
    flags.add_argument("--out", metavar="DIR", help="where to write; default: by the checkpoint")
    flags.add_argument("--limit", type=int, metavar="N", help="questions at most; 0: all")
    flags.add_argument("--batch_size", type=int, metavar="N", help="default: 16; the config's")
    flags.add_argument("--max_new_tokens", type=int, metavar="N", help="default: 64; the config's")
    split = flags.add_argument_group("a split of the run's own data")
    split.add_argument("--split", help="default: test")
    split.add_argument("--blind", action="store_true", default=None, help="zero all patches")
    tasks = flags.add_argument_group("tasks on a file of questions")
    types = dict.fromkeys(("num_shots", "seed", "num_processes", "process_id"), int)
    for name, (value, told) in _HELP.items():
        if value:
            tasks.add_argument(
                f"--{name}", metavar=value, help=told, type=types.get(name, str), default=None
            )
        else:
            tasks.add_argument(f"--{name}", action="store_true", default=None, help=told)
    return flags


def run(description: str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluates as the flags say, and prints the scores.

    Raises:
      UserError: bad input.
    """
    args, overrides = cli.parse(make_parser(description), argv)
    given = {k: v for k, v in vars(args).items() if v not in (None, "")}
    if not any(name in given for name in _HELP):
        return _split(given, overrides)
    for name in ("split", "blind"):
        if name in given:
            raise UserError(f"--{name} is for a run's own data; leave it out with --tasks")
    if overrides:
        raise UserError(f"--config.{overrides[0]} is for a run's own data; leave it out here")
    for name in ("tasks", "data"):
        if not given.get(name):
            raise UserError(f"give --{name}={_HELP[name][0]}; see docs/evaluation.md")
    if "shots" in given and "num_shots" not in given:
        raise UserError("--shots: give --num_shots too, such as 4")
    paths = ("data", "checkpoint", "out", "shots", "image_dir")
    settings = Settings(**{k: Path(v).expanduser() if k in paths else v for k, v in given.items()})
    return run_tasks(settings)


def run_tasks(settings: Settings) -> dict[str, Any]:
    """Evaluates, and prints the scores. JAX is imported only where a model is asked."""
    settings.check()
    metrics = evaluate(settings, None if settings.score_only else _lazy())
    if metrics:
        told = [table(metrics["tasks"])]
        if metrics["skipped"]:
            told.append(f"{metrics['skipped']} bad lines left out; {METRICS_FILE} lists them")
        print("\n".join([*told, metrics["out"]]), flush=True)
    return metrics


def _lazy() -> Backend:
    """Models of `asking`, which imports JAX: when the input has been found good."""

    def asking() -> Any:
        from fuyu_jax.evals import asking

        return asking

    return Backend(
        lambda checkpoint, settings: asking().open_model(checkpoint, settings),
        lambda settings: asking().Hosts(settings),
    )


def _split(given: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    if "checkpoint" not in given:
        raise UserError("give --checkpoint=FOLDER (see --help)")
    from fuyu_jax.evals.checkpointed import evaluate_checkpoint

    return evaluate_checkpoint(
        Path(given["checkpoint"]),
        given.get("split", "test"),
        out=Path(given["out"]) if "out" in given else None,
        limit=given.get("limit", 0),
        batch_size=given.get("batch_size", 0),
        max_new_tokens=given.get("max_new_tokens", 0),
        blind=bool(given.get("blind")),
        overrides=overrides,
    )


def table(tasks: dict[str, Any]) -> str:
    """Every task's scores as lines of text."""
    rows = [("task", "n", "score", "", "±", "parse failures")]
    for name, found in tasks.items():
        if "scores" not in found:
            rows.append((name, str(found["n"]), "not scored", "", "", ""))
            continue
        for at, (score, value) in enumerate(found["scores"].items()):
            error = found["stderr"].get(score)
            rows.append(
                (
                    "" if at else name,
                    "" if at else str(found["n"]),
                    score,
                    "–" if value is None else f"{value:.4f}",
                    "" if error is None else f"{error:.4f}",
                    "" if at else str(found["parse_failures"]),
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (0, 2)
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


assert set(_HELP) | set(_BOTH) == {f.name for f in dataclasses.fields(Settings)}
