"""Text, boxes and special tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuyu_jax.errors import UserError
from fuyu_jax.tokenizer import (
    Tokenizer,
    coordinate_to_token_value,
    token_value_to_coordinate,
    train_sentencepiece,
)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], min_codepoint=5), max_size=60))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_cannot_be_written_in_text(tokenizer):
    special = {tokenizer.image_id, tokenizer.newline_id, tokenizer.eos_id, tokenizer.bos_id}
    special |= {tokenizer.answer_id, *tokenizer.box_ids, *tokenizer.point_ids, tokenizer.pad_id}
    text = "|SPEAKER| |NEWLINE| |ENDOFTEXT| <s> <0x04> <0x00>\x00\x01\x02\x03\x04"
    assert not special & set(tokenizer.encode(text))


def test_a_box_is_a_mark_four_integers_and_a_mark(tokenizer):
    tokens = tokenizer.encode("<box>10, 7, 30, 160</box>")
    # round-half-even(v/2): 5, 3.5 → 4, 15, 80
    pieces = [tokenizer.piece(t) for t in tokens]
    assert pieces == ["<0x00>", "5", "4", "15", "80", "<0x01>"]
    assert tokenizer.decode(tokens) == "<box>10, 8, 30, 160</box>"
    point = tokenizer.encode("at <point>4, 6</point>.")
    assert [tokenizer.piece(t) for t in point][1:-1][-4:] == ["<0x02>", "2", "3", "<0x03>"]


def test_boxes_scale_with_the_image():
    assert coordinate_to_token_value(100.0, 0.5) == 25
    assert token_value_to_coordinate(25, 0.5) == 100
    assert coordinate_to_token_value(5.0, 1.0) == 2  # half to even
    assert coordinate_to_token_value(7.0, 1.0) == 4


@pytest.mark.parametrize(
    "text",
    [
        "<box>1, 2, 3</box>",
        "<box>1, 2, 3, 4",
        "<box>, , , </box>",
        "<box>1, 2, 3, 100000</box>",  # no token for it
        "<box>-4, 2, 3, 4</box>",
        "<box><box>1, 2</box>",
        "</box><point>",
    ],
)
def test_a_malformed_box_stays_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert not set(tokenizer.box_ids) & set(tokens)
    assert tokenizer.decode(tokens) == text


def test_malformed_box_tokens_never_raise(tokenizer):
    opened, closed = tokenizer.box_ids
    five = tokenizer.encode("5")[0]
    for tokens in ([opened], [opened, closed], [closed, opened, five], [opened] + [five] * 4):
        assert "<box>" not in tokenizer.decode(tokens)


def test_what_is_not_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer(tmp_path / "bad.model")
    with pytest.raises(UserError, match="vocab_size 300"):
        train_sentencepiece(["text"], tmp_path / "small.model", 300)
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece(["", " "], tmp_path / "empty.model", 500)
    assert {p.name for p in tmp_path.iterdir()} == {"bad.model"}


def test_the_same_texts_give_the_same_model(tmp_path):
    texts = [f"a text about {n} things" for n in range(40)]
    a = train_sentencepiece(texts, tmp_path / "a.model", 400)
    b = train_sentencepiece(texts, tmp_path / "b.model", 400)
    assert a.read_bytes() == b.read_bytes()
