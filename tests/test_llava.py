"""The LLaVA-style source: forms of records, and what is wrong with them."""

import json

import pytest
from PIL import Image as PilImage

from fuyu_jax.data.example import BadImageError, Image, Text
from fuyu_jax.data.sources.llava import LlavaSource
from fuyu_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a.png", (30, 20)), ("b.jpg", (8, 16))):
        PilImage.new("RGB", size, (9, 9, 9)).save(tmp_path / name)
    return tmp_path


def source(folder, records, name="x.json"):
    text = json.dumps(records)
    if name.endswith("l"):
        text = "\n".join(json.dumps(r) for r in records) + "\n\n"
    (folder / name).write_text(text)
    return LlavaSource(folder / name)


def talk(*values):
    who = ("human", "gpt")
    return [{"from": who[i % 2], "value": v} for i, v in enumerate(values)]


def shape(example):
    return [
        (s.height, s.width) if isinstance(s, Image) else (s.text, s.train) for s in example.segments
    ]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_image_marks_anywhere_and_several_images(folder, name):
    records = [
        {"id": "1", "image": "a.png", "conversations": talk("<image>\nWhat?", "This.")},
        {
            "id": 2,
            "image": ["a.png", "b.jpg"],
            "conversations": talk("Is <image> like <image>?", "no"),
        },
        {
            "id": "3",
            "images": ["b.jpg"],
            "conversations": talk("What is it? <image>", "It.", "Why?", "So."),
        },
        {"id": "4", "conversations": talk("Text alone", "yes")},
        {"id": "5", "image": "a.png", "conversations": talk("No mark", "fine")},
    ]
    found = source(folder, records, name)
    assert [found.id(i) for i in range(5)] == ["1", "2", "3", "4", "5"]
    assert shape(found[0]) == [(20, 30), ("What?", False), ("This.", True)]
    assert shape(found[1]) == [
        ("Is", False), (20, 30), (" like", False), (16, 8), ("?", False), ("no", True),
    ]  # fmt: skip
    assert shape(found[2]) == [
        ("What is it?", False), (16, 8), ("It.", True), ("Why?", False), ("So.", True),
    ]  # fmt: skip
    assert shape(found[3]) == [("Text alone", False), ("yes", True)]
    assert shape(found[4]) == [(20, 30), ("No mark", False), ("fine", True)]
    assert found.largest_side() == 30
    assert isinstance(found[0].segments[1], Text)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "q"}, r'record 0: no list "conversations"'),
        ({"id": "q", "conversations": [{"from": "human"}]}, r"id 'q'.*no text \"value\""),
        ({"id": "q", "conversations": [{"from": "bot", "value": "x"}]}, r"from 'bot'"),
        ({"id": "q", "image": 3, "conversations": talk("x", "y")}, r"not a path"),
        (
            {"id": "q", "image": "a.png", "conversations": talk("<image><image>", "y")},
            r"2 <image> marks for 1 images",
        ),
    ],
)
def test_malformed_records_are_named(folder, record, message):
    with pytest.raises(UserError, match=message) as caught:
        source(folder, [record])
    assert "x.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not(folder):
    with pytest.raises(UserError, match="no such file"):
        LlavaSource(folder / "none.json")
    (folder / "broken.json").write_text('[{"id": ')
    with pytest.raises(UserError, match="not JSON"):
        LlavaSource(folder / "broken.json")
    (folder / "ok.json").write_text("[]")
    with pytest.raises(UserError, match="no such folder"):
        LlavaSource(folder / "ok.json", folder / "nowhere")


def test_ids_that_come_again_are_told_apart(folder):
    records = [{"id": i, "conversations": talk("a", "b")} for i in ("same", "x", "same", None, 3)]
    found = source(folder, [*records, {"conversations": talk("a", "b")}])
    assert [found.id(i) for i in range(6)] == ["same", "x", "same#2", "3", "3#2", "5"]
    assert found.repeated_ids == 2 and found[2].id == "same#2"


def test_missing_and_broken_images_are_named_when_met(folder):
    (folder / "c.png").write_bytes(b"nothing")
    found = source(
        folder,
        [
            {"id": "1", "image": "gone.png", "conversations": talk("<image>", "x")},
            {"id": "2", "image": "c.png", "conversations": talk("<image>", "x")},
        ],
    )
    with pytest.raises(BadImageError, match=r"gone\.png: no such file"):
        found[0]
    with pytest.raises(BadImageError, match=r"c\.png: cannot be read"):
        found[1]


def test_marks_that_end_a_line_elsewhere_stand_in_a_text(folder):
    text = "one\u2028two\x85three"
    lines = [json.dumps({"conversations": talk("q", text)}, ensure_ascii=False)] * 2
    (folder / "x.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    found = LlavaSource(folder / "x.jsonl")
    assert len(found) == 2 and shape(found[1]) == [("q", False), (text, True)]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"conversations": []}\n\n{bad\n', r"not JSON or JSON Lines \(line 3: "),
        (b'[\n{"conversations": []},\n{bad]', r"not JSON or JSON Lines \(line 3: "),
        ('["ä"]'.encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_broken_file_is_one_line_with_its_place(folder, content, message):
    (folder / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        LlavaSource(folder / "x.jsonl")
    assert "\n" not in str(error.value)
