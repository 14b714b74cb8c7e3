"""Questions read and checked: fields, bad lines by number, groups."""

import json

import pytest
from PIL import Image

from fuyu_jax.errors import UserError
from fuyu_jax.evals.tasks import find_tasks, read_for

GOOD = {"id": "a", "prompt": "What?", "answers": ["red"]}
PAIR = {"prompt": "Which?", "choices": ["u", "v"], "group": "g"}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def read(folder, lines, tasks="exact_match", **options):
    path = folder / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return read_for(path, find_tasks(tasks), **options)


def one(folder, tasks="exact_match", **line):
    (record,), _ = read(folder, [GOOD | line], tasks)
    return record


# --- Fields ---


def test_images_stand_at_their_marks_or_in_front(folder):
    a, b = folder / "a.png", folder / "b.png"
    assert one(folder, images=["a.png", "b.png"]).segments == (a, b, "What?")
    marked = one(folder, images=["a.png", "b.png"], prompt="<image>\nThis, <image> that?")
    assert marked.segments == (a, "This,", b, " that?")
    assert one(folder, images=[str(b)], prompt="").segments == (b,)
    assert marked.images == (a, b)


def test_segments(folder):
    parts = ["See ", {"image": "a.png"}, {"text": "and say"}]
    line = {"id": 7, "segments": parts, "answers": [3]}
    (record,), _ = read(folder, [line])
    assert record.segments == ("See ", folder / "a.png", "and say")
    assert (record.id, record.answers, record.line) == ("7", ("3",), 1)


@pytest.mark.parametrize(
    ("choices", "answer", "target"),
    [
        (["red", "blue"], "blue", 1),
        (["red", "blue"], "B", 1),
        (["red", "blue"], 1, 1),
        (["1", "0"], 1, 1),  # an index, for the choices are texts
        (["1", "0"], "1", 0),
        ([3, 5], 5, 1),
        ([3, 5], "5", 1),
        (["A", "B"], "B", 1),
        (["same", "same"], "B", 1),
    ],
)
def test_which_choice_is_right(folder, choices, answer, target):
    assert one(folder, "multiple_choice", choices=choices, answers=[answer]).target == target


@pytest.mark.parametrize(
    ("form", "box"),
    [("tlbr", [1, 2, 5, 4]), ("xyxy", [2, 1, 4, 5]), ("xywh", [2, 1, 2, 4])],
)
def test_boxes_come_to_one_order(folder, form, box):
    line = {"id": "a", "prompt": "Where?", "boxes": [box], "box_format": form}
    (record,), _ = read(folder, [line], "refcoco")
    assert record.boxes == ((1, 2, 5, 4),)


# --- Bad lines ---


@pytest.mark.parametrize(
    ("line", "tasks", "told"),
    [
        ("{", "exact_match", "not JSON"),
        ("[]", "exact_match", "no object"),
        ('{"id": "\xff"', "exact_match", "not JSON"),
        ({"prompt": "x", "answers": ["y"]}, "exact_match", 'no "id"'),
        (GOOD, "exact_match", 'id "a" is that of line 1 too'),
        ({"id": "b", "prompt": "x", "answers": []}, "exact_match", '"answers" is empty'),
        ({"id": "b", "prompt": "x", "answers": [" "]}, "exact_match", '"answers" is empty'),
        ({"id": "b", "prompt": "x", "answers": "y"}, "exact_match", "no list of texts"),
        ({"id": "b", "prompt": "x", "answers": [None]}, "exact_match", "no list of texts"),
        ({"id": "b", "prompt": "x", "answer": ["y"]}, "exact_match", 'did you mean "answers"?'),
        ({"id": "b", "prompt": "x"}, "exact_match", 'exact_match needs "answers"'),
        ({"id": "b", "answers": ["y"]}, "exact_match", "nothing is asked"),
        (
            {"id": "b", "images": ["no.png"], "answers": ["y"]},
            "exact_match",
            "no.png: no such file",
        ),
        ({"id": "b", "images": ["http://x/y"], "answers": ["y"]}, "exact_match", "is an address"),
        ({"id": "b", "images": "a.png", "answers": ["y"]}, "exact_match", "no list of paths"),
        (
            {"id": "b", "images": ["a.png"], "prompt": "<image><image>", "answers": ["y"]},
            "exact_match",
            "2 <image> marks for 1 images",
        ),
        (
            {"id": "b", "segments": ["x"], "prompt": "x", "answers": ["y"]},
            "exact_match",
            '"segments" besides "prompt"',
        ),
        ({"id": "b", "segments": [3], "answers": ["y"]}, "exact_match", "a segment is neither"),
        ({"id": "b", "prompt": 3, "answers": ["y"]}, "exact_match", '"prompt" is not a text'),
        # Answers of another task's form.
        ({"id": "b", **PAIR, "answers": ["u"]}, "exact_match", 'takes no "choices"'),
        ({**GOOD, "id": "b"}, "vqav2", "needs several people's answers"),
        ({"id": "b", "prompt": "x", "answers": ["red"]}, "pope", 'yes or no, not "red"'),
        ({"id": "b", "prompt": "x", "answers": ["red"]}, "multiple_choice", 'needs "choices"'),
        ({"id": "b", "prompt": "x", "answers": ["red"]}, "refcoco", 'needs "boxes"'),
        ({"id": "b", "prompt": "x", "answers": ["red"]}, "mmbench", 'needs "choices"'),
        ({"id": "b", "prompt": "x", "answers": ["yes"]}, "mme", "its questions go by image"),
        ({"id": "b", "prompt": "x", "answers": ["a", "b"]}, "perplexity", "one document"),
        ({"id": "b", "prompt": "x", "answers": ["a"]}, "demo", 'needs a family as "subset"'),
        ({"id": "b", **PAIR, "answers": ["w"]}, "multiple_choice", "is none of the 2 choices"),
        ({"id": "b", **PAIR, "answers": ["u", "v"]}, "multiple_choice", "choices need one answer"),
        (
            {"id": "b", "prompt": "x", "choices": ["B", "A"], "answers": ["A"]},
            "multiple_choice",
            "may mean several of the 2 choices; give its index",
        ),
        ({"id": "b", "prompt": "x", "choices": ["u"], "answers": ["u"]}, "mmlu", "only one"),
        (
            {"id": "b", "prompt": "x", "choices": ["u", "v", "w"], "answers": ["u"], "group": "g"},
            "winoground",
            "two captions as choices, not 3",
        ),
        (
            {"id": "b", "prompt": "x", "boxes": [[5, 5, 1, 1]]},
            "refcoco",
            'has no inside as tlbr; give "box_format"',
        ),
        ({"id": "b", "prompt": "x", "boxes": [[1, 2, 3]]}, "refcoco", "not four numbers"),
        (
            {"id": "b", "prompt": "x", "boxes": [[1, 1, 2, 2]], "box_format": "xyhw"},
            "refcoco",
            'unknown box_format "xyhw"; did you mean "xywh"?',
        ),
    ],
)
def test_a_bad_line_is_named(folder, line, tasks, told):
    lines = [GOOD, line] if tasks == "exact_match" else ["", line]
    with pytest.raises(UserError) as error:
        read(folder, lines, tasks)
    message = str(error.value)
    assert message.startswith(f"{folder / 'data.jsonl'}:2: ")
    assert told in message
    assert "\n" not in message


