"""Where something is: RefCOCO by boxes (IoU ≥ 0.5), and pointing.

Boxes here are (top, left, bottom, right) in pixels, as everywhere in fuyu_jax; `to_tlbr` brings
the other orders to it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fuyu_jax.evals.judge import Box, Number, iou, parse_boxes
from fuyu_jax.evals.metrics.bootstrap import Metric, Units, Verdict, by_example, over

Numbers = Sequence[int | float]
Point = tuple[Number, Number]  # y, x

# What four numbers mean, and how they become (top, left, bottom, right).
BOX_FORMATS: Mapping[str, Callable[[Number, Number, Number, Number], Box]] = {
    "tlbr": lambda top, left, bottom, right: (top, left, bottom, right),
    "xyxy": lambda x0, y0, x1, y1: (y0, x0, y1, x1),
    "xywh": lambda x, y, width, height: (y, x, y + height, x + width),
}
# Two numbers follow the same order of axes.
_POINT_IS_XY = {"tlbr": False, "xyxy": True, "xywh": True}
_NUMBER = r"-?\d+(?:\.\d+)?"
_POINT = re.compile(rf"<point>\s*({_NUMBER})\s*,\s*({_NUMBER})\s*</point>")
_FIRST = re.compile(rf"[\[(]\s*({_NUMBER}(?:\s*,\s*{_NUMBER})+)\s*[\])]")


def to_tlbr(values: Numbers, box_format: str) -> Box:
    """Four numbers in one of `BOX_FORMATS` as (top, left, bottom, right)."""
    a, b, c, d = values
    return BOX_FORMATS[box_format](a, b, c, d)


def iou_of_pixels(a: Box, b: Box) -> float:
    """IoU where a box of one pixel has both edges the same, as some scripts have it: every side is
    a pixel longer."""
    return iou((a[0], a[1], a[2] + 1, a[3] + 1), (b[0], b[1], b[2] + 1, b[3] + 1))


def read_box(answer: str | Numbers, box_format: str) -> Box | None:
    """The first box of an answer: `<box>top, left, bottom, right</box>`, else four numbers in
    brackets, or a list of four, in the record's format. None if there is none."""
    if not isinstance(answer, str):
        return to_tlbr(answer, box_format) if len(answer) == 4 else None
    if boxes := parse_boxes(answer):
        return boxes[0]
    for match in _FIRST.finditer(answer):
        values = [float(n) for n in match[1].split(",")]
        if len(values) == 4:
            return to_tlbr(values, box_format)
    return None


def read_point(answer: str | Numbers, box_format: str) -> Point | None:
    """The first point of an answer, as (y, x): `<point>x, y</point>`, else two numbers in brackets
    or a list of two in the axes' order of the record's format, else the middle of a box."""
    pair = None
    if not isinstance(answer, str):
        pair = tuple(answer) if len(answer) == 2 else None
    elif match := _POINT.search(answer):
        return float(match[2]), float(match[1])
    elif not parse_boxes(answer):
        pairs = (m[1].split(",") for m in _FIRST.finditer(answer))
        pair = next((tuple(map(float, p)) for p in pairs if len(p) == 2), None)
    if pair is not None:
        return (pair[1], pair[0]) if _POINT_IS_XY[box_format] else (pair[0], pair[1])
    box = read_box(answer, box_format)
    return box and ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


def inside(point: Point, box: Box) -> bool:
    """Whether a point lies in a box or on its edge."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def judge_boxes(records: Sequence[Any], predictions: Sequence[str | Numbers]) -> Units:
    """The answer's box against the best of the record's. No box is a failure, and IoU 0."""
    columns: dict[str, list[int | float]] = {"at_half": [], "at_half_pixels": [], "iou": []}
    verdicts = []
    for record, answer in zip(records, predictions, strict=True):
        found = read_box(answer, record.box_format)
        best = max((iou(found, b) for b in record.boxes), default=0.0) if found else 0.0
        whole = max((iou_of_pixels(found, b) for b in record.boxes), default=0.0) if found else 0.0
        columns["at_half"].append(best >= 0.5)
        columns["at_half_pixels"].append(whole >= 0.5)
        columns["iou"].append(best)
        parsed = ", ".join(f"{n:g}" for n in found) if found else ""
        verdicts.append(Verdict(best, parsed, found is None))
    return by_example(records, verdicts, columns)


def judge_points(records: Sequence[Any], predictions: Sequence[str | Numbers]) -> Units:
    """Whether the answer's point lies in a box of the record's. No point is a failure."""
    verdicts = []
    for record, answer in zip(records, predictions, strict=True):
        found = read_point(answer, record.box_format)
        right = found is not None and any(inside(found, box) for box in record.boxes)
        parsed = f"{found[1]:g}, {found[0]:g}" if found else ""
        verdicts.append(Verdict(float(right), parsed, found is None))
    return by_example(records, verdicts, {"hit": [v.score for v in verdicts]})


REFCOCO = Metric(
    judge_boxes,
    {
        "accuracy_at_0.5": over("at_half"),
        "accuracy_at_0.5_plus_one": over("at_half_pixels"),
        "mean_iou": over("iou"),
    },
)
POINTING = Metric(judge_points, {"accuracy": over("hit")})
