"""Fuyu's weights read here against transformers, on random weights of its shape."""

import json
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="the referee: pip install -e '.[interop]'")
pytest.importorskip("transformers", reason="the referee: pip install -e '.[interop]'")

import jax
import torch
from interop_models import (
    IMAGE,
    NEWLINE,
    check_logits,
    fuyu_model,
    one_batch,
    our_logits,
    pixels,
    save,
    their_logits,
)
from safetensors.torch import load_file, save_file

from fuyu_jax.batch import PackedBatch
from fuyu_jax.errors import UserError
from fuyu_jax.interop import describe, read_params
from fuyu_jax.patches import grid_of, patchify


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The model, its folder, and our config and parameters of it."""
    model = fuyu_model()
    folder = save(model, tmp_path_factory.mktemp("fuyu"))
    params, report = read_params(folder)
    assert not report.new and not report.ignored
    return model, folder, describe(folder).config, params


def image(rows, columns):
    return ([IMAGE] * columns + [NEWLINE]) * rows


def text(rng, length):
    return [1, *rng.integers(7, 61, length).tolist()]


def rows_of(case, rng):
    return {
        "text": [text(rng, 11)],
        "image": [image(2, 3) + text(rng, 7)],
        "interleaved": [text(rng, 4) + image(3, 1) + text(rng, 5) + image(1, 4) + text(rng, 6)],
        "long": [image(9, 6) + text(rng, 30)],
    }[case]


def their_image_logits(model, batch, **arguments):
    given = [p[: (t == IMAGE).sum()] for p, t in zip(batch.patches, batch.tokens, strict=True)]
    patches = np.concatenate(given)
    if len(patches):
        arguments["pixel_values"] = pixels(patches)[None]
    return their_logits(model, batch.tokens, **arguments)


@pytest.mark.parametrize("case", ["text", "image", "interleaved", "long"])
def test_logits(reference, case):
    model, _, config, params = reference
    batch = one_batch(rows_of(case, np.random.default_rng(1)), config.patch_channels)
    theirs = their_image_logits(model, batch)
    check_logits(our_logits(config, params, batch), theirs, batch)


def test_logits_of_a_left_padded_batch(reference):
    model, _, config, params = reference
    rng = np.random.default_rng(2)
    rows = [image(2, 3) + text(rng, 12), text(rng, 5), image(1, 2) + text(rng, 4)]
    right = one_batch(rows, config.patch_channels)
    size = right.tokens.shape[1]
    left = PackedBatch(*(np.zeros_like(x) for x in right[:4]), *right[4:])
    for i, row in enumerate(rows):
        for ours, theirs in zip(left[:3], right[:3], strict=True):
            ours[i, size - len(row) :] = theirs[i, : len(row)]
    real = left.segment_ids > 0
    theirs = their_image_logits(
        model,
        left,
        attention_mask=torch.tensor(real.astype(np.int64)),
        # Without them forward() would count from the padding on.
        position_ids=torch.tensor(left.positions, dtype=torch.long),
    )
    ours = our_logits(config, params, left)
    check_logits(ours, theirs, left)
    # And they are what the rows have where padding comes after them, as we train.
    alone = our_logits(config, params, right)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(ours[i, -len(row) :], alone[i, : len(row)], atol=2e-4)


@pytest.mark.parametrize("height,width", [(8, 20), (13, 5), (3, 3), (21, 33)])
def test_logits_of_images_of_any_size(reference, height, width):
    """Their processor's patches through their model, ours through ours: pixel order included."""
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    model, _, config, params = reference
    rng = np.random.default_rng(height)
    raw = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    p = config.patch_size
    grid = grid_of(height, width, p)
    batch = one_batch([image(grid.rows, grid.columns) + text(rng, 4)], config.patch_channels)
    batch.patches[0, : grid.rows * grid.columns] = patchify(raw, grid, p)
    room = ((0, -height % p), (0, -width % p), (0, 0))
    padded = np.pad(raw.astype(np.float32), room, constant_values=1.0)
    normal = ((padded / 255 - 0.5) / 0.5).transpose(2, 0, 1)
    patches = FuyuImageProcessorPil(patch_size={"height": p, "width": p}).patchify_image(normal)
    patches = torch.tensor(np.asarray(patches, np.float32))
    theirs = their_logits(model, batch.tokens, pixel_values=patches)
    check_logits(our_logits(config, params, batch), theirs, batch)


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_attention_heads=8, hidden_size=64, num_hidden_layers=5),
        dict(num_attention_heads=1, hidden_size=24, num_hidden_layers=1, intermediate_size=17),
        dict(num_attention_heads=3, hidden_size=48, rope_theta=777.0, partial_rotary_factor=0.75),
        dict(qk_layernorm=False, layer_norm_eps=1e-3, tie_word_embeddings=True),
    ],
    ids=["deep", "one-head", "rotary", "tied"],
)
def test_logits_at_other_sizes(tmp_path, changes):
    model = fuyu_model(patch_size=3, **changes)
    params, _ = read_params(save(model, tmp_path))
    config = describe(tmp_path).config
    batch = one_batch(rows_of("interleaved", np.random.default_rng(3)), config.patch_channels)
    theirs = their_image_logits(model, batch)
    check_logits(our_logits(config, params, batch), theirs, batch)


