"""Prompts to arrays and tokens back to text, laid out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from fuyu_jax.data.example import BadImageError, Example, Text, image_of_pixels
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.processor import Processor
from fuyu_jax.errors import UserError
from fuyu_jax.generate import Engine
from fuyu_jax.model import make_decoder
from fuyu_jax.patches import grid_of, unpatchify

POLICY = LayoutPolicy(patch_size=8, max_height=40, max_width=40, draft=False)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, POLICY)


def picture(height, width, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def rows(t, count, columns):
    return ([t.image_id] * columns + [t.newline_id]) * count


def test_the_buss_14_rows_of_22(tokenizer):
    """The golden case of the reference's tests: its layout, with our ids."""
    t = tokenizer
    text = "Generate a coco-style caption.\n"
    out = Processor(t)([[picture(420, 640), text]])
    expected = [*rows(t, 14, 22), t.bos_id, *t.encode(text), t.answer_id]
    assert out.input_ids[0].tolist() == expected
    assert out.patches.shape == (1, 308, 2700)
    assert out.patch_counts.tolist() == [308]


def test_left_for_generation_right_for_training(processor):
    t = processor.tokenizer
    prompts = [[picture(8, 16), "What?"], "red"]
    first = [*rows(t, 1, 2), t.bos_id, *t.encode("What?"), t.answer_id]
    second = [t.bos_id, *t.encode("red"), t.answer_id]
    gap = len(first) - len(second)
    assert gap > 0
    out = processor(prompts)
    assert out.input_ids.tolist() == [first, [t.pad_id] * gap + second]
    assert out.attention_mask[1].tolist() == [0] * gap + [1] * len(second)
    assert out.position_ids[1].tolist() == [0] * gap + list(range(len(second)))
    assert out.patch_counts.tolist() == [2, 0]
    right = processor(prompts, padding_side="right", length=len(first) + 2)
    assert right.input_ids[1].tolist() == second + [t.pad_id] * (gap + 2)
    assert right.position_ids[1].tolist() == [*range(len(second)), *[0] * (gap + 2)]
    np.testing.assert_array_equal(right.patches, out.patches)
    batch = out.packed
    np.testing.assert_array_equal(batch.segment_ids, out.attention_mask)
    assert batch.patch_coords[0].tolist() == [[0, 0], [0, 1]]


def test_the_model_does_not_see_on_which_side_the_padding_is(processor, tiny_model):
    t = processor.tokenizer
    config = dataclasses.replace(tiny_model, vocab_size=t.vocab_size)
    model = make_decoder(config, image_id=t.image_id, newline_id=t.newline_id)
    prompts = [[picture(8, 16), "What?"], "red", [picture(20, 30, 1), "Where is it?"]]
    left, right = (processor(prompts, padding_side=side) for side in ("left", "right"))
    a, b = (np.asarray(model(jax.tree.map(jnp.asarray, x.packed))) for x in (left, right))
    there = left.attention_mask > 0, right.attention_mask > 0
    # Other blocks, so another order of summation.
    np.testing.assert_allclose(a[there[0]], b[there[1]], atol=2e-5)
    graph, params = nnx.split(model)
    engine = Engine(graph, t, POLICY, batch_size=4, max_new_tokens=4)
    answers = engine.answer(params, [processor.example(p) for p in prompts])
    assert all(not answer.error for answer in answers)


def test_answers_are_learnt_with_their_end(processor):
    t = processor.tokenizer
    out = processor([[picture(8, 8), "What?"], ["Where is it?"]], answers=["red", "over there"])
    for row, answer in enumerate(["red", "over there"]):
        learnt = [*t.encode(answer), t.eos_id]
        assert out.input_ids[row][out.loss_weights[row] > 0].tolist() == learnt
        assert out.labels[row][out.labels[row] >= 0].tolist() == learnt
        at = np.flatnonzero(out.loss_weights[row])[0]
        assert out.input_ids[row, at - 1] == t.answer_id
        assert out.attention_mask[row, 0] == 1  # filled up on the right
    with pytest.raises(UserError, match="1 answers for 2 prompts"):
        processor(["a", "b"], answers=["c"])


@pytest.mark.parametrize("as_array", [False, True])
def test_token_ids_are_taken_as_they_are(processor, as_array):
    t = processor.tokenizer
    ids = np.asarray([270, 271, 272]) if as_array else [270, 271, 272]

    def tokens(*prompt, **kwargs):
        return processor([list(prompt)], **kwargs).input_ids[0].tolist()

    red = t.encode("red")
    assert tokens(ids) == [270, 271, 272]
    assert tokens("red", ids) == [t.bos_id, *red, 270, 271, 272]
    assert tokens(ids, "red") == [270, 271, 272, *red, t.answer_id]
    assert tokens(picture(8, 8), ids) == [*rows(t, 1, 1), 270, 271, 272]
    assert tokens(ids, picture(8, 8)) == [270, 271, 272, *rows(t, 1, 1), t.answer_id]
    assert tokens(ids, answers=["red"]) == [270, 271, 272, *red, t.eos_id]
    assert tokens("red", ask=False) == [t.bos_id, *red]


def test_several_images_stand_where_they_stand(processor, tmp_path):
    t = processor.tokenizer
    picture(16, 8, 1).save(tmp_path / "b.png")
    third = np.asarray(picture(20, 30, 2))
    prompt = [picture(8, 8), "red ", tmp_path / "b.png", " green", third]
    out = processor([prompt])
    expected = [*rows(t, 1, 1), t.bos_id, *t.encode("red "), *rows(t, 2, 1)]
    expected += [*t.encode(" green"), *rows(t, 3, 4), t.answer_id]
    assert out.input_ids[0].tolist() == expected
    assert out.patch_counts.tolist() == [1 + 2 + 12]
    grid = grid_of(20, 30, 8)
    np.testing.assert_array_equal(unpatchify(out.patches[0, 3:], grid, 8), third)
    assert out.image_patches.shape == (15, 192)


