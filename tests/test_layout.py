"""Examples laid out by hand."""

import pytest

from fuyu_jax.data.example import Example, Image, Text, split_answer
from fuyu_jax.data.layout import LayoutPolicy, lay_out
from fuyu_jax.errors import UserError

POLICY = LayoutPolicy(patch_size=8, max_height=40, max_width=40)


def image(height, width):
    return Image(b"", height, width)


def test_fuyus_order_image_then_bos_then_text(tokenizer):
    t = tokenizer
    example = Example("a", (image(10, 20), Text("What colour is it?"), Text("red", train=True)))
    layout = lay_out(example, t, POLICY)
    question, answer = t.encode("What colour is it?"), t.encode("red")
    row = [t.image_id] * 3 + [t.newline_id]
    assert layout.tokens.tolist() == [
        *row, *row, t.bos_id, *question, t.answer_id, *answer, t.eos_id,
    ]  # fmt: skip
    weights = [0] * (8 + 1 + len(question) + 1) + [1] * (len(answer) + 1)
    assert layout.loss_weights.tolist() == weights
    assert layout.num_patches == 6


def test_conversations_repeat_and_images_stand_where_they_stand(tokenizer):
    t = tokenizer
    example = Example(
        "b",
        (
            Text("First "),
            image(8, 8),
            Text(" then "),
            image(8, 16),
            Text("?"),
            Text("yes", train=True),
            Text("And?"),
            Text("no", train=True),
        ),
    )
    layout = lay_out(example, t, POLICY)
    expected = [t.bos_id, *t.encode("First "), t.image_id, t.newline_id, *t.encode(" then ")]
    expected += [t.image_id, t.image_id, t.newline_id, *t.encode("?")]
    expected += [t.answer_id, *t.encode("yes"), t.eos_id]
    expected += [*t.encode("And?"), t.answer_id, *t.encode("no"), t.eos_id]
    assert layout.tokens.tolist() == expected
    assert layout.loss_weights.sum() == len(t.encode("yes")) + len(t.encode("no")) + 2


def test_asking_ends_with_the_mark_that_begins_an_answer(tokenizer):
    whole = Example("c", (image(8, 8), Text("What?"), Text("red", train=True)))
    prompt, answer = split_answer(whole)
    asked = lay_out(prompt, tokenizer, POLICY, ask=True)
    taught = lay_out(whole, tokenizer, POLICY)
    assert answer == "red"
    assert asked.tokens.tolist() == taught.tokens[: len(asked.tokens)].tolist()
    assert asked.tokens[-1] == tokenizer.answer_id
    assert asked.loss_weights.sum() == 0


def test_split_answer_keeps_earlier_turns():
    example = Example(
        "d", (Text("a"), Text("1", train=True), Text("b"), Text("2", train=True), Text("c"))
    )
    prompt, answer = split_answer(example)
    assert answer == "2"
    assert [s.text for s in prompt.segments] == ["a", "1", "b"]
    with pytest.raises(UserError, match="example e: no answer"):
        split_answer(Example("e", (Text("a"),)))


def test_boxes_count_in_the_shrunk_image_and_come_back_in_the_original(tokenizer):
    example = Example("f", (image(80, 40), Text("Where?"), Text("<box>8, 8, 40, 40</box>", True)))
    layout = lay_out(example, tokenizer, POLICY)
    assert layout.box_scale == 0.5
    assert layout.resized == 1
    answer = layout.tokens[layout.loss_weights > 0][:-1].tolist()
    assert [tokenizer.piece(t) for t in answer[1:-1]] == ["2", "2", "10", "10"]
    assert tokenizer.decode(answer, layout.box_scale) == "<box>8, 8, 40, 40</box>"


def test_text_only_and_image_only(tokenizer):
    text = lay_out(Example("g", (Text("hi"), Text("yes", train=True))), tokenizer, POLICY)
    assert text.num_patches == 0
    assert text.tokens[0] == tokenizer.bos_id
    bare = lay_out(Example("h", (image(8, 8),)), tokenizer, POLICY, ask=True)
    assert bare.tokens.tolist() == [
        tokenizer.image_id, tokenizer.newline_id, tokenizer.bos_id, tokenizer.answer_id,
    ]  # fmt: skip
