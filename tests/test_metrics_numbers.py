"""Likelihoods, boxes, pairs, perplexity and the bootstrap, by hand; how long scoring takes."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_jax.evals.metrics import bootstrap as boot
from fuyu_jax.evals.metrics import choice, grounding, pairs, text
from fuyu_jax.evals.metrics.text import Counted, rolling_windows
from fuyu_jax.evals.records import Record


def record(id=0, answers=("x",), **more):
    return Record(str(id), id, (), tuple(answers), **more)


# --- Bootstrap ---


def units(values, subsets=None, whole=None):
    n = len(values)
    columns = {"x": np.asarray(values, float), "n": np.ones(n) if whole is None else whole}
    return boot.Units(columns, subsets or ["all"] * n, [boot.Verdict(float(v)) for v in values])


def test_the_standard_error_of_a_mean():
    rng = np.random.default_rng(0)
    values = rng.random(400) < 0.3
    found = boot.bootstrap(units(values).columns, {"mean": boot.over("x")}, resamples=4000)
    mean, error = found["mean"]
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(math.sqrt(mean * (1 - mean) / 400), rel=0.05)


def test_the_same_seed_gives_the_same_errors():
    columns = units(np.arange(50.0)).columns
    first, again, other = (
        boot.bootstrap(columns, {"m": boot.over("x")}, seed)["m"] for seed in (1, 1, 2)
    )
    assert first == again
    assert first[0] == other[0] and first[1] != other[1]


def test_groups_are_drawn_whole():
    # Ten groups of ten alike: the error is that of ten values, not of a hundred.
    values = np.asarray([0.0, 10.0] * 5)
    grouped = units(values, whole=np.full(10, 10.0))
    _, error = boot.bootstrap(grouped.columns, {"m": boot.over("x")}, resamples=4000)["m"]
    assert error == pytest.approx(math.sqrt(0.25 / 10), rel=0.05)


def test_macro_means_and_sums():
    values, subsets = [1, 1, 1, 0, 0, 1], ["a", "a", "a", "a", "b", "b"]
    metric = boot.Metric(
        lambda r, p: units(values, subsets),
        {"mean": boot.over("x")},
        {
            "macro": boot.Macro(boot.over("x")),
            "total": boot.Macro(boot.over("x"), total=True),
            "only_b": boot.Macro(boot.over("x"), only=frozenset({"b"})),
            "only_c": boot.Macro(boot.over("x"), only=frozenset({"c"})),
        },
    )
    records = [record(n, subset=s) for n, s in enumerate(subsets)]
    found = metric(records, values)
    assert found["scores"] == {"mean": 4 / 6, "macro": 0.625, "total": 1.25, "only_b": 0.5}
    errors = [found["by_subset"][s]["stderr"]["mean"] for s in "ab"]
    assert found["stderr"]["macro"] == pytest.approx(math.hypot(*errors) / 2)


def test_no_records_and_one_record():
    assert choice.LIKELIHOOD([], [])["n"] == 0
    one = choice.LIKELIHOOD([record(0, choices=("u", "v"), target=0)], [(-1.0, -2.0)])
    assert one["scores"]["accuracy"] == 1.0
    assert one["stderr"]["accuracy"] == 0.0
    assert "by_subset" not in one


# --- Likelihood ---


def test_three_ways_to_choose():
    choices = ("no", "certainly", "été")
    # Sums: "no". Per character (2, 9, 3): certainly. Per byte (2, 9, 5) too, été closer.
    sums = (-3.0, -4.5, -3.3)
    assert choice.best(sums) == 0
    assert choice.per_length(sums, choices, "character") == pytest.approx([-1.5, -0.5, -1.1])
    assert choice.per_length(sums, choices, "byte") == pytest.approx([-1.5, -0.5, -0.66])
    found = choice.LIKELIHOOD([record(0, choices=choices, target=1)], [sums])["scores"]
    assert found == {"accuracy": 0.0, "accuracy_per_character": 1.0, "accuracy_per_byte": 1.0}


def test_what_is_not_finite_is_wrong_and_a_failure():
    records = [record(n, choices=("u", "v"), target=0) for n in range(3)]
    found = choice.LIKELIHOOD(records, [(math.nan, -1.0), (-1.0, -math.inf), (-1.0, -1.0)])
    assert found["parse_failures"] == 2
    assert found["scores"]["accuracy"] == pytest.approx(1 / 3)  # of equals the first


def test_classification_by_class_and_top_five():
    names = tuple("abcdef")
    records = [record(n, choices=names, target=t) for n, t in enumerate([0, 0, 0, 5])]
    falling = tuple(-float(n) for n in range(6))
    found = choice.CLASSIFICATION(records, [falling] * 4)["scores"]
    assert found["accuracy"] == 0.75
    assert found["accuracy_by_class"] == 0.5
    assert found["top5"] == 0.75


def test_mmlu_by_subject():
    rows = [record(n, choices=("u", "v"), target=0, subset=s) for n, s in enumerate("aab")]
    found = choice.MMLU(rows, [(-1.0, -2.0), (-1.0, -2.0), (-2.0, -1.0)])["scores"]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_by_subject"] == 0.5


# --- Winoground ---


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        (((-1, -2), (-2, -1)), (1, 1, 1)),
        (((-1, -2), (-4, -3)), (1, 0, 0)),  # caption 1 is likelier with image 0
        (((-2, -1), (-3, -1.5)), (0, 0, 0)),
        (((-2, -1), (-3, -0.5)), (0, 1, 0)),
        (((-1, -1), (-2, -1)), (0, 0, 0)),  # ties are wrong
        (((-1, math.nan), (-2, -1)), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_winoground(scores, right, turned):
    captions = ("a in b", "b in a")
    first, second = (tuple(map(float, row)) for row in scores)
    one = record(0, choices=captions, target=0, group="g")
    two = record(1, choices=captions, target=1, group="g")
    if turned:  # a record may have its own order of captions
        two, second = record(1, choices=captions[::-1], target=0, group="g"), second[::-1]
    found = pairs.METRIC([one, two], [first, second])
    text_, image, group = right
    assert found["scores"] == {"group": group, "text": text_, "image": image}
    assert found["units"] == 1


# --- Boxes and points ---


@pytest.mark.parametrize(
    ("answer", "form", "box"),
    [
        ("It is <box>1, 2, 3, 4</box>", "xywh", (1, 2, 3, 4)),
        ("[2, 1, 4, 3]", "xyxy", (1, 2, 3, 4)),
        ("at (2, 1, 2, 2).", "xywh", (1, 2, 3, 4)),
        ("[1] then [1, 2, 3.5, 4]", "tlbr", (1, 2, 3.5, 4)),
        ((2.0, 1.0, 2.0, 2.0), "xywh", (1, 2, 3, 4)),
        ("[1, 2, 3]", "tlbr", None),
        ((1.0, 2.0), "tlbr", None),
        ("1, 2, 3, 4", "tlbr", None),
        ("", "tlbr", None),
    ],
)
def test_boxes_read(answer, form, box):
    assert grounding.read_box(answer, form) == box


@pytest.mark.parametrize(
    ("answer", "form", "point"),
    [
        ("<point>7, 5</point>", "tlbr", (5, 7)),
        ("[7, 5]", "xyxy", (5, 7)),
        ("[5, 7]", "tlbr", (5, 7)),
        ((7.0, 5.0), "xywh", (5, 7)),
        ("<box>0, 0, 10, 20</box>", "xyxy", (5, 10)),
        ((0.0, 0.0, 20.0, 10.0), "xywh", (5, 10)),
        ("nowhere", "tlbr", None),
    ],
)
def test_points_read(answer, form, point):
    assert grounding.read_point(answer, form) == point


def test_refcoco_by_hand():
    truth = (0.0, 0.0, 10.0, 10.0)
    records = [record(n, boxes=(truth,)) for n in range(3)]
    half = "<box>0, 0, 10, 5</box>"  # IoU just a half
    found = grounding.REFCOCO(records, [half, "<box>0, 0, 10, 4.9</box>", "?"])
    assert found["scores"]["accuracy_at_0.5"] == pytest.approx(1 / 3)
    assert found["scores"]["mean_iou"] == pytest.approx((0.5 + 0.49) / 3)
    assert found["parse_failures"] == 1
    # One pixel more a side: 11·5.9 of 11·11.
    assert grounding.iou_of_pixels((0, 0, 10, 4.9), truth) == pytest.approx(5.9 / 11)
    assert found["scores"]["accuracy_at_0.5_plus_one"] == pytest.approx(2 / 3)


# --- Text ---


def test_perplexity_by_hand():
    records = [record(0, ["one two"]), record(1, ["three"]), record(2, ["lost"])]
    given = [Counted(-6.0, 3), Counted(-2.0, 1), Counted(-math.inf, 2)]
    found = text.PERPLEXITY(records, given)
    assert found["scores"]["perplexity"] == pytest.approx(math.exp(8 / 4))
    assert found["scores"]["word_perplexity"] == pytest.approx(math.exp(8 / 3))
    assert found["scores"]["byte_perplexity"] == pytest.approx(math.exp(8 / 12))
    assert found["scores"]["bits_per_byte"] == pytest.approx(8 / 12 / math.log(2))
    assert found["parse_failures"] == 1


def test_a_perplexity_of_nothing_is_none_not_infinite():
    found = text.PERPLEXITY([record(0, ["a"])], [Counted(math.nan, 1)])
    assert found["scores"]["perplexity"] is None
    json.dumps(found, allow_nan=False)


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_rolling_windows_score_each_token_once(tokens, size, data):
    context = data.draw(st.integers(1, size - 1))
    windows = list(rolling_windows(tokens, size, context))
    scored = [t for w in windows for t in range(w.first, w.stop)]
    assert scored == list(range(tokens))
    assert all(w.stop - w.begin <= size for w in windows)
    # Every token but the first has a token before it in its window.
    assert all(w.begin < w.first for w in windows[1:])


def test_exact_and_demo():
    found = text.EXACT([record(0, ["Red", "crimson"])] * 2, [" Red ", "red"])["scores"]
    assert found == {"exact": 0.5, "without_case": 1.0}
    records = [
        record(0, ["<box>0, 0, 10, 10</box>"], subset="box"),
        record(1, ["A red circle and a blue star."], subset="caption"),
        record(2, ["red"], subset="colour"),
        record(3, ["red"], subset="colour"),
    ]
    answers = ["<box>0, 0, 10, 9</box>", "A blue star and a red circle.", "red", ""]
    found = text.DEMO(records, answers)
    assert found["scores"]["right"] == 0.75
    assert found["scores"]["right_by_family"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["by_subset"]["colour"]["parse_failures"] == 1


# --- Time, without the tests' checks of types ---

_TIMED = """
import random, sys, time
from fuyu_jax.evals.records import Record
from fuyu_jax.evals.tasks import TASKS
rng = random.Random(0)
words = [chr(97 + a) + chr(97 + b) + "ing" for a in range(26) for b in range(20)]
def text(low, high):
    return " ".join(rng.choices(words, k=rng.randint(low, high)))
def timed(task, records, answers):
    began = time.perf_counter()
    found = TASKS[task].score(records, answers)
    print(time.perf_counter() - began, found["n"])
n = 5000
people = [tuple(text(1, 3) for _ in range(10)) for _ in range(n)]
timed("vqav2", [Record(str(i), i, (), p) for i, p in enumerate(people)], [p[0] for p in people])
people = [tuple(text(8, 14) for _ in range(5)) for _ in range(n)]
records = [Record(str(i), i, (), p) for i, p in enumerate(people)]
timed("caption", records, [text(8, 14) for _ in range(n)])
"""


def test_five_thousand_are_scored_in_seconds():
    run = subprocess.run(
        [sys.executable, "-c", _TIMED], capture_output=True, text=True, check=True, timeout=300
    )
    (vqa, n), (caption, m) = (line.split() for line in run.stdout.split("\n")[:2])
    assert n == m == "5000"
    assert float(vqa) < 5
    assert float(caption) < 30
    print(f"vqa {float(vqa):.2f} s, captions {float(caption):.2f} s")
