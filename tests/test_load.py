"""`fuyu_jax.load` against transformers, run here: logits, greedy generation, likelihoods."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import fuyu_jax
from fuyu_jax import config as config_lib
from fuyu_jax.config import MeshConfig
from fuyu_jax.data.example import split_answer
from fuyu_jax.data.layout import lay_out
from fuyu_jax.errors import UserError
from fuyu_jax.generate.loading import load_checkpoint
from fuyu_jax.patches import normalise
from fuyu_jax.train import Trainer

torch = pytest.importorskip("torch", reason="the referee needs torch: pip install '.[interop]'")
transformers = pytest.importorskip("transformers", reason="the referee is transformers")

from interop_models import fuyu_model, save, text_model  # noqa: E402
from made_tokenizers import fuyu_json, llama_json, qwen_json  # noqa: E402

from fuyu_jax.interop.exporting import to_hugging_face  # noqa: E402
from fuyu_jax.interop.importing import to_work_folder  # noqa: E402
from fuyu_jax.tokenizer import Tokenizer  # noqa: E402
from fuyu_jax.tokenizer_extend import extend_tokenizer  # noqa: E402

ROOT = Path(__file__).parent.parent
# Float32 on both sides with sums in other orders; the bound.
LOGITS = 2e-4


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def fuyu(tmp_path_factory):
    """(their model, ours), of patches of 8 pixels and a tokenizer like Fuyu's own."""
    folder = tmp_path_factory.mktemp("fuyu")
    tokenizer = Tokenizer(fuyu_json(folder))
    model = fuyu_model(8, vocab_size=tokenizer.vocab_size, num_attention_heads=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # so that what is said next depends on what was said before
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.mul_(0.1)
            elif "embed" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.config.image_token_id = tokenizer.image_id
    model.model.config.image_token_id = tokenizer.image_id
    model.generation_config.eos_token_id = tokenizer.eos_id
    return model, fuyu_jax.load(save(model, folder))


PROMPTS = [
    ["What is in the picture?"],
    [picture(16, 24), "A bus and 12 people"],
    [picture(13, 30, 1), "is this, and", picture(41, 9, 2), "where is that?"],
    [picture(8, 8, 3), [70, 81, 92]],
    [[20, 40, 70, 300]],
    [picture(70, 5, 4)],
]


def their_inputs(ours, prompts):
    """Left-padded arrays as their model takes them."""
    made = ours.processor(prompts, padding_side="left")
    inputs = {
        "input_ids": torch.tensor(made.input_ids),
        "attention_mask": torch.tensor(made.attention_mask),
    }
    if made.patch_counts.any():
        inputs["image_patches"] = torch.tensor(made.image_patches)[None]
    return made, inputs


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_logits_are_theirs(fuyu, number):
    theirs, ours = fuyu
    made, inputs = their_inputs(ours, [PROMPTS[number]])
    with torch.no_grad():
        expected = theirs(**inputs).logits[0].numpy()
    found = ours.logits(PROMPTS[number])
    assert found.dtype == np.float32 and found.shape == (made.input_ids.shape[1], expected.shape[1])
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)


def test_64_greedy_tokens_are_theirs_batched_and_alone(fuyu):
    theirs, ours = fuyu
    arguments = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    alone = []
    for prompt in PROMPTS:
        _, inputs = their_inputs(ours, [prompt])
        # Forbidding the end is how their program is made to say 64 tokens; ours has `banned`.
        out = theirs.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :]
        alone.append(tuple(out.tolist()))
    assert len(set(alone)) > 3
    made, inputs = their_inputs(ours, PROMPTS)  # padded on the left
    out = theirs.generate(**inputs, **arguments)[:, made.input_ids.shape[1] :]
    assert [tuple(row) for row in out.tolist()] == alone
    end = [ours.tokenizer.eos_id]
    for size in (1, len(PROMPTS), 4):
        found = ours.generate(PROMPTS, 64, batch_size=size, banned=end)
        assert [a.tokens for a in found] == alone


