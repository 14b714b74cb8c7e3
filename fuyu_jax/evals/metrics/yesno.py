"""Yes or no: POPE, MME."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fuyu_jax.evals.metrics.bootstrap import (
    Macro,
    Metric,
    Sums,
    Units,
    Verdict,
    by_example,
    groups_of,
    over,
    quotient,
)

_NO = frozenset({"no", "not", "No"})
# MME's subtasks of cognition; all others are of perception.
COGNITION = frozenset(
    {"code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"}
)
PERCEPTION = frozenset(
    {"artwork", "celebrity", "color", "count", "existence"}
    | {"landmark", "OCR", "position", "posters", "scene"}
)


def pope_answer(text: str) -> str:
    """ "no" where a word before the first period is no, not or No, else "yes", even if empty."""
    words = text.split(".")[0].replace(",", "").split()
    return "no" if _NO.intersection(words) else "yes"


def says_yes_or_no(text: str) -> bool:
    """Whether a yes or a no is in the answer at all; POPE's own rule does not ask."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return bool({"yes", "no", "not"}.intersection(words))


def mme_answer(text: str) -> str:
    """ "yes" or "no" if within the first four characters, in that order; else nothing."""
    start = text.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "")


def judge_pope(records: Sequence[Any], predictions: Sequence[str]) -> Units:
    """Counts of a table of two by two, yes being positive."""
    answers = [pope_answer(p) for p in predictions]
    right = [r.answers[0].lower() for r in records]
    pairs = np.asarray(list(zip(answers, right, strict=True))).reshape(-1, 2) == "yes"
    said, true = pairs.T
    columns = {
        "true_yes": said & true,
        "said_yes": said,
        "is_yes": true,
        "right": said == true,
    }
    verdicts = [
        Verdict(float(answer == expected), answer, not says_yes_or_no(text))
        for answer, expected, text in zip(answers, right, predictions, strict=True)
    ]
    return by_example(records, verdicts, columns)


def f1(sums: Sums) -> np.ndarray:
    """2 · true yes / (said yes + is yes): the harmonic mean of precision and recall."""
    return quotient(2 * sums["true_yes"], sums["said_yes"] + sums["is_yes"])


POPE = Metric(
    judge_pope,
    {
        "accuracy": over("right"),
        "precision": over("true_yes", "said_yes"),
        "recall": over("true_yes", "is_yes"),
        "f1": f1,
        "yes_share": over("said_yes"),
    },
)


def judge_mme(records: Sequence[Any], predictions: Sequence[str]) -> Units:
    """Units are images, each with its questions. What is neither yes nor no is wrong."""
    answers = [mme_answer(p) for p in predictions]
    verdicts = [
        Verdict(float(answer == record.answers[0].lower()), answer, not answer)
        for record, answer in zip(records, answers, strict=True)
    ]
    groups = list(groups_of(records).values())
    scores = [[verdicts[at].score for at in places] for places in groups]
    columns = {
        "right": np.asarray([sum(s) for s in scores]),
        "all_right": np.asarray([float(min(s)) for s in scores]),
        "n": np.asarray([float(len(s)) for s in scores]),
        "images": np.ones(len(groups)),
    }
    return Units(columns, [records[places[0]].subset for places in groups], verdicts)


def mme_score(sums: Sums) -> np.ndarray:
    """Accuracy + accuracy+ in points: 200 at most."""
    return 100 * (quotient(sums["right"], sums["n"]) + quotient(sums["all_right"], sums["images"]))


MME = Metric(
    judge_mme,
    {
        "score": mme_score,
        "accuracy": over("right"),
        "accuracy_plus": over("all_right", "images"),
    },
    {
        "total": Macro(mme_score, total=True),
        "perception": Macro(mme_score, total=True, only=PERCEPTION),
        "cognition": Macro(mme_score, total=True, only=COGNITION),
    },
)
