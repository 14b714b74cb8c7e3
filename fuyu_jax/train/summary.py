"""The end of a run: evaluation of its splits, `summary.json`, and curves."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuyu_jax.evals import runner
from fuyu_jax.parallel import hosts
from fuyu_jax.train.measure import peak_device_bytes
from fuyu_jax.train.metrics import peak_rss_bytes, read_metrics

if TYPE_CHECKING:
    from fuyu_jax.train.loop import Trainer

# What can be told at a glance once the model sees; shape, words, boxes and captions are harder.
SEEING_FAMILIES = ("colour", "count", "relation", "existence")


def write_summary(trainer: "Trainer") -> dict[str, Any]:
    """Evaluates what splits there are and writes `summary.json`, `loss.png` and `accuracy.png`."""
    config, workdir = trainer.config, trainer.workdir
    summary: dict[str, Any] = {
        "name": config.name,
        "steps": config.num_steps,
        "parameters": trainer.parameters,
        "train_seconds": trainer.progress.seconds,
        "first_step_seconds": trainer.first_step_seconds,
        "token_padding": trainer.progress.padding,
        "bad_examples": len(trainer.data.bad.reasons),
        "oversize_examples": len(trainer.data.oversize),
        "resized_images": trainer.data.resized,
    }
    scores: dict[str, dict[str, Any]] = {}
    splits = trainer.sources.splits if config.eval.summary else ()
    for name, split, blind in (
        ("test", "test", False),
        ("compositional", "compositional", False),
        ("test_blind", "test", True),
    ):
        if split in splits:
            scores[name] = _evaluate(trainer, name, split, blind)
    if "test" in scores:
        test, blind = scores["test"], scores["test_blind"]
        summary |= {
            "exact_match": test["exact_match"],
            "correct": test["correct"],
            "by_family": _by_family(test, "exact_match"),
            "correct_by_family": _by_family(test, "correct"),
            "majority_by_family": _by_family(test, "majority"),
            "blind_exact_match": blind["exact_match"],
            "blind_by_family": _by_family(blind, "exact_match"),
            "majority": _mean(_by_family(test, "majority")),
        }
        if set(SEEING_FAMILIES) <= set(test["by_family"]):
            summary["seeing"] = _mean(summary["by_family"], SEEING_FAMILIES)
            summary["blind_seeing"] = _mean(summary["blind_by_family"], SEEING_FAMILIES)
            summary["majority_seeing"] = _mean(summary["majority_by_family"], SEEING_FAMILIES)
    if "compositional" in scores:
        summary["compositional"] = scores["compositional"]["exact_match"]
        summary["compositional_by_family"] = _by_family(scores["compositional"], "exact_match")
    summary["peak_rss_bytes"] = peak_rss_bytes()
    if held := peak_device_bytes():
        summary["peak_device_bytes"] = held
    if hosts.first():
        draw_curves(workdir)
        runner.write_whole(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"summary: {workdir / 'summary.json'}", flush=True)
    return summary


def _evaluate(trainer: "Trainer", name: str, split: str, blind: bool) -> dict[str, Any]:
    metrics = runner.run(
        trainer.engine,
        trainer.state.params,
        trainer.sources.open(split),
        trainer.workdir / "eval" / name,
        limit=trainer.config.eval.final_examples,
        blind=blind,
        about={"split": split, "step": trainer.config.num_steps},
    )
    hosts.say(f"\n{name}\n{runner.table(metrics)}")
    return metrics


def _by_family(metrics: dict[str, Any], key: str) -> dict[str, float]:
    return {family: m[key] for family, m in metrics["by_family"].items()}


def _mean(values: dict[str, float], names: tuple[str, ...] | None = None) -> float:
    names = names or tuple(values)
    return sum(values[n] for n in names) / len(names)


def draw_curves(workdir: Path) -> None:
    """`loss.png` and, where there was validation, `accuracy.png`, from `metrics.jsonl`."""
    from matplotlib.figure import Figure  # not pyplot: a notebook's backend is none of ours

    lines = read_metrics(workdir)
    losses = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    if losses:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, color="0.75", linewidth=0.8, label="loss of the step")
        axes.plot(steps, _smooth(values), color="C0", label="running mean")
        axes.set(xlabel="step", ylabel="cross-entropy of answer tokens", title="Training loss")
        axes.set_ylim(bottom=0)
        axes.legend()
        _save(figure, workdir / "loss.png")
    key = "validation/correct/"
    families = sorted({k for x in lines for k in x if k.startswith(key)})
    if families:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for n, family in enumerate(families):
            points = [(x["step"], x[family]) for x in lines if family in x]
            style = "-" if n < 10 else "--"
            axes.plot(*zip(*points, strict=True), style, marker=".", label=family.removeprefix(key))
        axes.set(xlabel="step", ylabel="correct answers", title="Validation by generation")
        axes.set_ylim(-0.02, 1.02)
        axes.legend(ncols=2, fontsize=8)
        _save(figure, workdir / "accuracy.png")


def _smooth(values: tuple[float, ...], window: int = 20) -> list[float]:
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0)
        out.append(total / min(i + 1, window))
    return out


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