@pytest.mark.parametrize(("beams", "penalty", "ends"), [(2, 1.0, 1), (4, 0.0, 40), (3, 2.0, 40)])
def test_beams_find_their_answers(fuyu, beams, penalty, ends):
    theirs, ours = fuyu
    # Of so many ids each ends an answer, so that finished and unfinished ones compete.
    rng = np.random.default_rng(beams)
    stop = rng.choice(np.arange(5, ours.config.vocab_size), ends, replace=False).tolist()
    expected = []
    for prompt in PROMPTS:
        _, inputs = their_inputs(ours, [prompt])
        out = theirs.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            num_beams=beams,
            length_penalty=penalty,
            eos_token_id=stop,
            pad_token_id=0,
        )[0, inputs["input_ids"].shape[1] :].tolist()
        end = next((i for i, t in enumerate(out) if t in stop), len(out))
        expected.append((tuple(out[:end]), end < len(out)))
    greedy = [a.tokens for a in ours.generate(PROMPTS, 12, eos_ids=stop)]
    for size in (1, 32):
        found = ours.generate(
            PROMPTS,
            12,
            num_beams=beams,
            length_penalty=penalty,
            eos_ids=stop,
            batch_size=size,
        )
        assert [(a.tokens, a.finished) for a in found] == expected
    assert [e[0] for e in expected] != greedy  # the search makes a difference


def test_an_answer_ends_where_their_files_say(fuyu, tmp_path):
    _, ours = fuyu
    whole = ours.generate(PROMPTS, 8, eos_ids=())
    assert all(len(a.tokens) == 8 and not a.finished for a in whole)
    stop = whole[1].tokens[3]
    first = whole[1].tokens.index(stop)
    cut = ours.generate([PROMPTS[1]], 8, eos_ids=[stop])[0]
    assert cut.finished and cut.tokens == whole[1].tokens[:first]
    assert ours.eos_ids == (ours.tokenizer.eos_id,)


def test_fuyu_ends_at_its_end_of_text_whatever_its_files_name(fuyu, tmp_path):
    """Adept's files name </s>, 2; training here ends answers with |ENDOFTEXT|."""
    _, ours = fuyu
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(ours.tokenizer.path).parent / name, tmp_path / name)
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    assert fuyu_jax.load(tmp_path).eos_ids == (ours.tokenizer.eos_id, 2)
    to_work_folder(tmp_path, tmp_path / "work")
    assert fuyu_jax.load(tmp_path / "work").eos_ids == (ours.tokenizer.eos_id, 2)
    generation.write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(UserError, match=r"generation_config.json.*not token ids"):
        fuyu_jax.load(tmp_path)


def test_a_converted_folder_prepares_images_as_its_source_does(fuyu, tmp_path):
    theirs, _ = fuyu
    folder = save(theirs, tmp_path / "source")
    fuyu_json(folder)
    said = {"size": {"height": 40, "width": 56}, "padding_value": 9.0}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    y, x = np.mgrid[:120, :200]
    smooth = np.stack([y, x, x + y], axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "photo.jpg")
    to_work_folder(folder, tmp_path / "work")
    a, b = (
        fuyu_jax.load(f).processor([[tmp_path / "photo.jpg"]]) for f in (folder, tmp_path / "work")
    )
    np.testing.assert_array_equal(a.input_ids, b.input_ids)
    np.testing.assert_array_equal(a.patches, b.patches)
    # Back, the file says how the run made them.
    to_hugging_face(tmp_path / "work", tmp_path / "same")
    assert json.loads((tmp_path / "same" / "preprocessor_config.json").read_text()) == said
    config = json.loads((tmp_path / "work" / "config.json").read_text())
    config["data"] |= {"pad_value": 255, "max_image_width": 80}
    (tmp_path / "work" / "config.json").write_text(json.dumps(config))
    to_hugging_face(tmp_path / "work", tmp_path / "other")
    changed = json.loads((tmp_path / "other" / "preprocessor_config.json").read_text())
    assert changed == {"size": {"height": 40, "width": 80}, "padding_value": 255.0}


