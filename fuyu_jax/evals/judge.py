"""Whether an answer is right. Pure Python: no JAX."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fuyu_jax.data.demo.wording import caption_facts

Number = int | float
Box = tuple[Number, Number, Number, Number]
_BOX = re.compile(r"<box>\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*</box>")


def parse_boxes(text: str) -> list[Box]:
    """All well-formed `<box>top, left, bottom, right</box>` of a text; the rest is passed over."""
    boxes = []
    for match in _BOX.finditer(text):
        try:
            top, left, bottom, right = (float(n) for n in match.groups())
        except ValueError:
            continue
        boxes.append((top, left, bottom, right))
    return boxes


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (top, left, bottom, right); 0 for empty ones."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    both = max(height, 0) * max(width, 0)
    area = sum(max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)) - both
    return both / area if area > 0 else 0.0


def exact_match(answer: str, expected: str) -> bool:
    """Equal but for white space at the ends."""
    return answer.strip() == expected.strip()


def is_correct(answer: str, expected: str, family: str = "") -> bool:
    """Right as far as a person would say.

    A box is right at IoU ≥ 0.5 with the expected one; a caption of the demo set when it names the
    same facts; anything else when it is equal.
    """
    boxes = parse_boxes(expected)
    if len(boxes) == 1 and exact_match(expected, f"<box>{_inside(expected)}</box>"):
        found = parse_boxes(answer)
        return len(found) == 1 and iou(found[0], boxes[0]) >= 0.5
    if family == "caption" and (facts := caption_facts(expected)):
        return caption_facts(answer) == facts
    return exact_match(answer, expected)


def _inside(text: str) -> str:
    return text.strip().removeprefix("<box>").removesuffix("</box>")


def mean_and_error(values: Sequence[bool] | Sequence[float]) -> tuple[float, float]:
    """Mean of zeros and ones and its standard error √(p(1-p)/n); (0, 0) for none."""
    if not values:
        return 0.0, 0.0
    p = sum(values) / len(values)
    return p, math.sqrt(p * (1 - p) / len(values))


def summarise(samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """n, exact match and correctness with standard errors, overall and by family."""
    samples = list(samples)
    families: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        families.setdefault(sample["family"], []).append(sample)
    return {
        **_scores(samples),
        "by_family": {name: _scores(group) for name, group in sorted(families.items())},
    }


def _scores(samples: list[dict[str, Any]]) -> dict[str, Any]:
    exact, exact_error = mean_and_error([s["exact_match"] for s in samples])
    right, right_error = mean_and_error([s["correct"] for s in samples])
    expected: dict[str, int] = {}
    for sample in samples:
        expected[sample["expected"]] = expected.get(sample["expected"], 0) + 1
    return {
        "n": len(samples),
        "exact_match": exact,
        "exact_match_se": exact_error,
        "correct": right,
        "correct_se": right_error,
        "majority": max(expected.values(), default=0) / max(len(samples), 1),
        "unfinished": sum(not s["finished"] for s in samples),
        "errors": sum(bool(s.get("error")) for s in samples),
    }
