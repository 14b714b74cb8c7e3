"""Is the language still there: perplexity of documents, and answers equal to the letter."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fuyu_jax.evals.judge import exact_match, is_correct
from fuyu_jax.evals.metrics.bootstrap import (
    Macro,
    Metric,
    Statistic,
    Sums,
    Units,
    Verdict,
    by_example,
    over,
)


class Window(NamedTuple):
    """Tokens begin..stop go through the model; those from `first` on are scored."""

    begin: int
    first: int
    stop: int


def rolling_windows(tokens: int, size: int, context: int = 1) -> Iterator[Window]:
    """Windows over a document such that each token is scored once.

    A token is scored by those before it in its window, so token 0 is scored only if something was
    put before it (a <s>); here it is never the first of a later window.

    Args:
      tokens: length of the document.
      size: tokens of a window at most, at least 2.
      context: how many earlier tokens a later window begins with, at least 1, less than `size`.
    """
    if not 1 <= context < size:
        raise ValueError(f"context {context} is not in 1..{size - 1}")
    scored = 0
    while scored < tokens:
        begin = max(scored - context, 0)
        stop = min(begin + size, tokens)
        yield Window(begin, scored, stop)
        scored = stop


class Counted(NamedTuple):
    """A document's log-probability and how many tokens it is the sum of."""

    logprob: float
    tokens: int


def words_in(text: str) -> int:
    """Pieces between white space; one at least."""
    return max(len(text.split()), 1)


def judge_perplexity(records: Sequence[Any], predictions: Sequence[Counted]) -> Units:
    """Sums of all documents. One whose log-probability is not finite, or that has no token, is a
    failure and left out of the sums; an example's score is its probability a token."""
    columns: dict[str, list[int | float]] = {k: [] for k in ("nll", "tokens", "words", "bytes")}
    verdicts = []
    for record, (logprob, tokens) in zip(records, predictions, strict=True):
        usable = math.isfinite(logprob) and tokens > 0
        text = record.answers[0]
        values = (-logprob, tokens, words_in(text), len(text.encode("utf-8", "surrogatepass")))
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value if usable else 0.0)
        chance = math.exp(min(logprob / tokens, 0.0)) if usable else 0.0
        verdicts.append(Verdict(chance, f"{logprob:.4f} over {tokens} tokens", not usable))
    return by_example(records, verdicts, columns)


def perplexity(unit: str) -> Statistic:
    """exp(negative log-likelihood / units); infinite where there is none."""

    def statistic(sums: Sums) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rate = sums["nll"] / sums[unit]
            return np.where(sums[unit] > 0, np.exp(rate), np.inf)

    return statistic


def bits_per_byte(sums: Sums) -> np.ndarray:
    return over("nll", "bytes")(sums) / math.log(2)


PERPLEXITY = Metric(
    judge_perplexity,
    {
        "perplexity": perplexity("tokens"),
        "word_perplexity": perplexity("words"),
        "byte_perplexity": perplexity("bytes"),
        "bits_per_byte": bits_per_byte,
    },
)


def judge_exact(records: Sequence[Any], predictions: Sequence[str]) -> Units:
    """Equal to one of the answers but for space at the ends; also without case."""
    columns: dict[str, list[int | float]] = {"exact": [], "without_case": []}
    verdicts = []
    for record, answer in zip(records, predictions, strict=True):
        same = any(exact_match(answer, a) for a in record.answers)
        low = any(exact_match(answer.lower(), a.lower()) for a in record.answers)
        columns["exact"].append(same)
        columns["without_case"].append(low)
        verdicts.append(Verdict(float(same), answer.strip(), not answer.strip()))
    return by_example(records, verdicts, columns)


EXACT = Metric(judge_exact, {"exact": over("exact"), "without_case": over("without_case")})


def judge_demo(records: Sequence[Any], predictions: Sequence[str]) -> Units:
    """The demo set's own rule by family (`subset`): a box by IoU, a caption by its facts."""
    columns: dict[str, list[int | float]] = {"right": [], "exact": []}
    verdicts = []
    for record, answer in zip(records, predictions, strict=True):
        expected = record.answers[0]
        right = is_correct(answer, expected, record.subset)
        columns["right"].append(right)
        columns["exact"].append(exact_match(answer, expected))
        verdicts.append(Verdict(float(right), answer.strip(), not answer.strip()))
    return by_example(records, verdicts, columns)


DEMO = Metric(
    judge_demo,
    {"right": over("right"), "exact": over("exact")},
    {"right_by_family": Macro(over("right"))},
)
