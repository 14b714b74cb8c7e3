"""One of several: answers in words (MMBench, MMMU, ScienceQA) and by likelihood.

An answer in which no choice can be read is wrong and counted as a failure; nothing is guessed.
"""

import math
import re
from collections.abc import Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

import numpy as np

from fuyu_jax.evals.metrics.bootstrap import (
    Macro,
    Metric,
    Units,
    Verdict,
    by_example,
    groups_of,
    over,
)
from fuyu_jax.evals.metrics.open_answer import open_right

# --- Which letter an answer means ---

_ANSWER_IS = re.compile(r"The answer is ([A-Z])\.")
_LEADING = re.compile(r"\(?([A-Z])(?:\)|[.:,]|\s*$)")


def mmmu_letter(text: str, choices: Sequence[str]) -> str:
    """The choice that MMMU's rules read: "(B)", else a lone "B", else a choice's words in an answer
    of more than five words; where several stand, the last one. "" for none."""
    letters = LETTERS[: len(choices)]
    text = f" {text.strip(_ENDS)} "
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in letters}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    if len(text.split()) > 5:
        low = text.lower()
        places = {c: low.rfind(words.lower()) for c, words in zip(letters, choices, strict=True)}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    return ""


_ENDS = ",.!?;:'"


def scienceqa_letter(text: str, choices: Sequence[str]) -> str:
    """A bare letter, a letter with ". " behind it, or one "The answer is X."; "" for none."""
    letters = LETTERS[: len(choices)]
    text = text.strip()
    if len(text) == 1 or text[1:3] == ". ":
        found = [text[0]] if text else []
    else:
        found = _ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 and found[0] in letters else ""


def leading_letter(text: str, choices: Sequence[str]) -> str:
    """A letter at the start ("B", "(B)", "B. …"), or the words of just one choice; "" for none."""
    text = text.strip()
    match = _LEADING.match(text)
    if match and match[1] in LETTERS[: len(choices)]:
        return match[1]
    low = [words.strip().lower() for words in choices]
    same = [at for at, words in enumerate(low) if words == text.strip(" .").lower()]
    named = same or [at for at, words in enumerate(low) if _stands_in(words, text.lower())]
    return LETTERS[named[0]] if len(named) == 1 else ""


def _stands_in(words: str, text: str) -> bool:
    """Whether the words are in the text as words, not as a part of one."""
    return bool(words) and bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text))


def _verdict(letter: str, target: int) -> Verdict:
    return Verdict(float(letter == LETTERS[target]), letter, not letter)


# --- Tasks that ask for words ---


def judge_mmbench(records: Sequence[Any], predictions: Sequence[str]) -> Units:
    """Units are questions: right if right in every rotation of the choices; the first rotation
    (of the lowest id, where ids are numbers) alone is the "vanilla" score."""
    verdicts = [
        _verdict(leading_letter(text, record.choices), record.target)
        for record, text in zip(records, predictions, strict=True)
    ]
    groups = [
        sorted(places, key=lambda at: _rotation(records[at]))
        for places in groups_of(records).values()
    ]
    scores = [[verdicts[at].score for at in places] for places in groups]
    columns = {
        "circular": np.asarray([min(s) for s in scores]),
        "vanilla": np.asarray([s[0] for s in scores]),
        "right": np.asarray([sum(s) for s in scores]),
        "rows": np.asarray([float(len(s)) for s in scores]),
        "n": np.ones(len(groups)),
    }
    return Units(columns, [records[places[0]].subset for places in groups], verdicts)


def _rotation(record: Any) -> int:
    return int(record.id) if record.id.isdecimal() else 0


MMBENCH = Metric(
    judge_mmbench,
    {
        "circular": over("circular"),
        "vanilla": over("vanilla"),
        "all_rows": over("right", "rows"),
    },
)


