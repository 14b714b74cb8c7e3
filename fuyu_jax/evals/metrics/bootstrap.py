"""From what each example adds to a score to scores with standard errors.

Every score is a function of sums over units, the units being examples, or groups of examples where
the score counts groups. So one drawing of units gives all scores anew, and a resample costs a sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000
_DRAWN_AT_ONCE = 2_000_000  # unit indices

Sums = Mapping[str, np.ndarray]  # each [R], one value a resample
Statistic = Callable[[Sums], np.ndarray]
Values = Sequence[int | float] | np.ndarray


@dataclass(frozen=True)
class Verdict:
    """One example judged: its score (1 is best), what was read from the answer, and whether
    nothing could be read."""

    score: float
    parsed: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Units:
    """What is drawn anew: columns of numbers and, for each unit, its subset; verdicts by record."""

    columns: Mapping[str, np.ndarray]  # each [units]
    subsets: Sequence[str]
    verdicts: Sequence[Verdict]
    strata: Mapping[str, Sequence[str]] = field(default_factory=dict)  # other divisions, by name


@dataclass(frozen=True)
class Macro:
    """Mean (or sum) over strata of a statistic; the strata stay as they are, units within are
    drawn. `by`: "subset" or one of the units' strata; `only`: these strata, all if empty."""

    of: Statistic
    by: str = "subset"
    total: bool = False
    only: frozenset[str] = frozenset()


def over(part: str, whole: str = "n") -> Statistic:
    """The sum of one column over the sum of another; 0 where that is 0."""
    return lambda sums: quotient(sums[part], sums[whole])


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=np.asarray(b) != 0)


def by_example(
    records: Sequence[Any], verdicts: Sequence[Verdict], columns: Mapping[str, Values]
) -> Units:
    """Units that are the records themselves; a column "n" of ones is added."""
    filled = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    filled["n"] = np.ones(len(records))
    return Units(filled, [r.subset for r in records], verdicts)


def groups_of(records: Sequence[Any]) -> dict[str, list[int]]:
    """The places of each group's records, in order of first meeting."""
    groups: dict[str, list[int]] = {}
    for at, record in enumerate(records):
        groups.setdefault(record.group, []).append(at)
    return groups


def bootstrap(
    columns: Mapping[str, np.ndarray],
    statistics: Mapping[str, Statistic],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, tuple[float, float]]:
    """Value and standard error of each statistic, units drawn with replacement, by a seed."""
    sums = {name: np.asarray([column.sum()]) for name, column in columns.items()}
    values = {name: float(statistic(sums)[0]) for name, statistic in statistics.items()}
    drawn = _resampled(columns, seed, resamples)
    with np.errstate(invalid="ignore"):  # the spread of infinities is none
        errors = {name: np.std(statistic(drawn), ddof=1) for name, statistic in statistics.items()}
    return {name: (values[name], float(error)) for name, error in errors.items()}


def _resampled(columns: Mapping[str, np.ndarray], seed: int, resamples: int) -> Sums:
    matrix = np.stack(list(columns.values()), axis=1)
    n = len(matrix)
    rng = np.random.default_rng(seed)
    parts = []
    at_once = max(1, _DRAWN_AT_ONCE // n)
    for begin in range(0, resamples, at_once):
        rows = min(at_once, resamples - begin)
        drawn = rng.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        parts.append(counts.astype(np.float64) @ matrix)
    return dict(zip(columns, np.concatenate(parts).T, strict=True))


@dataclass(frozen=True)
class Metric:
    """Judges answers and sums them up: `metric(records, predictions)`.

    judge: makes units of records and what was answered to each.
    statistics: scores, also given for each subset; the first is the main one.
    macros: scores over subsets.
    """

    judge: Callable[[Sequence[Any], Sequence[Any]], Units]
    statistics: Mapping[str, Statistic]
    macros: Mapping[str, Macro] = field(default_factory=dict)

    def __call__(
        self, records: Sequence[Any], predictions: Sequence[Any], seed: int = 0
    ) -> dict[str, Any]:
        return self.summarise(records, self.judge(records, predictions), seed)

    def summarise(self, records: Sequence[Any], units: Units, seed: int = 0) -> dict[str, Any]:
        """`n`, `units`, `parse_failures`, `scores`, `stderr` and, where there are several subsets,
        the same `by_subset`. Without records, n is 0 and there are no scores."""
        if not len(records):
            return {"n": 0, "units": 0, "parse_failures": 0, "scores": {}, "stderr": {}}
        failed = [(r.subset, v.failed) for r, v in zip(records, units.verdicts, strict=True)]
        result = _report(bootstrap(units.columns, self.statistics, seed))
        for name, macro in self.macros.items():
            found = _macro(macro, units, seed)
            if found is not None:
                result["scores"][name], result["stderr"][name] = found
        whole = {
            "n": len(records),
            "units": len(units.subsets),
            "parse_failures": sum(f for _, f in failed),
            **result,
        }
        parts = _split(units.columns, units.subsets)
        if len(parts) > 1:
            whole["by_subset"] = {
                name: {
                    "n": sum(s == name for s, _ in failed),
                    "units": len(columns["n"]),
                    "parse_failures": sum(f for s, f in failed if s == name),
                    **_report(bootstrap(columns, self.statistics, seed)),
                }
                for name, columns in sorted(parts.items())
            }
        return whole


def _report(found: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float | None]]:
    """None for what is not finite, which JSON cannot say."""
    return {
        "scores": {name: _finite(value) for name, (value, _) in found.items()},
        "stderr": {name: _finite(error) for name, (_, error) in found.items()},
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _split(
    columns: Mapping[str, np.ndarray], labels: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    places: dict[str, list[int]] = {}
    for at, label in enumerate(labels):
        places.setdefault(label, []).append(at)
    return {
        label: {name: column[at] for name, column in columns.items()}
        for label, at in places.items()
    }


def _macro(macro: Macro, units: Units, seed: int) -> tuple[float, float] | None:
    """Value and standard error, strata being independent; None where no stratum is meant."""
    labels = units.subsets if macro.by == "subset" else units.strata[macro.by]
    parts = _split(units.columns, labels)
    found = [
        bootstrap(columns, {"it": macro.of}, seed)["it"]
        for label, columns in parts.items()
        if not macro.only or label in macro.only
    ]
    if not found:
        return None
    share = 1 if macro.total else len(found)
    values, errors = np.asarray(found).T
    return float(values.sum() / share), float(np.sqrt((errors**2).sum()) / share)