def to_hub(name):
    """Names of the hub's files and of transformers up to 4.51."""
    name = name.replace("model.vision_embed_tokens", "vision_embed_tokens")
    name = name.replace("model.language_model.", "language_model.model.")
    return re.sub("^lm_head", "language_model.lm_head", name)


def to_adept(name):
    name = name.replace("model.vision_embed_tokens", "vit_encoder.linear_encoder")
    name = name.replace("model.language_model.embed_tokens", "embedding.word_embeddings")
    name = name.replace("embedding.word_embeddings", "language_model.embedding.word_embeddings")
    name = name.replace("model.language_model.", "language_model.encoder.")
    name = name.replace("self_attn", "self_attention")
    return re.sub("^lm_head", "language_model.word_embeddings_for_head", name)


def flat_config(folder):
    """As the hub has it: one object, and 4.x's rotary fields."""
    raw = json.loads((folder / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    text = {k: v for k, v in text.items() if k not in ("model_type", "architectures", "dtype")}
    raw = {**text, **raw, "rope_theta": rope["rope_theta"], "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(raw))


def test_what_is_left_out_of_text_config_stands_outside(reference, tmp_path):
    """transformers 4.36 to 4.44 wrote all fields outside, and inside what is no default."""
    shutil.copyfile(reference[1] / "config.json", tmp_path / "config.json")
    flat_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    heads = raw.pop("num_attention_heads")
    raw["text_config"] = {"model_type": "persimmon", "num_attention_heads": heads}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "num_attention_heads": 64}))
    assert describe(tmp_path).config == reference[2]


def newest(model):
    """A model's tensors by their names in memory; `save_pretrained` of 5.23 writes others."""
    return {k: v.contiguous() for k, v in model.state_dict().items()}


