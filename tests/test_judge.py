"""Judging, scores with their errors, and the contact sheet."""

import math

import numpy as np
import pytest
from PIL import Image as PilImage

from fuyu_jax.data.example import Example, Image, Text
from fuyu_jax.evals.judge import (
    exact_match,
    iou,
    is_correct,
    mean_and_error,
    parse_boxes,
    summarise,
)
from fuyu_jax.evals.runner import prompt_text
from fuyu_jax.evals.sheet import COLUMNS, RIGHT, WRONG, _font, _wrap, choose, draw_sheet


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (0, 1, 2, 3), 1 / 3),
        ((0, 0, 2, 2), (2, 2, 4, 4), 0.0),
        ((0, 0, 4, 4), (1, 1, 3, 3), 0.25),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),  # upside down: empty
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_iou(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)


def test_parse_boxes_passes_over_what_is_malformed():
    text = "<box>1, 2, 3, 4</box> <box>1,2,3</box> <box>a, b, c, d</box> <box>5,6,7,8.5</box> <box>"
    assert parse_boxes(text) == [(1, 2, 3, 4), (5, 6, 7, 8.5)]
    assert parse_boxes("<box>1.2.3, 2, 3, 4</box>") == []


@pytest.mark.parametrize(
    ("answer", "expected", "family", "right"),
    [
        (" red\n", "red", "colour", True),
        ("Red", "red", "colour", False),
        ("<box>0, 0, 10, 10</box>", "<box>0, 0, 10, 12</box>", "box", True),
        ("<box>0, 0, 10, 10</box>", "<box>0, 6, 10, 16</box>", "box", False),
        ("no idea", "<box>0, 6, 10, 16</box>", "box", False),
        ("<box>0, 0, 1, 1</box>" * 2, "<box>0, 0, 1, 1</box>", "box", False),
        ("A blue star and a red circle.", "A red circle and a blue star.", "caption", True),
        ("A red circle.", "A red circle and a blue star.", "caption", False),
        ("A red circle and a blue star.", "A red circle.", "caption", False),
        ("a dog", "A dog.", "caption", False),
    ],
)
def test_is_correct(answer, expected, family, right):
    assert is_correct(answer, expected, family) is right


def test_exact_match_is_equality_but_for_space_at_the_ends():
    assert exact_match(" 3 ", "3")
    assert not exact_match("3.", "3")


def test_mean_and_error():
    assert mean_and_error([True, True, False, False]) == (0.5, 0.25)
    mean, error = mean_and_error([True] * 9 + [False])
    assert mean == pytest.approx(0.9)
    assert error == pytest.approx(math.sqrt(0.09 / 10))
    assert mean_and_error([]) == (0.0, 0.0)


def sample(family, correct, expected="x", **more):
    return {
        "id": "i",
        "family": family,
        "prompt": "<image>What?",
        "answer": expected if correct else "y",
        "expected": expected,
        "correct": correct,
        "exact_match": correct,
        "finished": True,
        **more,
    }


def test_summarise_by_family():
    samples = [sample("a", True), sample("a", False), sample("b", True, "z"), sample("b", True)]
    samples.append(sample("b", False, error="gone"))
    scores = summarise(samples)
    assert scores["n"] == 5
    assert scores["correct"] == 0.6
    assert scores["by_family"]["a"]["n"] == 2
    assert scores["by_family"]["a"]["correct"] == 0.5
    assert scores["by_family"]["b"]["majority"] == pytest.approx(2 / 3)
    assert scores["by_family"]["b"]["errors"] == 1


def test_the_sheet_shows_right_green_and_wrong_red_with_boxes():
    pixels = np.full((20, 30, 3), 128, np.uint8)
    import io

    sink = io.BytesIO()
    PilImage.fromarray(pixels).save(sink, "PNG")
    image = Image(sink.getvalue(), 20, 30)
    examples = [Example(str(i), (image, Text("Where?"))) for i in range(3)]
    box = "<box>2, 3, 12, 20</box>"
    samples = [sample("box", True, box), sample("box", False, box), sample("text", False)]
    sheet = np.asarray(draw_sheet(examples, samples))
    colours = {tuple(c) for c in sheet.reshape(-1, 3)[::1]}
    assert {RIGHT, WRONG} <= colours
    assert sheet.shape[1] == COLUMNS * 300
    # Families side by side, wrong before right.
    assert choose(samples, 2) == [1, 2] or choose(samples, 2) == [1, 0]


def test_the_sheet_takes_families_in_turn():
    samples = [sample("a", True)] * 50 + [sample("b", False)] * 2
    assert {samples[i]["family"] for i in choose(samples, 4)} == {"a", "b"}
    assert len(choose(samples, 10)) == 10


def test_long_text_is_wrapped_inside_its_cell():
    font = _font(13)
    text = "KAWASAN PERINDUSTRIAN BALAKONG WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW end"
    lines = _wrap(text, font, 200)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert _wrap("", font, 200) == ["(nothing)"]


def test_prompts_show_images_and_earlier_answers():
    image = Image(b"", 1, 1)
    segments = (image, Text("What?"), Text("red", train=True), Text("Where?"))
    assert prompt_text(Example("a", segments)) == "<image>What?\n> red\nWhere?"
