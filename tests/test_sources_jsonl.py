"""Plain text and interleaved documents in JSON Lines: layouts, splitting, and what can be wrong."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage

from fuyu_jax.data.example import BadImageError, Example, Image, Text, split_answer
from fuyu_jax.data.sources import InterleavedSource, JsonlTextSource
from fuyu_jax.data.sources.jsonl import split
from fuyu_jax.errors import UserError


def write(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(4):
        PilImage.new("RGB", (10 + n, 20), (9, 9, 9)).save(tmp_path / "images" / f"{n}.png")
    return tmp_path


def shape(example):
    """Texts, and the last digit of images' widths."""
    assert all(s.train and s.plain for s in example.segments if isinstance(s, Text))
    return [s.width - 10 if isinstance(s, Image) else s.text for s in example.segments]


def test_plain_texts_by_line(tmp_path):
    lines = ({"text": "Eins ä"}, "\n", "  \n", {"text": "two", "id": 7, "subset": "s"}, "\r\n")
    path = write(tmp_path / "x.jsonl", *lines, '{"text": ""}\n', '{"text": "no newline"}')
    source = JsonlTextSource(path)
    assert [source.id(i) for i in range(4)] == ["x:1", "x:4:7", "x:6", "x:7"]
    assert [source[i].id for i in range(4)] == ["x:1", "x:4:7", "x:6", "x:7"]
    assert [shape(source[i]) for i in range(4)] == [["Eins ä"], ["two"], [], ["no newline"]]
    assert source[1].info == {"family": "s"}
    assert list(source.texts()) == ["Eins ä", "two", "no newline"]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    with pytest.raises(IndexError):
        source[4]


def test_several_files_and_another_field(tmp_path):
    for n in range(2):
        (tmp_path / str(n)).mkdir()
        write(tmp_path / str(n) / "a.jsonl", {"body": f"{n}"}, {"body": f"{n}b"})
    source = JsonlTextSource(str(tmp_path / "{0..1}" / "a.jsonl"), field="body")
    assert [source.id(i) for i in range(4)] == ["a:1", "a:2", "a#2:1", "a#2:2"]
    assert [shape(source[i]) for i in range(4)] == [["0"], ["0b"], ["1"], ["1b"]]


def test_long_texts_are_split_and_counted(tmp_path):
    text = "one two three four five"
    path = write(tmp_path / "x.jsonl", {"text": text}, {"text": "short"})
    source = JsonlTextSource(path, max_chars=9)
    assert [shape(source[i]) for i in range(4)] == [["one two"], [" three"], [" four"], [" five"]]
    assert [source.id(i) for i in range(5)] == ["x:1", "x:1/1", "x:1/2", "x:1/3", "x:2"]
    assert source[2].info == {"family": "all", "part": 2, "parts": 4}
    assert source[4].info == {"family": "all"}
    assert source.split_documents == 1 and len(source) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON, but no object"),
        ('{"txt": "x"}', r'no text "text"; did you mean "txt"\?$'),
        ('{"n": 3}', r'no text "text"; give \{"text": "\.\.\."\}$'),
        ('{"text": 3}', 'no text "text"'),
        ('{"text": "\udcff"}', "not JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "ok"}\n\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    source = JsonlTextSource(path)  # lines are checked when read
    assert shape(source[0]) == ["ok"]
    with pytest.raises(UserError, match=rf"x\.jsonl, line 3: {message}") as caught:
        source[1]
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="line 3"):
        list(source.texts())
    with pytest.raises(UserError, match="line 3"):
        JsonlTextSource(path, max_chars=5)


