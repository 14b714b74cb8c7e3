"""Our processor against Hugging Face's `FuyuProcessor` with PIL images, run here."""

import dataclasses
import random

import numpy as np
import pytest
from made_tokenizers import TEXTS, fuyu_json
from PIL import Image

from fuyu_jax.data.processor import FUYU_POLICY, Processor
from fuyu_jax.patches import grid_of, normalise
from fuyu_jax.tokenizer import Tokenizer, coordinate_to_token_value

torch = pytest.importorskip("torch", reason="the referee needs torch")
transformers = pytest.importorskip("transformers", reason="the referee is transformers")
processing = pytest.importorskip("transformers.models.fuyu.processing_fuyu")
pil = pytest.importorskip("transformers.models.fuyu.image_processing_pil_fuyu")

WORDS = [*" ".join(TEXTS).split(" ")[:60], "", " ", "\n", "\n\n", "\t", "😀", "é", "007", "1998"]
# Malformed, so text for both of us.
BOXES = ["<box>1, 2</box>", "<box>1, 2, 3", "</box><point>", "<point>, </point>", "<box></box>"]


class ImageProcessor(pil.FuyuImageProcessorPil):
    def patchify_image(self, image, patch_size=None):
        # transformers 5.23 gives its own function a tensor where it wants an array, and takes the
        # dimension of the patches away from an image of one.
        cut = super().patchify_image(np.asarray(image), patch_size)
        return torch.from_numpy(np.ascontiguousarray(cut))[None]