def test_score_is_the_sum_of_their_log_probabilities(fuyu):
    theirs, ours = fuyu
    for prompt, text in zip(PROMPTS[:3], ("a bus", "Où", "12 people in 1998."), strict=True):
        made, inputs = their_inputs(ours, [prompt])
        ids = ours.tokenizer.encode(text)
        inputs["input_ids"] = torch.tensor([[*made.input_ids[0].tolist(), *ids]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = theirs(**inputs).logits[0].double()
        at = logits[made.input_ids.shape[1] - 1 : -1].log_softmax(-1)
        expected = sum(at[i, t].item() for i, t in enumerate(ids))
        found = ours.score(prompt, text)
        assert found.logprob == pytest.approx(expected, abs=LOGITS * len(ids))
        assert (found.tokens, found.bytes) == (len(ids), len(text.encode()))
        assert found.is_greedy == (at.argmax(-1).tolist() == ids)
        assert ours.score(prompt, ids) == found
    best = ours.generate(PROMPTS[:1], 3, eos_ids=())[0].tokens
    assert ours.score(PROMPTS[0], best).is_greedy


def test_patches_are_theirs(fuyu):
    _, ours = fuyu
    made = ours.processor([PROMPTS[1]])
    raw = np.asarray(PROMPTS[1][0])
    np.testing.assert_array_equal(made.patches[0, 1].reshape(8, 8, 3), raw[:8, 8:16])
    np.testing.assert_array_equal(made.image_patches[1], normalise(raw[:8, 8:16].reshape(-1)))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_language_model_is_opened_as_it_is(kind, tmp_path):
    """Its own vocabulary, no marks: what it says of a text is what it said before."""
    folder = tmp_path / "text"
    tokenizer = (qwen_json if kind.startswith("qwen") else llama_json)(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    model = text_model(kind, vocab_size=len(fast) + 3)
    ours = fuyu_jax.load(save(model, folder))
    text = "Where is the café? 3 km."
    ids = fast.encode(text, add_special_tokens=False)
    ids = ids if kind.startswith("qwen") else [fast.convert_tokens_to_ids("<s>"), *ids]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours.logits([text]), expected, atol=LOGITS, rtol=0)
    np.testing.assert_allclose(ours.logits([ids]), expected, atol=LOGITS, rtol=0)
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False
    )[0, len(ids) :]
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    found = ours.generate([[text], [ids[:3]]], 20, banned=ends)
    assert found[0].tokens == tuple(out.tolist())
    with pytest.raises(UserError, match="without image tokens"):
        ours.logits([picture(8, 8), text])


def test_without_a_tokenizer_ids_can_be_given(tmp_path):
    model = text_model("llama")
    ours = fuyu_jax.load(save(model, tmp_path / "bare"))
    ids = [1, 7, 8, 30]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours.logits([ids]), expected, atol=LOGITS, rtol=0)
    assert ours.generate([[ids]], 2)[0].text == ""
    with pytest.raises(UserError, match=r"no tokenizer\.json .* give token ids"):
        ours.logits(["text"])


SHARDED = """
import json, sys
import numpy as np
import fuyu_jax
from fuyu_jax.config import MeshConfig
model = fuyu_jax.load(sys.argv[1], mesh=MeshConfig(data=2, fsdp=2, tensor=2))
kernel = model.params["layers"]["mlp"]["up"]["kernel"][...]
pixels = (np.arange(13 * 30 * 3) % 251).astype(np.uint8).reshape(13, 30, 3)
prompts = [[pixels, "What is it?"], ["A bus"], [[20, 40]], ["Where?", pixels]]
print(json.dumps({
    "part": kernel.addressable_shards[0].data.size / kernel.size,
    "logits": model.logits(prompts[0]).tolist(),
    "tokens": [a.tokens for a in model.generate(prompts, 8, batch_size=4)],
}))
"""


def test_sharded_over_a_mesh_of_eight(fuyu, tmp_path):
    theirs, ours = fuyu
    folder = save(theirs, tmp_path / "again")
    fuyu_json(folder)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    run = [sys.executable, "-c", SHARDED, str(folder)]
    done = subprocess.run(run, env=env, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["part"] == 1 / 4  # of fsdp × tensor
    pixels = (np.arange(13 * 30 * 3) % 251).astype(np.uint8).reshape(13, 30, 3)
    prompts = [[pixels, "What is it?"], ["A bus"], [[20, 40]], ["Where?", pixels]]
    np.testing.assert_allclose(found["logits"], ours.logits(prompts[0]), atol=LOGITS, rtol=0)
    assert found["tokens"] == [list(a.tokens) for a in ours.generate(prompts, 8)]


def test_bad_input_is_one_line(fuyu, tmp_path, monkeypatch):
    _, ours = fuyu
    for call, told in {
        lambda: fuyu_jax.load(tmp_path / "nothing"): "no such folder",
        lambda: fuyu_jax.load(tmp_path): "no config.json",
        lambda: fuyu_jax.load(tmp_path, dtype="float8"): "float32",
        lambda: fuyu_jax.load(tmp_path, pad_value=256): "0 to 255",
        lambda: ours.logits([[1 << 20]]): "the model has 0 to",
        lambda: ours.logits([3.5]): "a prompt is of texts",
        lambda: ours.logits([[]]): "no token",
        lambda: ours.score(["a"], ""): "no token",
        lambda: ours.generate("one text"): "a list of prompts",
        lambda: ours.generate([["a"]], 0): "1 or more",
    }.items():
        with pytest.raises(UserError, match=told) as error:
            call()
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        fuyu_jax.load("adept/fuyu-8b")


def test_the_folder_says_how_images_are_prepared(fuyu, tmp_path):
    theirs, _ = fuyu
    folder = save(theirs, tmp_path / "own")
    fuyu_json(folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"height": "a", "width": 56}}')
    with pytest.raises(UserError, match="not of positive integers"):
        fuyu_jax.load(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"size": {"height": 40, "width": 56}, "padding_value": 9.0}'
    )
    ours = fuyu_jax.load(folder)
    made = ours.processor([[picture(100, 20)]])
    assert made.patch_counts[0] == 5  # 40 × 8 pixels
    small = ours.processor([[picture(3, 8)]]).patches[0, 0].reshape(8, 8, 3)
    assert (small[3:] == 9).all()
    white = fuyu_jax.load(folder, pad_value=255)
    assert (white.processor([[picture(3, 8)]]).patches[0, 0].reshape(8, 8, 3)[3:] == 255).all()