def test_both_paddings(tokenizer):
    for value, expected in ((1, 2 / 255 - 1), (255, 1.0)):
        processor = Processor(tokenizer, dataclasses.replace(POLICY, pad_value=value))
        out = processor([picture(4, 4)])
        corner = out.image_patches[0].reshape(8, 8, 3)[-1, -1]
        np.testing.assert_allclose(corner, expected, atol=1e-7)


def test_boxes_in_and_out(processor):
    t = processor.tokenizer
    image = picture(80, 40)  # shrunk to a half
    out = processor([[image, "<box>8, 8, 40, 40</box><point>4, 12</point>?"]])
    assert out.box_scales == (0.5,)
    pieces = [t.piece(i) for i in out.input_ids[0].tolist() if i not in (t.image_id, t.newline_id)]
    assert pieces[1:7] == ["<0x00>", "2", "2", "10", "10", "<0x01>"]
    assert pieces[7:11] == ["<0x02>", "1", "3", "<0x03>"]
    answer = np.asarray([*t.encode("<box>8, 8, 40, 40</box> red", 0.5), t.eos_id, 300, 300])
    assert processor.answers(answer[None], out) == ["<box>8, 8, 40, 40</box> red"]
    (found,) = processor.locations(answer, 0.5)
    assert (found.kind, found.values, found.start, found.stop) == ("box", (8, 8, 40, 40), 0, 6)
    assert processor.decode(answer[1:7], 0.5) == "221010 "


def test_a_malformed_box_in_a_prompt_is_text(processor):
    t = processor.tokenizer
    for text in ("<box>1, 2</box>", "<box>1, 2, 3, 99999</box>", "<box>", "</point><point>"):
        ids = processor([[picture(8, 8), text]]).input_ids[0].tolist()
        assert not {*t.box_ids, *t.point_ids} & set(ids)
        assert processor.decode(ids) == text


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_images_of_any_mode_come_as_their_files_do(processor, tmp_path, mode):
    if mode == "I;16":
        values = np.arange(12 * 20, dtype=np.uint16).reshape(12, 20) * 200
        image = Image.fromarray(values)
        assert image.mode == mode
    else:
        image = picture(12, 20, mode=mode)
    if mode == "RGBA":
        image.putalpha(100)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    given, read = processor([[image]]), processor([[path]])
    np.testing.assert_array_equal(given.patches, read.patches)


def test_a_file_is_turned_upright_and_an_image_is_not(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    picture(8, 24).save(tmp_path / "turned.png", exif=exif)
    assert processor([tmp_path / "turned.png"]).input_ids.shape[1] == 3 * 2 + 2
    assert processor([Image.open(tmp_path / "turned.png")]).input_ids.shape[1] == 4 + 2


def test_an_example_is_a_prompt_too(processor):
    example = Example("a", (image_of_pixels(np.zeros((8, 8, 3), np.uint8)), Text("red")))
    image = Image.new("RGB", (8, 8))
    assert processor.example(example) == example
    for a, b in zip(processor([example]), processor([[image, "red"]]), strict=True):
        np.testing.assert_array_equal(a, b)
    # What holds pixels has a file's bytes as well.
    (held,) = processor.example(picture(5, 6)).images
    again = dataclasses.replace(held, encoded=held.read())
    np.testing.assert_array_equal(again.decode(), held.decode())


def test_nothing_at_all(processor):
    t = processor.tokenizer
    assert processor([]).input_ids.shape == (0, 0)
    assert processor([[], ""]).input_ids.tolist() == [[t.bos_id, t.answer_id]] * 2


def test_what_is_no_prompt_is_told(processor, tmp_path):
    t = processor.tokenizer
    for prompt, message in (
        ([None], "prompt 0: a prompt is of texts, .* not NoneType"),
        ([np.zeros((4, 4, 3))], r"not float64\[4, 4, 3\]"),
        ([np.zeros((4, 4), np.uint8)], r"not uint8\[4, 4\]"),
        ([[1, 2], [[1], [2, 3]]], "not list"),
        ([1.5], "not float"),
        ([[300, t.image_id]], "hold the image placeholder"),
        ([[300, -100]], "-100 is no token id"),
    ):
        with pytest.raises(UserError, match=message):
            processor([prompt])
    with pytest.raises(UserError, match="not one text"):
        processor("What?")
    with pytest.raises(UserError, match="more than length=2"):
        processor(["What colour is it?"], length=2)
    with pytest.raises(BadImageError, match="no such file"):
        processor([tmp_path / "none.png"])
    picture(50, 50).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with pytest.raises(BadImageError, match="prompt 0: image cannot be read"):
        processor([Image.open(tmp_path / "cut.png")])


def test_a_string_that_is_the_path_of_an_image_is_the_image(processor, tmp_path):
    picture(10, 20).save(tmp_path / "a.png")
    (tmp_path / "note.txt").write_text("x")
    found = processor([[str(tmp_path / "a.png"), "What?"], [str(tmp_path / "note.txt")]])
    same = processor([[tmp_path / "a.png", "What?"]])
    assert found.patch_counts.tolist() == [6, 0]
    np.testing.assert_array_equal(found.patches[0], same.patches[0])
    for text in ("nothing.png", "a\0.png", "x" * 5000 + ".png", "See bus.png"):
        assert processor([[text]]).patch_counts.tolist() == [0]