def test_files_that_are_not(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        JsonlTextSource(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no line in it"):
        JsonlTextSource(write(tmp_path / "empty.jsonl", "\n"))
    with pytest.raises(UserError, match="no such folder"):
        InterleavedSource(write(tmp_path / "x.jsonl", {"text_list": []}), tmp_path / "nowhere")


def test_obelics_documents(folder):
    record = {
        "texts": ["One.", None, "Two.", "Three.", None, None],
        "images": [None, "images/0.png", None, None, "images/2.png", "images/1.png"],
    }
    source = InterleavedSource(write(folder / "x.jsonl", record, {"texts": [], "images": []}))
    assert shape(source[0]) == ["One.", 0, "Two.\n\nThree.", 2, 1]
    assert shape(source[1]) == []
    assert list(source.texts()) == ["One.", "Two.\n\nThree."]


def test_mmc4_documents(folder):
    record = {
        "text_list": ["One.", "Two.", "Three.", "Four."],
        "image_info": [
            {"image_name": "2.png", "matched_text_index": 2, "matched_sim": 0.3},
            {"image_name": "0.png", "matched_text_index": 0},
            {"image_name": "1.png", "matched_text_index": 2},
        ],
        "id": "doc",
    }
    source = InterleavedSource(write(folder / "x.jsonl", record), folder / "images")
    assert shape(source[0]) == [0, "One. Two.", 2, 1, "Three. Four."]
    assert source[0].id == source.id(0) == "x:1:doc"
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_long_documents_are_split_within_both_limits(folder):
    record = {
        "texts": ["abc def", None, "ghi", None, "jkl mno", None],
        "images": [None, "0.png", None, "1.png", None, "2.png"],
    }
    path = write(folder / "x.jsonl", record)
    source = InterleavedSource(path, folder / "images", max_images=1)
    assert [shape(source[i]) for i in range(len(source))] == [
        ["abc def", 0, "ghi"], [1, "jkl mno"], [2],
    ]  # fmt: skip
    source = InterleavedSource(path, folder / "images", max_chars=7)
    # Image 0 goes into the next part with the text that it stands before.
    assert [shape(source[i]) for i in range(len(source))] == [
        ["abc def"], [0, "ghi", 1, "jkl"], [" mno", 2],
    ]  # fmt: skip
    assert source.split_documents == 1


def test_parts_are_as_full_as_their_limits_allow():
    image = Path("i")
    assert split(["ab abc def"], 0, 6) == [["ab abc"], [" def"]]
    assert split(["abcdefg"], 0, 3) == [["abc"], ["def"], ["g"]]
    # The image that moves on with its text counts in the next part.
    assert split(["abc", image, "def", image], 1, 3) == [["abc"], [image, "def"], [image]]
    assert split([image, image, "abc"], 0, 2) == [[image, image, "ab"], ["c"]]


@given(
    st.lists(st.one_of(st.text("ab \n", min_size=1, max_size=30), st.just(Path("i")))),
    st.integers(0, 3),
    st.integers(0, 7),
)
def test_splitting_loses_nothing_and_keeps_both_limits(pieces, max_images, max_chars):
    def joined(pieces):
        return "".join("\0" if isinstance(p, Path) else p for p in pieces)

    parts = split(pieces, max_images, max_chars)
    assert joined(p for part in parts for p in part) == joined(pieces)
    for part in parts:
        assert part or not pieces
        assert not max_images or sum(isinstance(p, Path) for p in part) <= max_images
        assert not max_chars or sum(len(p) for p in part if isinstance(p, str)) <= max_chars


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"texts": ["a"]}, r'neither "texts" and "images"'),
        ({"texts": ["a"], "images": []}, r'1 "texts" for 0 "images"'),
        ({"texts": "a", "images": []}, "not both lists"),
        ({"texts": ["a"], "images": ["b"]}, "place 0 holds a text and an image"),
        ({"texts": [3], "images": [None]}, r'"texts" 0: not a text'),
        ({"texts": [None], "images": [3]}, r'"images" 0: not the path'),
        ({"texts": [None], "images": ["http://x/y.png"]}, r"address http://x/y\.png; fetch"),
        ({"text_list": ["a"], "image_info": [{}]}, r'"image_info" 0, "image_name": not the path'),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "x", "matched_text_index": 1}]},
            r'"matched_text_index" is 1, not one of the 1 texts',
        ),
        ({"text_list": ["a"], "image_info": ["x"]}, r'"image_info" 0: not an object'),
        ({"text_list": "a"}, "not both lists"),
    ],
)
def test_malformed_documents_are_named(folder, record, message):
    source = InterleavedSource(write(folder / "x.jsonl", record))
    with pytest.raises(UserError, match=rf"x\.jsonl, line 1.*{message}") as caught:
        source[0]
    assert "\n" not in str(caught.value)


def test_missing_images_are_named_when_read(folder):
    record = {"texts": [None], "images": ["gone.png"]}
    source = InterleavedSource(write(folder / "x.jsonl", record), max_images=1)
    with pytest.raises(BadImageError, match=r"gone\.png: no such file"):
        source[0]


def test_plain_text_is_no_answer_to_ask_for():
    example = Example("x", (Text("a", train=True), Text("b", train=True, plain=True)))
    assert split_answer(example)[1] == "a"


@pytest.mark.parametrize("limit", ["max_chars", "max_images"])
def test_a_limit_below_nothing_is_one_line(folder, limit):
    path = write(folder / "x.jsonl", {"texts": ["a b"], "images": [None]})
    with pytest.raises(UserError, match=f"{limit}=-5: give 1 or more"):
        InterleavedSource(path, **{limit: -5})
