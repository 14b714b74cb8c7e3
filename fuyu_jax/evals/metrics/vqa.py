"""Accuracy against ten people's answers: VQAv2, OK-VQA, TextVQA.

An answer is worth min(matches / 3, 1), averaged over the sets that leave one person out. Two
variants differ in when texts are normalised: `vqa_official`, as the official script, only where the
people's answers differ; `vqa_normalised` always.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fuyu_jax.evals.metrics.bootstrap import Metric, Units, Verdict, by_example, over

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED = re.compile(r"\d,\d")
# The official script means to keep the period between digits, but its look-behind is misspelt, so
# that a period goes wherever no digit follows, and its flag stands where a count of 32 belongs.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32
_ARTICLES = frozenset({"a", "an", "the"})


def _words(text: str) -> list[str]:
    return text.split()


_COUNTING = _words("zero one two three four five six seven eight nine ten")
_NUMBERS = {word: str(n) for n, word in enumerate(_COUNTING)} | {"none": "0"}


def _contractions() -> dict[str, str]:
    """Forms that lost an apostrophe, each with its full form. Those in capitals ("Im") are left
    out: the script looks for them among lower-case words and never finds them."""
    negated = _words(
        "ai are ca could did does do had has have is might must need ought sha should was were wo "
        "would"
    )
    have = _words("could might must not should they we what where who would you")
    others = _words(
        "he'd he's how'd how'll how's it'd it'll ma'am o'clock somebody'll somebody's someone'd "
        "someone'll someone's something'd something'll that's there'd there're there's they'd "
        "they'll they're 'twas what'll what're what's when's where'd where's who'd who'll who's "
        "why'll why're why's y'all you'd you'll you're"
    )
    would_have = _words("he it she somebody someone something there they we who you")
    table = {}
    whole = [f"{s}n't" for s in negated] + [f"{s}'ve" for s in have] + others
    whole += [f"{s}n't've" for s in ("could", "had", "might", "should", "would")]
    whole += [f"{s}'d've" for s in would_have] + ["y'all'll", "y'all'd've", "'ow's'at"]
    for form in whole:
        for at, letter in enumerate(form):
            if letter == "'":
                table[form[:at] + form[at + 1 :]] = form
    # The one entry of the script that goes the other way.
    return table | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()


@lru_cache(maxsize=1 << 17)
def normalise(text: str) -> str:
    """Lower case, number words as digits, without punctuation and articles, contractions whole."""
    text = _plain(text)
    # A mark next to a space, or any mark in a text with a grouped number, goes without a gap.
    grouped = bool(_GROUPED.search(text))
    bare = text
    for mark in _MARKS:
        if mark in text:
            close = grouped or f"{mark} " in text or f" {mark}" in text
            bare = bare.replace(mark, "" if close else " ")
    bare = _PERIOD.sub("", bare, count=_PERIODS)
    words = (_NUMBERS.get(word, word) for word in bare.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, answers: Sequence[str], always: bool = False) -> float:
    """Mean over the leave-one-out sets of min(matches / 3, 1).

    Args:
      answer: the model's.
      answers: people's, ten in the data sets; fewer than four cannot give 1.
      always: normalise texts also where all people agree (`vqa_normalised`).
    """
    answer, answers = _plain(answer), [_plain(a) for a in answers]
    if always or len(set(answers)) > 1:
        answer, answers = normalise(answer), [normalise(a) for a in answers]
    same = answers.count(answer)
    left_in, left_out = min(same / 3, 1), min((same - 1) / 3, 1)
    return ((len(answers) - same) * left_in + same * left_out) / len(answers)


def judge(records: Sequence[Any], predictions: Sequence[str], main: str = "vqa_official") -> Units:
    """Both variants; `main` says which one is an example's score. An empty answer is a failure."""
    columns: dict[str, list[int | float]] = {"vqa_official": [], "vqa_normalised": []}
    verdicts = []
    for record, answer in zip(records, predictions, strict=True):
        columns["vqa_official"].append(vqa_accuracy(answer, record.answers))
        columns["vqa_normalised"].append(vqa_accuracy(answer, record.answers, always=True))
        verdicts.append(Verdict(columns[main][-1], normalise(answer), not answer.strip()))
    return by_example(records, verdicts, columns)


def metric(main: str = "vqa_official") -> Metric:
    names = sorted(("vqa_official", "vqa_normalised"), key=lambda name: name != main)
    return Metric(lambda r, p: judge(r, p, main), {name: over(name) for name in names})
