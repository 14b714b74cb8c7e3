"""A run that begins from other weights: Fuyu's, a language model's, an earlier run's."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import fuyu_jax
from fuyu_jax import config as config_lib
from fuyu_jax.errors import UserError
from fuyu_jax.train import Trainer

torch = pytest.importorskip("torch", reason="the referee needs torch: pip install '.[interop]'")
transformers = pytest.importorskip("transformers", reason="the referee is transformers")

from interop_models import fuyu_model, save, text_model  # noqa: E402
from made_tokenizers import fuyu_json, llama_json  # noqa: E402

from fuyu_jax.interop import describe, read_params  # noqa: E402
from fuyu_jax.interop.exporting import to_hugging_face  # noqa: E402
from fuyu_jax.tokenizer import Tokenizer  # noqa: E402


def begin(tiny_config, tmp_path, folder, vocab_size, name="run", **changes):
    described = describe(folder).config
    model = dataclasses.replace(described, vocab_size=vocab_size, patch_size=8)
    config = dataclasses.replace(tiny_config, model=model, init_from=str(folder))
    return config_lib.replace(
        config,
        {
            "workdir": str(tmp_path / name),
            "num_steps": 2,
            "data.tokens_per_row": 256,
            "eval.every": 0,
            **changes,
        },
    )


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def fuyu_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuyu")
    tokenizer = Tokenizer(fuyu_json(folder))
    model = fuyu_model(8, vocab_size=tokenizer.vocab_size)
    model.config.image_token_id = tokenizer.image_id
    return save(model, folder), tokenizer.vocab_size


def test_from_fuyu_and_back(fuyu_folder, tiny_config, tmp_path, capsys):
    folder, vocab_size = fuyu_folder
    config = begin(tiny_config, tmp_path, folder, vocab_size, **{"optim.peak_lr": 1e-5})
    trainer = Trainer(config)
    same(trainer.state.params, read_params(folder, config.model)[0])
    moments = [x for x in jax.tree.leaves(trainer.state.opt_state) if x.ndim]
    assert moments and not any(x.any() for x in moments)
    trainer.run()
    assert f"begun from {folder}: loaded" in capsys.readouterr().out
    # Taken up again, it goes on from its checkpoint, and the folder is not looked at.
    again = Trainer(config_lib.replace(config, {"workdir": str(tmp_path / "run")}))
    assert again.resume() == 2 and again.begun_from == ""
    same(again.state.params, trainer.state.params)
    # What was trained here opens there, and says the same.
    to_hugging_face(tmp_path / "run", tmp_path / "back")
    theirs = transformers.FuyuForCausalLM.from_pretrained(tmp_path / "back")
    ours = fuyu_jax.load(tmp_path / "run")
    ids = [20, 40, 70, 300]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours.logits([ids]), expected, atol=2e-4, rtol=0)


def test_a_language_model_learns_to_see(tiny_config, tmp_path, capsys):
    folder = tmp_path / "llama"
    text = fuyu_vocabulary = llama_json(folder)
    size = len(transformers.PreTrainedTokenizerFast(tokenizer_file=str(text)))
    theirs = text_model("llama", vocab_size=size + 3)
    save(theirs, folder)
    del fuyu_vocabulary
    with pytest.raises(UserError, match=r"model\.vocab_size=0.* need \d+ or more"):
        Trainer(begin(tiny_config, tmp_path, folder, 0))
    assert not (tmp_path / "run").exists()
    config = begin(tiny_config, tmp_path, folder, 2048, **{"model.patch_init": "whiten"})
    trainer = Trainer(config)
    known = theirs.get_input_embeddings().weight.detach().numpy()[:size]
    embedding = np.asarray(trainer.state.params["embedding"][...])
    np.testing.assert_array_equal(embedding[:size], known)
    new = embedding[size:]
    # Around the mean row, and no two alike.
    assert np.abs(new - known.mean(0)).max() < known.std() and len(np.unique(new, axis=0)) > 1000
    # Whitened patches, since this projection is new: unit deviation over the sample.
    kernel = np.asarray(trainer.state.params["patch_projection"]["kernel"][...])
    assert np.isfinite(kernel).all() and kernel.std() > 0
    sample = trainer.data.sample_patches(10_000)
    bias = np.asarray(trainer.state.params["patch_projection"]["bias"][...])
    features = (sample / 255 - 0.5) / 0.5 @ kernel + bias
    assert 0.3 * config.model.init_std < features.std() < 3 * config.model.init_std
    trainer.run()
    out = capsys.readouterr().out
    assert "patch_projection" in out and "rows around the mean row" in out
    origin = json.loads((tmp_path / "run" / "hf" / "origin.json").read_text())
    assert origin["text_type"] == "llama" and origin["extended"]
    # A second run goes on from the first one's parameters, tokenizer and memory of its origin.
    second = Trainer(
        dataclasses.replace(config, init_from=str(tmp_path / "run"), workdir=str(tmp_path / "two"))
    )
    same(second.state.params, trainer.state.params)
    assert second.tokenizer.image_id == trainer.tokenizer.image_id
    assert "begun from step 2" in second.describe()
    assert (tmp_path / "two" / "hf" / "origin.json").is_file()


def test_bad_starts_are_one_line(fuyu_folder, tiny_config, tmp_path):
    folder, vocab_size = fuyu_folder
    good = begin(tiny_config, tmp_path, folder, vocab_size)
    for changes, told in {
        (("init_from", str(tmp_path / "nothing")),): "no such folder",
        (("model.num_layers", 2),): "model.num_layers is 3 there, 2 here",
        (("model.patch_size", 10),): "model.patch_size is 8 there, 10 here",
    }.items():
        with pytest.raises(UserError, match=told) as error:
            Trainer(config_lib.replace(good, dict(changes)))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()


def test_the_configs_are_of_the_models_they_name():
    from fuyu_jax.interop.fuyu import text_fields
    from fuyu_jax.interop.weights import model_shapes

    fuyu = config_lib.load("configs/fuyu_8b.py").model
    count = sum(x.size for x in jax.tree.leaves(model_shapes(fuyu)))
    assert count == 9_408_238_592  # the specification's
    assert text_fields(fuyu)["model_type"] == "persimmon"
    solo = config_lib.load("configs/solo_7b.py").model
    assert text_fields(solo)["model_type"] == "mistral"
    plain = dataclasses.replace(solo, vocab_size=32_000)
    count = sum(x.size for x in jax.tree.leaves(model_shapes(plain)))
    # Mistral-7B's published 7,241,732,096, and a patch projection with bias.
    assert count == 7_241_732_096 + 32 * 32 * 3 * 4096 + 4096
