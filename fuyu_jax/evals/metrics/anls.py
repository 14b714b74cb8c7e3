"""Average normalised Levenshtein similarity: DocVQA, InfographicVQA, ST-VQA.

1 - (edit distance / length of the longer text), the best over the answers, and 0 under a half. Two
variants: `anls` keeps exactly a half, as the script of the Robust Reading Competition does;
`anls_strict` drops it, as the papers' formula does.
"""

from collections.abc import Sequence
from typing import Any

from fuyu_jax.evals.metrics.bootstrap import Metric, Units, Verdict, by_example, over

THRESHOLD = 0.5


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, by Myers's bit vectors: a column of the table is two integers.

    `up` and `down` have a bit for every letter of `a`: where the distance grows or shrinks by one
    from the letter before.
    """
    if not a or not b:
        return len(a) + len(b)
    places: dict[str, int] = {}
    for at, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << at
    full = (1 << len(a)) - 1
    last = 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)
    for letter in b:
        same = places.get(letter, 0)
        zero = ((((same & up) + up) ^ up) | same | down) & full
        right_up = (down | ~(zero | up)) & full
        right_down = up & zero
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = (right_up << 1 | 1) & full
        right_down = right_down << 1 & full
        up = (right_down | ~(zero | right_up)) & full
        down = right_up & zero
    return distance


def similarity(answer: str, expected: str) -> float:
    """1 - normalised edit distance, without case and without regard to how much space there is."""
    a, b = (" ".join(text.lower().split()) for text in (answer, expected))
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


def anls(answer: str, answers: Sequence[str], strict: bool = False) -> float:
    """The best similarity over the answers; 0 under a half, and, if strict, at a half."""
    best = max(similarity(answer, expected) for expected in answers)
    return best if best > THRESHOLD or (best == THRESHOLD and not strict) else 0.0


def judge(records: Sequence[Any], predictions: Sequence[str]) -> Units:
    """Both variants. An empty answer is a failure."""
    columns: dict[str, list[int | float]] = {"anls": [], "anls_strict": []}
    verdicts = []
    for record, answer in zip(records, predictions, strict=True):
        columns["anls"].append(anls(answer, record.answers))
        columns["anls_strict"].append(anls(answer, record.answers, strict=True))
        verdicts.append(Verdict(columns["anls"][-1], answer.strip(), not answer.strip()))
    return by_example(records, verdicts, columns)


METRIC = Metric(judge, {"anls": over("anls"), "anls_strict": over("anls_strict")})