def judge_mmmu(records: Sequence[Any], predictions: Sequence[str]) -> Units:
    """Multiple choice where a record has choices, else an open answer."""
    verdicts = []
    for record, text in zip(records, predictions, strict=True):
        if record.choices:
            verdicts.append(_verdict(mmmu_letter(text, record.choices), record.target))
        else:
            right = open_right(text, record.answers)
            verdicts.append(Verdict(float(right), text.strip(), not text.strip()))
    choice = [float(bool(r.choices)) for r in records]
    columns = {
        "right": [v.score for v in verdicts],
        "right_choice": [v.score * c for v, c in zip(verdicts, choice, strict=True)],
        "right_open": [v.score * (1 - c) for v, c in zip(verdicts, choice, strict=True)],
        "choice": choice,
        "open": [1 - c for c in choice],
    }
    return by_example(records, verdicts, columns)


MMMU = Metric(
    judge_mmmu,
    {
        "accuracy": over("right"),
        "accuracy_choice": over("right_choice", "choice"),
        "accuracy_open": over("right_open", "open"),
    },
    {"accuracy_by_subject": Macro(over("right"))},
)


def judge_scienceqa(records: Sequence[Any], predictions: Sequence[str]) -> Units:
    """Accuracy, and that of the questions with an image."""
    verdicts = [
        _verdict(scienceqa_letter(text, record.choices), record.target)
        for record, text in zip(records, predictions, strict=True)
    ]
    seen = [float(bool(r.images)) for r in records]
    columns = {
        "right": [v.score for v in verdicts],
        "right_seen": [v.score * s for v, s in zip(verdicts, seen, strict=True)],
        "seen": seen,
    }
    return by_example(records, verdicts, columns)


SCIENCEQA = Metric(
    judge_scienceqa,
    {"accuracy": over("right"), "accuracy_with_image": over("right_seen", "seen")},
)


# --- By likelihood ---


def best(scores: Sequence[float]) -> int:
    """The first of the highest; -1 where one is not finite."""
    return max(range(len(scores)), key=scores.__getitem__) if _finite(scores) else -1


def _finite(scores: Sequence[float]) -> bool:
    return bool(scores) and all(math.isfinite(s) for s in scores)


def per_length(sums: Sequence[float], choices: Sequence[str], unit: str) -> list[float]:
    """Log-probabilities over the length of each choice, without the space before it.

    Args:
      sums: a log-probability for each choice.
      choices: their texts.
      unit: "character" or "byte" (of UTF-8).
    """
    lengths = [
        len(c if unit == "character" else c.encode("utf-8", "surrogatepass")) for c in choices
    ]
    return [s / max(n, 1) for s, n in zip(sums, lengths, strict=True)]


def judge_likelihood(records: Sequence[Any], predictions: Sequence[Sequence[float]]) -> Units:
    """Three ways to choose: the sum, per character, per byte. A log-probability that is not finite
    makes the example a failure, wrong in all three."""
    columns: dict[str, list[int | float]] = {"sum": [], "character": [], "byte": [], "top5": []}
    verdicts = []
    for record, sums in zip(records, predictions, strict=True):
        chosen = best(sums)
        columns["sum"].append(chosen == record.target)
        for unit in ("character", "byte"):
            found = best(per_length(sums, record.choices, unit)) if chosen >= 0 else -1
            columns[unit].append(found == record.target)
        better = sum(s > sums[record.target] for s in sums) if chosen >= 0 else 5
        columns["top5"].append(better < 5)
        parsed = record.choices[chosen] if chosen >= 0 else ""
        verdicts.append(Verdict(float(chosen == record.target), parsed, chosen < 0))
    units = by_example(records, verdicts, columns)
    strata = {"class": [r.choices[r.target] for r in records]}
    return Units(units.columns, units.subsets, units.verdicts, strata)


_WAYS = {
    "accuracy": over("sum"),
    "accuracy_per_character": over("character"),
    "accuracy_per_byte": over("byte"),
}
LIKELIHOOD = Metric(judge_likelihood, _WAYS)
# The choices are letters there, all equally long.
MMLU = Metric(
    judge_likelihood, {"accuracy": over("sum")}, {"accuracy_by_subject": Macro(over("sum"))}
)
CLASSIFICATION = Metric(
    judge_likelihood,
    {**_WAYS, "top5": over("top5")},
    {"accuracy_by_class": Macro(over("sum"), by="class")},
)
