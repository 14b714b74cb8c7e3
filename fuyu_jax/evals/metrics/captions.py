"""Captions against several people's: BLEU-1..4, ROUGE-L, CIDEr-D. No Java.

CIDEr-D counts how seldom a word sequence is in *these* references: a score on a part of a set says
nothing about the whole.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fuyu_jax.errors import UserError
from fuyu_jax.evals.metrics.bootstrap import (
    Metric,
    Statistic,
    Sums,
    Units,
    Verdict,
    by_example,
    over,
)

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0  # CIDEr-D's tolerance of lengths
BETA = 1.2  # ROUGE-L's weight of recall
# What the usual scorer adds, so that a text without any match has a score.
_BLEU_MATCH, _BLEU_TOTAL = 1e-15, 1e-9
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")

Tokens = list[str]
Tokenizer = Callable[[Sequence[str]], list[Tokens]]


# --- Tokens ---


def regex_tokens(texts: Sequence[str]) -> list[Tokens]:
    """Lower-case words and numbers, with an ending after an apostrophe."""
    return [_WORD.findall(text.lower()) for text in texts]


def space_tokens(texts: Sequence[str]) -> list[Tokens]:
    """Texts that are tokens with spaces between already."""
    return [text.split() for text in texts]


def ptb_tokens(texts: Sequence[str]) -> list[Tokens]:
    """Those of the Penn Treebank tokenizer, as COCO's scorer has them; needs Java.

    Raises:
      UserError: pycocoevalcap or Java is not installed.
    """
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        raise UserError(
            "the PTB tokenizer needs pycocoevalcap; pip install it, or take the task caption"
        ) from None
    if not shutil.which("java"):
        raise UserError("the PTB tokenizer needs java; install it, or take the task caption")
    found = PTBTokenizer().tokenize({n: [{"caption": t}] for n, t in enumerate(texts)})
    return [found[n][0].split() for n in range(len(texts))]


# --- BLEU ---


def ngrams(tokens: Tokens, order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[n:] for n in range(order)), strict=False))


def bleu_counts(answer: Tokens, answers: Sequence[Tokens]) -> dict[str, int | float]:
    """Of one text: matches and n-grams of each order, its length and that of the closest answer
    (the shorter of two as close)."""
    counts: dict[str, int | float] = {"length": len(answer)}
    counts["closest"] = min((abs(len(a) - len(answer)), len(a)) for a in answers)[1]
    for order in ORDERS:
        allowed: Counter[tuple[str, ...]] = Counter()
        for reference in answers:
            allowed |= ngrams(reference, order)
        found = ngrams(answer, order)
        counts[f"match{order}"] = sum(min(n, allowed[gram]) for gram, n in found.items())
        counts[f"total{order}"] = max(len(answer) - order + 1, 0)
    return counts


def bleu(order: int) -> Statistic:
    """Corpus BLEU up to an order from sums of `bleu_counts`."""

    def statistic(sums: Sums) -> np.ndarray:
        product = 1.0
        for n in range(1, order + 1):
            share = (sums[f"match{n}"] + _BLEU_MATCH) / (sums[f"total{n}"] + _BLEU_TOTAL)
            product = product * share
        ratio = (sums["length"] + _BLEU_MATCH) / (sums["closest"] + _BLEU_TOTAL)
        return product ** (1 / order) * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)

    return statistic


# --- ROUGE-L ---


def longest_common(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence, a row of the table being the bits of a number:
    a zero stands where the length grows."""
    places: dict[str, int] = {}
    for at, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << at
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        same = row & places.get(token, 0)
        row = ((row + same) | (row - same)) & full
    return len(a) - row.bit_count()


def rouge_l(answer: Tokens, answers: Sequence[Tokens]) -> float:
    """F-measure of the best precision and the best recall of the longest common subsequence."""
    common = [(longest_common(reference, answer), len(reference)) for reference in answers]
    precision = max(n for n, _ in common) / max(len(answer), 1)
    recall = max(n / max(length, 1) for n, length in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


# --- CIDEr-D ---


class _Vector:
    """A text's n-grams weighted by how seldom they are, its norms by order, and its length."""

    def __init__(self, tokens: Tokens, weights: "_Weights"):
        self.weighted: list[dict[tuple[str, ...], float]] = []
        self.norms: list[float] = []
        for order in ORDERS:
            grams = {g: n * weights.of(g) for g, n in ngrams(tokens, order).items()}
            self.weighted.append(grams)
            self.norms.append(math.sqrt(sum(w * w for w in grams.values())))
        self.length = max(len(tokens) - 1, 0)  # the scorer counts pairs of words


class _Weights:
    """How seldom n-grams are among the references of all images: log(images / images with it)."""

    def __init__(self, references: Sequence[Sequence[Tokens]]):
        self.images = Counter[tuple[str, ...]]()
        for answers in references:
            self.images.update({g for a in answers for n in ORDERS for g in ngrams(a, n)})
        self.log_all = math.log(max(len(references), 1))

    def of(self, gram: tuple[str, ...]) -> float:
        return self.log_all - math.log(max(self.images.get(gram, 0), 1))


def cider_d(answers: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of each image's text: cosine of clipped n-grams, less where lengths differ, ×10.

    Args:
      answers: a text for each image.
      references: people's texts for each image; document frequencies come from them all.
    """
    weights = _Weights(references)
    scores = []
    for answer, people in zip(answers, references, strict=True):
        found = _Vector(answer, weights)
        orders = np.zeros(len(ORDERS))
        for reference in people:
            orders += _cosines(found, _Vector(reference, weights))
        scores.append(float(np.mean(orders)) / len(people) * 10.0)
    return scores


def _cosines(a: _Vector, b: _Vector) -> list[float]:
    off = a.length - b.length
    penalty = math.exp(-(off**2) / (2 * SIGMA**2))
    values = []
    for mine, theirs, norm, other in zip(a.weighted, b.weighted, a.norms, b.norms, strict=True):
        value = sum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs)
        values.append(value / (norm * other) * penalty if norm and other else 0.0)
    return values


# --- The task ---


def judge(
    records: Sequence[Any], predictions: Sequence[str], tokenizer: Tokenizer = regex_tokens
) -> Units:
    """All captions together; an example's score is its ROUGE-L. No word at all is a failure."""
    texts = [*predictions, *(a for r in records for a in r.answers)]
    tokens = tokenizer(texts)
    answers, rest = tokens[: len(records)], iter(tokens[len(records) :])
    references = [[next(rest) for _ in record.answers] for record in records]
    columns: dict[str, list[int | float]] = {"cider": cider_d(answers, references), "rouge": []}
    verdicts = []
    for answer, people in zip(answers, references, strict=True):
        for name, count in bleu_counts(answer, people).items():
            columns.setdefault(name, []).append(count)
        columns["rouge"].append(rouge_l(answer, people))
        verdicts.append(Verdict(columns["rouge"][-1], " ".join(answer), not answer))
    return by_example(records, verdicts, columns)


def metric(tokenizer: Tokenizer = regex_tokens) -> Metric:
    statistics = {"CIDEr": over("cider"), "ROUGE_L": over("rouge")}
    statistics |= {f"BLEU_{order}": bleu(order) for order in ORDERS}
    return Metric(lambda records, given: judge(records, given, tokenizer), statistics)