def test_bad_lines_are_skipped_counted_and_listed(folder):
    lines = [GOOD, "{", GOOD, GOOD | {"id": "b", "images": ["no.png"]}, GOOD | {"id": "c"}]
    records, skipped = read(folder, lines, skip_bad=True)
    assert [r.id for r in records] == ["a", "c"]
    assert [(s.line, s.id) for s in skipped] == [(2, ""), (3, "a"), (4, "b")]
    assert "no such file" in skipped[2].reason


def test_nothing_left(folder):
    with pytest.raises(UserError, match=r"no record to evaluate; the first: line 1: not JSON"):
        read(folder, ["{"], skip_bad=True)
    with pytest.raises(UserError, match="no record"):
        read(folder, [""])
    with pytest.raises(UserError, match="No such file"):
        read_for(folder / "none.jsonl", find_tasks("anls"))


# --- Groups ---


def pair(id, group, answer, **more):
    return PAIR | {"id": id, "group": group, "answers": [answer]} | more


@pytest.mark.parametrize(
    ("lines", "at", "told"),
    [
        ([pair(0, "g", "u"), pair(1, "g", "v"), pair(2, "h", "u")], 3, '"h" has 1'),
        ([pair(0, "g", "u"), pair(1, "g", "u")], 1, "the same right caption"),
        (
            [pair(0, "g", "u"), pair(1, "g", "v", choices=["v", "w"])],
            1,
            "not the same two captions",
        ),
    ],
)
def test_a_broken_group_is_named_by_line(folder, lines, at, told):
    with pytest.raises(UserError) as error:
        read(folder, lines, "winoground")
    assert f":{at}: winoground: " in str(error.value)
    assert told in str(error.value)


def test_a_skipped_line_takes_its_group_along(folder):
    lines = [
        pair(0, "g", "u"),
        pair(1, "g", "w"),  # no choice
        pair(2, "h", "u"),
        pair(3, "h", "v"),
    ]
    records, skipped = read(folder, lines, "winoground", skip_bad=True)
    assert [r.id for r in records] == ["2", "3"]
    assert [s.line for s in skipped] == [1, 2]


def test_mme_goes_by_image_within_a_subtask(folder):
    def ask(id, answer, subset):
        line = {"id": id, "images": ["a.png"], "prompt": "Is it?", "answers": [answer]}
        return line | {"subset": subset}

    lines = [ask(0, "Yes", "count"), ask(1, "No", "count"), ask(2, "Yes", "color")]
    with pytest.raises(UserError, match=r":3: mme: an image has two questions"):
        read(folder, lines, "mme")
    records, _ = read(folder, [*lines, ask(3, "No", "color")], "mme")
    assert len(records) == 4


def test_a_limit_completes_the_last_group(folder):
    lines = [pair(0, "g", "u"), pair(1, "h", "u"), pair(2, "g", "v"), pair(3, "h", "v")]
    records, _ = read(folder, lines, "winoground", limit=1)
    assert [r.id for r in records] == ["0", "2"]
    records, _ = read(folder, [GOOD | {"id": n} for n in range(5)], limit=2)
    assert len(records) == 2
