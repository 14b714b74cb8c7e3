"""Choices and open answers read from words, by hand; no text breaks a judge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_jax.evals.metrics import choice
from fuyu_jax.evals.metrics.open_answer import claims, open_right, read, values_of
from fuyu_jax.evals.records import Record
from fuyu_jax.evals.tasks import TASKS


def record(id=0, answers=("x",), **more):
    return Record(str(id), id, more.pop("segments", ()), tuple(answers), **more)


ABCD = ("a red dog", "a cat", "cats", "none")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("The answer is (C).", "C"),
        ("(A) or (C), so (A)", "A"),
        ("B is it (D)", "D"),  # brackets before bare letters
        ("it is B or maybe D here", "D"),
        ("I think it must be a red dog", "A"),
        ("a red dog", ""),  # five words at most: no look at the words
        ("E", ""),
        ("", ""),
        ("B.", "B"),
    ],
)
def test_mmmu_letters(text, letter):
    assert choice.mmmu_letter(text, ABCD) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. a cat", "B"),
        ("So. The answer is C.", "C"),
        ("The answer is A. The answer is B.", ""),
        ("b", ""),
        ("B a cat", ""),
        ("E", ""),
        ("", ""),
    ],
)
def test_scienceqa_letters(text, letter):
    assert choice.scienceqa_letter(text, ABCD) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B: a cat", "B"),
        ("A cat.", "B"),
        ("There are cats here", "C"),  # not "a cat" inside "cats"
        ("A cat and cats", ""),
        ("E", ""),
        ("", ""),
    ],
)
def test_leading_letters(text, letter):
    assert choice.leading_letter(text, ABCD) == letter


def test_mmbench_by_hand():
    def row(id, target, group):
        return record(id, ["x"], choices=("u", "v"), target=target, group=group)

    # The first pass of group 7 is the line with the lowest id, wherever it stands.
    records = [row(1000007, 1, "7"), row(7, 0, "7"), row(8, 0, "8"), row(1000008, 1, "8")]
    found = choice.MMBENCH(records, ["A", "A", "A", "B"])
    assert found["scores"] == {"circular": 0.5, "vanilla": 1.0, "all_rows": 0.75}


def test_scienceqa_apart_for_questions_with_an_image(tmp_path):
    seen = record(0, ["x"], choices=("u", "v"), target=0, segments=(tmp_path / "a.png",))
    blind = record(1, ["x"], choices=("u", "v"), target=0)
    found = choice.SCIENCEQA([seen, blind], ["B", "A"])["scores"]
    assert found == {"accuracy": 0.5, "accuracy_with_image": 0.0}


def test_open_answers():
    assert values_of("1,234.567") == [1234.57]
    assert values_of("A") == [" a", "a "]
    assert claims("It is 5.\nThus x = 7 is the result 9") == ["5.", "9"]
    assert claims("just this") == ["just this"]
    assert 9.0 in read("Thus the result 9")
    assert open_right("The answer is 60 Mbps.", ["60"])
    assert open_right("The total is $1,200", ["1200"])
    assert not open_right("The total is 1,300", ["1200"])
    assert open_right("It is a Transformation", ["transformation"])
    assert not open_right("apple", ["A"])
    assert open_right("It is 2e3", ["2000"])


WORDS = ["A", "(B)", "The answer is", "yes", "no", "is ", "nan", "inf", "1,000", "1e999"]
MARKS = [".", ",", "%", "=", "<box>", "</box>", "<point>1, 2</point>", "[1, 2]", "[-1,2,3,4e]"]
PIECES = WORDS + MARKS
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join))


@given(TEXTS, TEXTS)
def test_no_answer_breaks_a_judge(answer, expected):
    forms = {
        "text": record(0, [expected or "x"] * 4),
        "yes": record(0, ["yes"], group="g"),
        "choice": record(0, ["a"], choices=("a", expected), target=0, group="g"),
        "box": record(0, boxes=((0.0, 0.0, 1.0, 1.0),), box_format="xywh"),
    }
    asks = {
        "text": "vqav2 textvqa anls chartqa caption mmmu exact_match",
        "yes": "pope mme",
        "choice": "mmbench mmmu scienceqa",
        "box": "refcoco pointing",
    }
    for form, names in asks.items():
        for name in names.split():
            verdict = TASKS[name].judge([forms[form]], [answer]).verdicts[0]
            assert 0 <= verdict.score <= 1 + 1e-9
            assert not (verdict.failed and verdict.score and form in ("choice", "box"))
