"""Text models of other families read here against transformers, and what is new put on top."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="the referee: pip install -e '.[interop]'")
pytest.importorskip("transformers", reason="the referee: pip install -e '.[interop]'")

import jax
import torch
from interop_models import (
    IMAGE,
    TEXT,
    check_logits,
    fuyu_model,
    one_batch,
    our_logits,
    pixels,
    save,
    text_model,
    their_logits,
)
from safetensors.torch import load_file, save_file

from fuyu_jax.config import ModelConfig
from fuyu_jax.errors import UserError
from fuyu_jax.interop import describe, read_params
from fuyu_jax.interop.fuyu import text_fields


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved random model of each kind, made when asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            model = text_model(kind)
            made[kind] = model, save(model, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def text_rows(seed, count=2, length=31):
    return np.random.default_rng(seed).integers(7, 61, (count, length)).tolist()


@pytest.mark.parametrize("kind", TEXT)
def test_logits(folders, kind):
    model, folder = folders(kind)
    params, report = read_params(folder)
    assert set(report.new) == {"patch_projection/kernel", "patch_projection/bias"}
    config = describe(folder).config
    rows = text_rows(0)
    batch = one_batch(rows, config.patch_channels)
    if not config.window:  # less to compile; the backends are compared in test_attention
        config = dataclasses.replace(config, attention_backend="reference")
    check_logits(our_logits(config, params, batch), their_logits(model, batch.tokens), batch)


@pytest.mark.parametrize("text", ["llama-stretched", "qwen2-tied", "qwen3"])
def test_fuyu_over_another_text_model(tmp_path, text):
    """What a grown encoder-free model goes back as."""
    model = fuyu_model(text=text)
    params, report = read_params(save(model, tmp_path))
    assert not report.new
    config = describe(tmp_path).config
    batch = one_batch([[IMAGE] * 6 + text_rows(1)[0]], config.patch_channels)
    theirs = their_logits(model, batch.tokens, pixel_values=pixels(batch.patches[:, :6]))
    check_logits(our_logits(config, params, batch), theirs, batch)


@pytest.mark.parametrize("kind", TEXT)
def test_a_config_written_is_the_config_read(folders, kind):
    described = describe(folders(kind)[1])
    written = text_fields(described.config, described.text_type)
    assert written["model_type"] == described.text_type
    # Unasked, the first type that can say it all is taken; reading it back gives the same model.
    again = text_fields(described.config)
    assert again["model_type"] in (described.text_type, "llama")


def test_a_model_that_no_type_can_say_is_told():
    with pytest.raises(UserError, match=r"nearest, \"llama\", has not.*0.5 is not"):
        text_fields(ModelConfig(vocab_size=8, norm="rmsnorm", mlp="silu_gated", qk_norm=False))


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied"])
def test_new_rows_of_the_vocabulary(folders, kind):
    """Old ids keep their logits exactly; new rows lie around the mean row, by seed."""
    model, folder = folders(kind)
    old = describe(folder).config
    config = dataclasses.replace(old, vocab_size=70, patch_size=2)
    params, report = read_params(folder, config, seed=3, first_new=59)
    again, _ = read_params(folder, config, seed=3, first_new=59)
    other, _ = read_params(folder, config, seed=4, first_new=59)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    tables = ["embedding"] if old.tie_embeddings else ["embedding", "head/kernel"]
    assert all(report.new[path] == "11 rows around the mean row" for path in tables)
    rows = [[t for t in row if t < 59] for row in text_rows(2)]
    batch = one_batch(rows, config.patch_channels)
    ours = our_logits(config, params, batch)[..., :59]
    check_logits(ours, their_logits(model, batch.tokens)[..., :59], batch)
    table = np.asarray(params["embedding"][...])
    known, new = table[:59], table[59:]
    assert np.all(new != np.asarray(other["embedding"][...])[59:])
    distance = np.abs(new - known.mean(0)) / known.std()
    assert 0.01 < distance.mean() < 0.2  # a tenth of the spread of old rows


def test_what_is_new_is_drawn_as_the_model_draws_it(folders):
    _, folder = folders("mistral")
    config = dataclasses.replace(
        describe(folder).config, image_positions="fourier", patch_init_std=0.07
    )
    params, report = read_params(folder, config, seed=5)
    assert len(report.new) == 3
    kernel = np.asarray(params["patch_projection"]["kernel"][...])
    assert abs(kernel.std() / 0.07 - 1) < 0.02  # 86,400 numbers
    assert not np.any(params["patch_projection"]["bias"][...])
    assert np.any(params["patch_position"]["kernel"][...])


def changed(folder, target, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(raw))
    return describe(target).config


@pytest.mark.parametrize("kind", ["llama-stretched", "llama-linear", "qwen2"])
def test_rotary_fields_of_older_configs(folders, tmp_path, kind):
    """4.x has `rope_theta` and `rope_scaling` (whose kind may be `type`) outside."""
    _, folder = folders(kind)
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = {"type": kind, **rope} if rope else None
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert describe(tmp_path).config == describe(folder).config


def test_windows(folders, tmp_path):
    mistral, qwen = folders("mistral")[1], folders("qwen2")[1]
    assert changed(mistral, tmp_path, sliding_window=None).window == 0
    assert changed(mistral, tmp_path).window == 5
    sliding = dict(use_sliding_window=True, sliding_window=9, layer_types=None)
    assert changed(qwen, tmp_path, **sliding, max_window_layers=0).window == 9
    assert changed(qwen, tmp_path, **sliding, max_window_layers=3).window == 0
    with pytest.raises(UserError, match="some layers have a sliding window"):
        changed(qwen, tmp_path, **sliding, max_window_layers=2)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(hidden_act="gelu"), r"'gelu' is not supported; did you mean"),
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), r"'dynamic' is not"),
        (dict(rope_parameters={"full_attention": {}}), r"differ from layer to layer"),
        (dict(partial_rotary_factor=0.5), r"turns whole heads"),
        (dict(num_key_value_heads=3), r"4 heads do not divide over 3"),
        (dict(model_type="qwen2_moe"), r'"qwen2_moe" is not supported; did you mean "qwen2"'),
        (dict(model_type="gpt2"), r'"gpt2" is not supported; '),
    ],
)
def test_unsupported_values_are_told_in_one_line(folders, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        changed(folders("llama")[1], tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_tied_head_may_be_there_but_not_differ(folders, tmp_path):
    _, folder = folders("qwen2-tied")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_params(tmp_path)[1].ignored == ("lm_head.weight",)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + torch.eye(61, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight differs from the embedding"):
        read_params(tmp_path)
