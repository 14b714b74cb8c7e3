"""Winoground: two images and two captions of the same words; which belongs to which?

A record is an image with both captions as choices; the two records of a group have the same
captions. A tie is wrong.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fuyu_jax.evals.metrics.bootstrap import Metric, Units, Verdict, groups_of, over

Scores = Sequence[Sequence[float]]  # [image][caption], caption i being image i's own


def text_right(scores: Scores) -> bool:
    """For each image its own caption is likelier than the other."""
    return scores[0][0] > scores[0][1] and scores[1][1] > scores[1][0]


def image_right(scores: Scores) -> bool:
    """Each caption is likelier with its own image than with the other."""
    return scores[0][0] > scores[1][0] and scores[1][1] > scores[0][1]


def judge(records: Sequence[Any], predictions: Sequence[Sequence[float]]) -> Units:
    """Units are groups. A log-probability that is not finite is a failure, and its group wrong."""
    groups = list(groups_of(records).values())
    rows = [_right(records, predictions, places) for places in groups]
    columns = dict(zip(("text", "image", "group"), np.asarray(rows, np.float64).T, strict=True))
    columns["n"] = np.ones(len(groups))
    verdicts = []
    for record, sums in zip(records, predictions, strict=True):
        usable = all(math.isfinite(s) for s in sums)
        right = usable and sums[record.target] > sums[1 - record.target]
        parsed = record.choices[max((0, 1), key=sums.__getitem__)] if usable else ""
        verdicts.append(Verdict(float(right), parsed, not usable))
    return Units(columns, [records[places[0]].subset for places in groups], verdicts)


def _right(
    records: Sequence[Any], predictions: Sequence[Sequence[float]], places: Sequence[int]
) -> tuple[bool, bool, bool]:
    """Text, image and both of one group, in whichever order a record has the captions."""
    captions = [records[at].choices[records[at].target] for at in places]
    scores = [
        [predictions[at][records[at].choices.index(caption)] for caption in captions]
        for at in places
    ]
    if not all(math.isfinite(s) for row in scores for s in row):
        return False, False, False
    text, image = text_right(scores), image_right(scores)
    return text, image, text and image


METRIC = Metric(judge, {"group": over("group"), "text": over("text"), "image": over("image")})