def test_one_of_our_own_checkpoints(tiny_config, tmp_path):
    """What was trained here answers as the engine of its run does, from the folder alone."""
    trainer = Trainer(config_lib.replace(tiny_config, {"workdir": str(tmp_path / "run")}))
    trainer.run()
    ours = fuyu_jax.load(tmp_path / "run", mesh=MeshConfig(1))
    source = trainer.sources.open("validation")
    asked = [split_answer(source[i])[0] for i in range(4)]
    prompts = [list(p.segments) for p in asked]  # with the answers given before
    expected = trainer.engine.answer(trainer.state.params, asked)
    engine = trainer.engine
    found = ours.generate(prompts, engine.max_new_tokens, banned=engine.banned)
    tokens = [a.tokens for a in found]
    assert tokens == [a.tokens for a in expected]
    ids = lay_out(asked[0], ours.tokenizer, ours.processor.policy, ask=True).tokens
    assert ours.logits(prompts[0]).shape == (len(ids), ours.tokenizer.vocab_size)
    half = fuyu_jax.load(tmp_path / "run" / "checkpoints" / "8", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    # bfloat16 has 8 bits: two layers of it stay within a few parts in a hundred.
    a, b = half.logits(prompts[0]), ours.logits(prompts[0])
    assert np.abs(a - b).max() < 0.1 * np.abs(b).max()


def test_a_work_folder_without_image_tokens(tmp_path):
    folder = tmp_path / "text"
    size = Tokenizer(extend_tokenizer(llama_json(folder), tmp_path / "more").tokenizer.path)
    model = text_model("llama", vocab_size=size.vocab_size)
    to_work_folder(save(model, folder), tmp_path / "run", image_tokens=False)
    ours = fuyu_jax.load(tmp_path / "run")
    there = fuyu_jax.load(folder)
    np.testing.assert_array_equal(ours.logits(["A bus"]), there.logits(["A bus"]))


def test_a_run_with_the_attention_of_another_machine(tmp_path, capsys):
    """What it was trained with is replaced here, and told; what is asked for is not."""
    folder, run = tmp_path / "text", tmp_path / "run"
    size = Tokenizer(extend_tokenizer(llama_json(folder), tmp_path / "more").tokenizer.path)
    model = text_model("llama", vocab_size=size.vocab_size)
    to_work_folder(save(model, folder), run, image_tokens=False)
    expected = fuyu_jax.load(run).logits(["A bus"])
    config = json.loads((run / "config.json").read_text())
    config["model"]["attention_backend"] = "splash"
    (run / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(fuyu_jax.load(run).logits(["A bus"]), expected)
    assert 'backend "splash" runs on TPU and this is cpu' in capsys.readouterr().out
    with pytest.raises(UserError, match='backend "pallas" runs on GPU and this is cpu'):
        load_checkpoint(run, lambda c: config_lib.replace(c, {"model.attention_backend": "pallas"}))


def test_a_hub_id(fuyu, tmp_path, monkeypatch):
    """What a hub would give is a folder here."""
    theirs, ours = fuyu
    folder = save(theirs, tmp_path / "hub")
    fuyu_json(folder)
    asked = {}

    def snapshot_download(name, **arguments):
        asked.update(arguments, name=name)
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    found = fuyu_jax.load("adept/fuyu-8b").logits([[20, 40]])
    np.testing.assert_array_equal(found, ours.logits([[20, 40]]))
    assert asked["name"] == "adept/fuyu-8b" and "*.bin" not in asked["allow_patterns"]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickles .* are not read"):
        fuyu_jax.load("adept/fuyu-8b")
