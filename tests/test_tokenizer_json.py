"""Vocabularies of other models: tokenizer.json, folders, and Fuyu's pieces added to them."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import TEXTS, fuyu_json, llama_json, qwen_json, sentencepiece_model

from fuyu_jax.config import DataConfig
from fuyu_jax.data.example import Example, Text
from fuyu_jax.data.layout import LayoutPolicy, lay_out
from fuyu_jax.data.opening import Sources, open_tokenizer
from fuyu_jax.errors import UserError
from fuyu_jax.tokenizer import Tokenizer
from fuyu_jax.tokenizer_extend import extend_tokenizer
from fuyu_jax.vocabulary import open_vocabulary

pytest.importorskip("tokenizers", reason="tokenizer.json needs tokenizers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return {
        "fuyu": fuyu_json(folder / "fuyu"),
        "llama": llama_json(folder / "llama"),
        "qwen": qwen_json(folder / "qwen"),
        "llama.model": sentencepiece_model(folder / "llama_model" / "tokenizer.model"),
    }


@pytest.fixture(scope="module")
def extended(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extended")
    kinds = ("llama", "qwen", "llama.model")
    return {kind: extend_tokenizer(made[kind], folder / kind) for kind in kinds}


@pytest.fixture(scope="module")
def tokenizers(made, extended, tokenizer):
    found = {kind: e.tokenizer for kind, e in extended.items()}
    return {**found, "fuyu": Tokenizer(made["fuyu"]), "own": tokenizer}


def random_texts(count, seed=0):
    rng = random.Random(seed)
    words = [*" ".join(TEXTS[:6]).split(" "), "", " ", "\n", "\n\n", "\t", "007", "1234567890"]
    words += [
        "😀👩‍👩‍👧",
        "ẞ",
        "é",
        "e\u0301",
        "\u00a0",
        "\u3000",
        "العربية",
        "▁",
        "Ġ",
        "\U00010348",
    ]

    def text():
        parts = (rng.choice(words) + rng.choice([" ", "", "\n"]) for _ in range(rng.randint(0, 12)))
        return "".join(parts)

    return [text() for _ in range(count)]


@pytest.mark.parametrize("kind", ["fuyu", "llama", "qwen"])
def test_ids_are_those_of_transformers(made, kind):
    transformers = pytest.importorskip("transformers", reason="the referee is transformers")
    ours = open_vocabulary(made[kind])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(made[kind]))
    texts = random_texts(200)
    assert sum(not text.isascii() for text in texts) > 50
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_both_files_of_fuyu_have_the_same_marks(made):
    ours, adepts = Tokenizer(made["fuyu"]), Tokenizer(made["fuyu"].with_name("tokenizer.model"))
    assert Tokenizer(made["fuyu"].parent).path.name == "tokenizer.json"
    for name in ("vocab_size", "pad_id", "image_id", "newline_id", "eos_id", "bos_id", "answer_id"):
        assert getattr(ours, name) == getattr(adepts, name), name
    assert (ours.box_ids, ours.point_ids) == (adepts.box_ids, adepts.point_ids)
    assert ours.num_coordinates == adepts.num_coordinates == 961
    assert ours.piece(ours.bos_id) == "<s>"  # though the configuration calls another one so
    text = "<box>10, 20, 1900, 7</box>"
    assert ours.encode(text) == adepts.encode(text)
    assert [ours.piece(t) for t in ours.encode(text)] == ["<0x00>", "5", "10", "950", "4", "<0x01>"]
    assert ours.encode(TEXTS[0]) == adepts.encode(TEXTS[0])


@pytest.mark.parametrize("kind", ["llama", "qwen", "llama.model"])
def test_extending_changes_no_text_and_reopens_the_same(made, extended, kind, tmp_path):
    before, after = open_vocabulary(made[kind]), extended[kind]
    t = after.tokenizer
    for text in [*random_texts(50), "<|5|> |SPEAKER| <0x04> <|960|>"]:
        assert t.encode(text) == (before.encode(text) if text else [])
        assert not set(t.encode(text)) & {t.image_id, t.answer_id, *after.new_ids}
    assert after.vocab_size == t.vocab_size == after.old_size + len(after.new_ids)
    again = Tokenizer(t.path.parent)
    copied = tmp_path / "kept.model"  # the name says nothing
    copied.write_bytes(t.path.read_bytes())
    for other in (again, Tokenizer(copied)):
        for name in ("vocab_size", "pad_id", "image_id", "newline_id", "eos_id", "bos_id"):
            assert getattr(other, name) == getattr(t, name), name
        assert other.encode("<box>4, 6, 8, 1920</box>") == t.encode("<box>4, 6, 8, 1920</box>")
    assert t.num_coordinates == 961
    assert t.piece(t.eos_id) == ("<|endoftext|>" if kind == "qwen" else "</s>")
    assert t.decode(t.encode("at <point>4, 6</point>.")) == "at <point>4, 6</point>."
    # Extending once more finds nothing to add.
    assert extend_tokenizer(t.path, tmp_path / "twice").new_ids == ()
    with pytest.raises(UserError, match="give another folder"):
        extend_tokenizer(t.path, t.path.parent)


def test_byte_pieces_serve_as_marks_and_where_there_are_none_marks_are_added(extended):
    llama, qwen = extended["llama"], extended["qwen"]
    assert llama.tokenizer.answer_id == 3 + 4 < llama.old_size
    assert llama.old_size + 2 + 961 == llama.vocab_size
    assert qwen.tokenizer.answer_id >= qwen.old_size
    assert qwen.old_size + 2 + 5 + 1 + 961 == qwen.vocab_size  # a padding that is not the end
    assert qwen.tokenizer.pad_id not in (0, qwen.tokenizer.eos_id)
    assert (llama.tokenizer.bos_id, qwen.tokenizer.bos_id) == (1, None)


def test_without_a_begin_none_is_laid_out(extended):
    t = extended["qwen"].tokenizer
    example = Example("a", (Text("What?"), Text("This.", train=True)))
    layout = lay_out(example, t, LayoutPolicy(8))
    expected = [*t.encode("What?"), t.answer_id, *t.encode("This."), t.eos_id]
    assert layout.tokens.tolist() == expected
    asked = lay_out(Example("b", ()), t, LayoutPolicy(8), ask=True)
    assert asked.tokens.tolist() == [t.answer_id]


def test_marks_cannot_be_written_in_a_text(tokenizers):
    text = "|SPEAKER||NEWLINE|SPEAKER| <s></s><|endoftext|> <0x04><0x00>1<0x01>|ENDOFTEXT|\x00\x04"
    for kind, t in tokenizers.items():
        marks = {t.image_id, t.newline_id, t.eos_id, t.bos_id, t.answer_id, *t.box_ids}
        assert not marks & set(t.encode(text)), kind


KINDS = ["own", "fuyu", "llama", "qwen", "llama.model"]
PARTS = [
    "<box>",
    "</box>",
    "<point>",
    "</point>",
    "1",
    "22",
    ", ",
    ",",
    " ",
    "-3",
    "1.5",
    "٣",
    "9" * 400,
]
PARTS += ["<0x00>", "|SPEAKER|", "é", "\ud800", "\x00", "a", "<"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_text_makes_it_raise(tokenizers, kind, data):
    t = tokenizers[kind]
    text = "".join(data.draw(st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=24)))
    tokens = t.encode(text, data.draw(st.sampled_from([1.0, 0.5, 0.001])))
    assert tokens.count(t.box_ids[0]) == tokens.count(t.box_ids[1]) <= text.count("<box>")
    assert tokens.count(t.point_ids[0]) == tokens.count(t.point_ids[1]) <= text.count("<point>")
    assert t.image_id not in tokens
    assert len(t.locations(tokens)) == tokens.count(t.box_ids[0]) + tokens.count(t.point_ids[0])
    t.decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_tokens_make_it_raise(tokenizers, kind, data):
    t = tokenizers[kind]
    some = st.sampled_from([*t.box_ids, *t.point_ids, t.encode("<point>2, 4</point>")[1], t.eos_id])
    ids = some | st.integers(-200, t.vocab_size + 200)
    tokens = data.draw(st.lists(ids, max_size=40))
    text = t.decode(tokens, data.draw(st.sampled_from([1, 0.37])))
    found = t.locations(tokens)
    assert text.count("<box>") + text.count("<point>") >= len(found)
    for location in found:
        assert tokens[location.start] in (t.box_ids[0], t.point_ids[0])
        assert location.stop - location.start == len(location.values) + 2


def test_a_malformed_box_of_tokens_keeps_its_integers(tokenizers):
    for kind, t in tokenizers.items():
        good = t.encode("<box>2, 4, 6, 8</box>")
        assert t.decode(good) == "<box>2, 4, 6, 8</box>"
        assert t.decode(good[:-1]).replace(" ", "") == "1234", kind
        assert t.decode(good[1:] + good) == t.decode(good[1:-1]) + "<box>2, 4, 6, 8</box>"


def test_a_box_of_400_digits_stays_text_and_soon(tokenizer):
    text = f"<box>{'9' * 400}, 1, 2, 3</box>" + "<box>" * 2000 + " " * 20000
    assert not set(tokenizer.box_ids) & set(tokenizer.encode(text))


def test_what_cannot_be_opened_is_told_in_a_line(made, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer.json \([^\n]*\)$"):
        Tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"no piece '\|SPEAKER\|'.*extend"):
        Tokenizer(made["llama"])
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'fuyu-jax\[interop\]'"):
        Tokenizer(made["fuyu"])
    assert Tokenizer(made["fuyu"].with_name("tokenizer.model")).num_coordinates == 961


def test_a_run_keeps_what_its_tokenizer_ends_a_text_with(made, tmp_path):
    chat = qwen_json(tmp_path / "chat")
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    chat.with_name("tokenizer_config.json").write_text(json.dumps(config))
    given = extend_tokenizer(chat, tmp_path / "extended").tokenizer
    assert given.piece(given.eos_id) == "<|im_end|>"
    (tmp_path / "run").mkdir()
    sources = Sources(DataConfig(tokenizer=str(given.path.parent)))
    kept = open_tokenizer(sources, tmp_path / "run")
    assert kept.path.parent == tmp_path / "run"
    for name in ("vocab_size", "eos_id", "pad_id", "bos_id", "answer_id"):
        assert getattr(kept, name) == getattr(given, name), name


def test_numpy_tokens_are_taken_too(tokenizers):
    t = tokenizers["fuyu"]
    tokens = np.asarray(t.encode("<point>2, 4</point>")).tolist()
    assert [str(x) for x in t.locations(tokens)] == ["<point>2, 4</point>"]
    assert json.loads(t.path.read_text())["model"]["type"] == "Unigram"
