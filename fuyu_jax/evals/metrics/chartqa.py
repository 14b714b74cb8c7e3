"""ChartQA: numbers within 5 %, other answers equal without case."""

import math
from collections.abc import Sequence
from typing import Any

from fuyu_jax.evals.metrics.bootstrap import Metric, Units, Verdict, by_example, over

TOLERANCE = 0.05


def number(text: str) -> float | None:
    """A number as Python reads it, a percentage divided by 100; None for "1,000" or "3 cm"."""
    percent = text.endswith("%")
    try:
        value = float(text.rstrip("%")) if percent else float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if percent else value


def relaxed(answer: str, expected: str) -> bool:
    """Within 5 % of the expected number, if both are numbers and it is not 0; else equal.

    "24%" is not 24, and years have 5 % of slack too.
    """
    found, target = number(answer), number(expected)
    if found is None or not target:
        return answer.lower() == expected.lower()
    return abs(found - target) / abs(target) <= TOLERANCE


def judge(records: Sequence[Any], predictions: Sequence[str]) -> Units:
    """The best over the answers. An empty answer is a failure."""
    columns: dict[str, list[int | float]] = {"relaxed": [], "exact": []}
    verdicts = []
    for record, given in zip(records, predictions, strict=True):
        answer = given.strip()
        right = any(relaxed(answer, expected.strip()) for expected in record.answers)
        columns["relaxed"].append(right)
        columns["exact"].append(any(answer == expected.strip() for expected in record.answers))
        verdicts.append(Verdict(float(right), answer, not answer))
    return by_example(records, verdicts, columns)


METRIC = Metric(judge, {"relaxed": over("relaxed"), "exact": over("exact")})
