"""Evaluation by generation: samples, metrics and a contact sheet."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuyu_jax.data.example import BadImageError, Example, Image, split_answer
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.sources.base import Source
from fuyu_jax.errors import UserError
from fuyu_jax.evals.judge import exact_match, is_correct, summarise
from fuyu_jax.evals.sheet import save_sheet
from fuyu_jax.generate.engine import Engine
from fuyu_jax.parallel import hosts
from fuyu_jax.tokenizer import Tokenizer

SAMPLES_FILE = "samples.jsonl"
METRICS_FILE = "metrics.json"
SHEET_FILE = "sheet.png"


def take(source: Source, limit: int) -> tuple[list[Example], list[str]]:
    """The first examples of a source (all of them if `limit` is 0), and what could not be read."""
    examples, bad = [], []
    for i in range(min(len(source), limit or len(source))):
        try:
            examples.append(source[i])
        except BadImageError as error:
            bad.append(f"{source.id(i)}: {error}")
    return examples, bad


def expressible(answer: str, tokenizer: Tokenizer, scale: float) -> str:
    """The answer as the tokenizer can say it: box coordinates are rounded to two pixels."""
    return tokenizer.decode(tokenizer.encode(answer, scale), scale)


def prompt_text(example: Example) -> str:
    """The prompt for people to read: `<image>` where an image stands, earlier answers on lines of
    their own after `> `."""
    parts = []
    for s in example.segments:
        if isinstance(s, Image):
            parts.append("<image>")
        else:
            parts.append(f"\n> {s.text}\n" if s.is_answer else s.text)
    return "".join(parts)


def evaluate(
    engine: Engine, params: Any, examples: Sequence[Example], *, blind: bool = False
) -> list[dict[str, Any]]:
    """One sample an example: its last answer is asked for, and judged.

    Raises:
      UserError: an example without an answer.
    """
    asked = [split_answer(e) for e in examples]
    answers = engine.answer(params, [prompt for prompt, _ in asked], blind=blind)
    samples = []
    for (prompt, expected), answer in zip(asked, answers, strict=True):
        family = str(prompt.info.get("family", "all"))
        scale = _last_scale(prompt, engine.policy)
        sample = {
            "id": prompt.id,
            "family": family,
            "prompt": prompt_text(prompt),
            "answer": answer.text,
            "expected": expected,
            "correct": not answer.error and is_correct(answer.text, expected, family),
            "exact_match": not answer.error
            and exact_match(answer.text, expressible(expected, engine.tokenizer, scale)),
            "finished": answer.finished,
        }
        if answer.error:
            sample["error"] = answer.error
        samples.append(sample)
    return samples


def _last_scale(prompt: Example, policy: LayoutPolicy) -> float:
    images = prompt.images
    return policy.grid(images[-1]).scale if images else 1.0


def run(
    engine: Engine,
    params: Any,
    source: Source,
    out: Path,
    *,
    limit: int = 0,
    blind: bool = False,
    about: dict[str, Any] | None = None,
    sheet_size: int = 40,
) -> dict[str, Any]:
    """Evaluates a source and writes `samples.jsonl`, `metrics.json` and `sheet.png` into `out`.

    Returns:
      The metrics.

    Raises:
      UserError: nothing to evaluate.
    """
    examples, bad = take(source, limit)
    if not examples:
        told = f"; the first: {bad[0]}" if bad else ""
        raise UserError(f"nothing to evaluate: none of {len(source)} examples can be read{told}")
    began = time.perf_counter()
    samples = evaluate(engine, params, examples, blind=blind)
    seconds = time.perf_counter() - began
    metrics = {
        **(about or {}),
        "blind": blind,
        "skipped": len(bad),
        "skipped_examples": bad[:20],
        "seconds": seconds,
        "samples_per_second": len(samples) / seconds,
        **summarise(samples),
    }
    if not hosts.first():  # it has the same, and writes it
        return metrics
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
    write_whole(out / SAMPLES_FILE, lines)
    save_sheet(out / SHEET_FILE, examples, samples, limit=sheet_size)
    write_whole(out / METRICS_FILE, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    return metrics


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def table(metrics: dict[str, Any]) -> str:
    """The metrics as a small text table."""
    rows = [("family", "n", "correct", "±", "exact", "majority")]
    groups = [("all", metrics), *metrics["by_family"].items()]
    for name, m in groups:
        rows.append(
            (
                name,
                str(m["n"]),
                f"{m['correct']:.3f}",
                f"{m['correct_se']:.3f}",
                f"{m['exact_match']:.3f}",
                f"{m['majority']:.3f}",
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    )