def test_newest_names(reference, tmp_path):
    model, folder, _, params = reference
    tensors = newest(model)
    assert tensors.keys() != load_file(folder / "model.safetensors").keys()
    assert all(k.startswith(("model.", "lm_head.")) for k in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    jax.tree.map(np.testing.assert_array_equal, read_params(tmp_path)[0], params)


@pytest.mark.parametrize("generation", [to_hub, to_adept])
def test_older_names(reference, tmp_path, generation):
    model, folder, config, params = reference
    tensors = {generation(k): v for k, v in newest(model).items()}
    assert not any(k.startswith("model.") for k in tensors)
    tensors["image_patch_projection.weight"] = torch.zeros(2)
    tensors["language_model.encoder.layers.0.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    flat_config(tmp_path)
    read, report = read_params(tmp_path)
    assert len(report.ignored) == 2
    assert describe(tmp_path).config == config
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_older_names_are_what_transformers_takes_too(reference, tmp_path):
    """The hub's generation opens in the referee with the same result."""
    import transformers

    model, folder, config, params = reference
    tensors = {to_hub(k): v for k, v in newest(model).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    opened = transformers.FuyuForCausalLM.from_pretrained(tmp_path)
    batch = one_batch(rows_of("image", np.random.default_rng(4)), config.patch_channels)
    theirs = their_image_logits(opened, batch)
    np.testing.assert_array_equal(theirs, their_image_logits(model, batch))
    check_logits(our_logits(config, params, batch), theirs, batch)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(reference, tmp_path, dtype):
    model = fuyu_model().to(getattr(torch, dtype))
    params, _ = read_params(save(model, tmp_path, max_shard_size="20KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    theirs = model.state_dict()["model.language_model.embed_tokens.weight"].float().numpy()
    np.testing.assert_array_equal(params["embedding"][...], theirs)
    kept, _ = read_params(tmp_path, dtype="bfloat16")
    assert all(x.dtype == jax.numpy.bfloat16 for x in jax.tree.leaves(kept))
    config = reference[2]
    batch = one_batch(rows_of("image", np.random.default_rng(5)), config.patch_channels)
    theirs = their_image_logits(model.float(), batch)
    check_logits(our_logits(config, params, batch), theirs, batch)


def broken(reference, target, change_config=None, change=None):
    model, folder = reference[:2]
    raw = json.loads((folder / "config.json").read_text())
    if change_config:
        change_config(raw)
    (target / "config.json").write_text(json.dumps(raw))
    tensors = newest(model)
    if change:
        change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


NORM = "model.language_model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop(NORM), rf"no tensor {NORM} 32$"),
        (lambda t: t.update({NORM: torch.zeros(31)}), rf"tensor {NORM} is 31, but config.* 32"),
        (lambda t: t.update({"extra.weight": torch.zeros(2, 3)}), r"extra.weight 2×3 has no place"),
        (
            lambda t: t.update({"language_model.lm_head.weight": torch.zeros(61, 32)}),
            r"are the same tensor",
        ),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)}), r"is I8; weights are read"),
    ],
    ids=["missing", "shape", "unexpected", "twice", "type"],
)
def test_tensors_that_do_not_fit_are_told_in_one_line(reference, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        read_params(broken(reference, tmp_path, change=change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.update(model_type="fuyuu"), r'"fuyuu" is not supported; did you mean "fuyu"'),
        (lambda c: c["text_config"].update(model_type="mixtral"), r'did you mean "mistral"'),
        (
            lambda c: c["text_config"].update(hidden_act="relu"),
            r'"relu" is not|did you mean "relu2',
        ),
        (lambda c: c["text_config"]["rope_parameters"].pop("rope_theta"), r'no "rope_theta" in it'),
        (lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"), r"'yarn' is not"),
        (lambda c: c["text_config"].pop("hidden_size"), r'no "hidden_size" in it'),
        (lambda c: c["text_config"].update(layer_norm_eps="x"), r"\"layer_norm_eps\" is 'x', not"),
        (
            lambda c: c["text_config"]["rope_parameters"].update(rope_theta="x"),
            r"\"rope_theta\" is 'x', not a number",
        ),
        (lambda c: c["text_config"].update(num_hidden_layers="3"), r"'3', not a positive integer"),
        (lambda c: c["text_config"].update(num_attention_heads=5), r"does not divide into 5 heads"),
        (lambda c: c.update(num_channels=1), r'"num_channels": 1 is not supported'),
        (lambda c: c.update(quantization_config={}), r"quantised"),
    ],
)
def test_configs_that_are_not_supported_are_told_in_one_line(reference, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        read_params(broken(reference, tmp_path, change))
    assert "\n" not in str(error.value)


def test_a_config_of_another_model_is_told(reference):
    import dataclasses

    _, folder, config, _ = reference
    with pytest.raises(UserError, match=r"model.num_layers is 3 there, 4 here"):
        read_params(folder, dataclasses.replace(config, num_layers=4))
    with pytest.raises(UserError, match=r"vocab_size=50 is less"):
        read_params(folder, dataclasses.replace(config, vocab_size=50))


def test_pickles_are_refused_with_the_reason(reference, tmp_path):
    model, folder, _, _ = reference
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match=r"no \*.safetensors in it"):
        read_params(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickles .* run code .* save_pretrained"):
        read_params(tmp_path)
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"pickles"):
        read_params(tmp_path)


def test_broken_files_are_told(reference, tmp_path):
    folder = reference[1]
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    whole = (folder / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def moved(begin, end):
        """The last tensor with other bytes than its shape has."""
        changed = json.loads(json.dumps(header))
        name = max(changed, key=lambda k: changed[k].get("data_offsets", [0, 0])[1])
        first, stop = changed[name]["data_offsets"]
        changed[name]["data_offsets"] = [first + begin, stop + end]
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + data

    for content, message in (
        (moved(0, -4), r"not those of its shape"),
        (moved(4, 0), r"not those of its shape"),
        (moved(-len(data) - 4, -len(data) - 4), r"not those of its shape"),
        (whole[:-100], r"cut off: \d+ bytes of \d+"),
        (b"\x80\x04" + whole[:50], r"not a safetensors file"),
        (b"", r"not a safetensors file"),
        ((20).to_bytes(8, "little") + b'{"a": {"dtype": 1}}  ', r"not a safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_params(tmp_path)
    file.unlink()
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ('{"weight_map": {"a": "gone.safetensors"}}', r"names gone.safetensors, which is not"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"which is not there"),
        ("[]", r"not an index"),
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=message):
            read_params(tmp_path)