@pytest.fixture(scope="module")
def referee(tmp_path_factory):
    """(their processor, ours) on the same tokenizer.json."""
    path = fuyu_json(tmp_path_factory.mktemp("fuyu"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    fast.model_input_names = ["input_ids", "attention_mask"]
    return transformers.FuyuProcessor(ImageProcessor(), fast), Processor(Tokenizer(path))


def random_size(rng):
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randint(1, 4), rng.randint(1, 4)
    if kind == 1:
        return 30 * rng.randint(1, 36), 30 * rng.randint(1, 64)
    if kind == 2:  # around the largest size, and beyond
        return rng.randint(1070, 1300), rng.randint(1900, 2300)
    if kind == 3:
        return rng.choice([(1, 1920), (1080, 1), (1080, 1920), (1081, 1920), (1080, 1921), (1, 1)])
    if kind == 4:  # odd ratios, still a pixel high after shrinking
        return rng.choice([(rng.randint(3, 9), rng.randint(1, 5000)), (rng.randint(1, 3000), 7)])
    return rng.randint(1, 700), rng.randint(1, 900)


def random_prompt(rng):
    parts = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
    if rng.random() < 0.3:
        parts.insert(rng.randrange(len(parts)), rng.choice(BOXES))
    return " ".join(parts) + "."  # an empty text is a case of its own


def picture(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_200_sizes_and_prompts(referee):
    theirs, ours = referee
    rng = random.Random(0)
    shrunk = 0
    for i in range(200):
        size, text = random_size(rng), random_prompt(rng)
        image = picture(*size, i)
        expected = theirs(text=text, images=image)
        found = ours([[image, text]])
        np.testing.assert_array_equal(found.input_ids, expected["input_ids"], err_msg=f"{size}")
        np.testing.assert_array_equal(found.attention_mask, expected["attention_mask"])
        # Every float is the same, and so is every byte that it was made of.
        patches = expected["image_patches"].numpy()
        np.testing.assert_array_equal(found.image_patches, patches, err_msg=f"{size}")
        bytes_of = np.rint((patches.astype(np.float64) * 0.5 + 0.5) * 255).astype(np.uint8)
        np.testing.assert_array_equal(found.patches[0], bytes_of)
        shrunk += grid_of(*size, 30).scale < 1
    assert shrunk > 30


def test_a_batch_is_padded_on_the_left_as_theirs(referee):
    theirs, ours = referee
    texts = ["What?", TEXTS[0], "Où est le café ?"]
    images = [picture(40, 50, 0), picture(200, 90, 1), picture(20, 20, 2)]
    expected = theirs(text=texts, images=images)
    found = ours([[i, t] for i, t in zip(images, texts, strict=True)])
    np.testing.assert_array_equal(found.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(found.attention_mask, expected["attention_mask"])
    np.testing.assert_array_equal(found.image_patches, expected["image_patches"].numpy())


def test_adepts_own_padding_is_theirs_at_255(referee):
    theirs, ours = referee
    white = Processor(ours.tokenizer, dataclasses.replace(FUYU_POLICY, pad_value=255))
    image = picture(40, 50, 0)
    expected = theirs(text="What?", images=image, padding_value=255.0)["image_patches"].numpy()
    found = white([[image, "What?"]]).image_patches
    np.testing.assert_array_equal(found, expected)
    assert found[1].reshape(30, 30, 3)[0, 25].tolist() == [1, 1, 1]


def test_every_byte_is_normalised_to_the_same_float():
    values = np.arange(256, dtype=np.uint8)[None]
    image = Image.fromarray(np.repeat(values[..., None], 3, axis=2))
    theirs = ImageProcessor()(image, do_pad=False, return_tensors="np")["images"]
    np.testing.assert_array_equal(np.asarray(theirs).reshape(3, 256)[:1], normalise(values))


def test_where_we_differ_on_purpose(referee):
    theirs, ours = referee
    # Of an empty text they tokenise the space that their tokenizer puts before it.
    image = picture(10, 10, 0)
    expected = theirs(text="", images=image)["input_ids"][0].tolist()
    space = ours.tokenizer._vocabulary.find("▁")
    assert [t for t in expected if t != space] == ours([[image, ""]]).input_ids[0].tolist()
    # A box stays text there: the transformed prompt is thrown away.
    expected = theirs(text="<box>2, 4, 6, 8</box>", images=image)["input_ids"][0].tolist()
    assert not set(ours.tokenizer.box_ids) & set(expected)
    found = ours([[image, "<box>2, 4, 6, 8</box>"]]).input_ids[0].tolist()
    pieces = [ours.tokenizer.piece(i) for i in found[3:]]
    assert pieces == ["<0x00>", "1", "2", "3", "4", "<0x01>", "<0x04>"]
    # A side that shrinks to nothing is an error there, and one pixel here.
    image = picture(1, 4000, 0)
    with pytest.raises(ValueError, match="height=0"):
        theirs(text="What?", images=image)
    assert ours([[image, "What?"]]).patch_counts.tolist() == [64]


def test_coordinates_are_theirs(referee):
    _, ours = referee
    rng = random.Random(1)
    t = ours.tokenizer
    for _ in range(200):
        scale = rng.choice([1.0, 0.5, rng.uniform(0.1, 1)])
        box = [rng.choice([rng.randint(0, 1900), rng.randint(0, 3800) / 2]) for _ in range(4)]
        expected = processing.scale_bbox_to_transformed_image(*box, scale_factor=scale)
        assert [coordinate_to_token_value(v, scale) for v in box] == [int(v) for v in expected]
        # One token an integer, as in transformers 4; 5 joins the digits.
        ids = t.encode(f"<box>{', '.join(map(str, box))}</box>", scale)
        assert [t.piece(i) for i in ids[1:-1]] == [str(v) for v in expected]
        point = processing.scale_point_to_transformed_image(*box[:2], scale_factor=scale)
        ids = t.encode(f"<point>{box[0]}, {box[1]}</point>", scale)
        assert [t.piece(i) for i in ids[1:-1]] == [str(v) for v in point]


def test_boxes_come_back_as_theirs(referee):
    theirs, ours = referee
    rng = random.Random(2)
    t = ours.tokenizer
    for _ in range(50):
        height, width = rng.randint(1, 3000), rng.randint(1, 5000)
        scale = grid_of(height, width, 30).scale
        sequence = []
        for count, marks in ((4, t.box_ids), (2, t.point_ids)):
            values = [t._token_of[rng.randint(0, 960)] for _ in range(count)]
            # Not at the very beginning: they do not see a mark at index 0.
            sequence += [*t.encode("at"), marks[0], *values, marks[1]]
        sizes = torch.tensor([[height, width]])
        (found,) = theirs.post_process_box_coordinates(torch.tensor([sequence]), sizes)
        text = theirs.tokenizer.decode(found).replace(" ", "")
        assert ours.decode(sequence, scale).replace(" ", "") == text
        assert len(ours.locations(sequence, scale)) == 2
