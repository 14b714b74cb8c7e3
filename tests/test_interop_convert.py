"""Hugging Face folders to work folders and back, from the shell and in memory."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the referee: pip install -e '.[interop]'")
pytest.importorskip("transformers", reason="the referee: pip install -e '.[interop]'")

import jax
import torch
import transformers
from flax import nnx
from interop_models import (
    IMAGE,
    check_logits,
    fuyu_model,
    one_batch,
    our_logits,
    pixels,
    save,
    text_model,
    their_logits,
)
from made_tokenizers import fuyu_json, llama_json, sentencepiece_model
from safetensors.torch import load_file
from tokenizers import Tokenizer as Fast

from fuyu_jax import checkpoint, errors
from fuyu_jax.checkpoint import Checkpoints
from fuyu_jax.config import MeshConfig, TrainConfig
from fuyu_jax.errors import UserError
from fuyu_jax.interop import convert, describe, importing, read_params
from fuyu_jax.interop.exporting import to_hugging_face
from fuyu_jax.interop.importing import to_work_folder
from fuyu_jax.interop.store import StoredParams
from fuyu_jax.interop.tensors import read_header
from fuyu_jax.interop.tokenizer_file import takes_images, write_tokenizer_json
from fuyu_jax.interop.weights import model_shapes
from fuyu_jax.model import make_decoder
from fuyu_jax.parallel.mesh import make_mesh, paths
from fuyu_jax.tokenizer import EOS_PIECE, IMAGE_PIECE, NEWLINE_PIECE
from fuyu_jax.tokenizer_extend import extend_tokenizer

ROOT = Path(__file__).parent.parent


def bits(folder):
    """Every tensor of a folder by name, as bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {k: (v.dtype, v.view(torch.uint8).numpy()) for k, v in load_file(file).items()}
    return found


def by_newest_names(model, folder):
    """Saves a model under its names in memory, so that a round trip must give the same names."""
    from safetensors.torch import save_file

    save(model, folder)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fuyu_jax.interop.convert", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("text", ["persimmon", "qwen2-tied"])
def test_round_trip_is_bit_equal(tmp_path, monkeypatch, text, dtype):
    model = fuyu_model(text=text).to(getattr(torch, dtype))
    if dtype == "bfloat16":  # some tensors of another type, as some files have them
        for layer in model.model.language_model.layers[:2]:
            layer.input_layernorm.float()
    source = by_newest_names(model, tmp_path / "source")
    to_work_folder(source, tmp_path / "work")
    written = to_hugging_face(tmp_path / "work", tmp_path / "back", limit=30_000)
    assert written.model_type == f"fuyu over {text.split('-')[0]}"
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    ours, theirs = bits(tmp_path / "back"), bits(source)
    assert ours.keys() == theirs.keys()
    for name, (kind, data) in theirs.items():
        assert ours[name][0] == kind, name
        np.testing.assert_array_equal(ours[name][1], data, err_msg=name)
    # And through training's own checkpoints, whose masters are float32, in several pieces.
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1000)
    config = checkpoint.read_config(tmp_path / "work")
    checkpoints = Checkpoints(tmp_path / "work")
    mesh = make_mesh(MeshConfig())
    params = checkpoints.restore_params(0, model_shapes(config.model), mesh)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    checkpoints.save(7, params, {"count": jax.numpy.zeros(())}, {"row": 0}, config)
    checkpoints.close()
    stored = StoredParams(tmp_path / "work" / "checkpoints" / "7")
    path = "layers/mlp/up/kernel"
    assert stored.chunk(path) != stored.shape(path) and stored.chunk("embedding")[0] < 61
    to_hugging_face(tmp_path / "work", tmp_path / "again")
    again = bits(tmp_path / "again")
    assert all(np.array_equal(again[n][1], data) for n, (_, data) in theirs.items())


def test_transformers_opens_what_is_written_without_a_flag(tmp_path):
    """Model and processor; a model that was trained here between."""
    fuyu_json(tmp_path / "source")
    fast = Fast.from_file(str(tmp_path / "source" / "tokenizer.json"))
    model = fuyu_model(patch_size=6, vocab_size=fast.get_vocab_size())
    model.config.image_token_id = fast.token_to_id("|SPEAKER|")
    save(model, tmp_path / "source")
    result = run(tmp_path / "source", tmp_path / "work")
    assert result.returncode == 0, result.stderr
    result = run(tmp_path / "work", tmp_path / "back")
    assert "as fuyu over persimmon" in result.stdout, result.stderr
    opened, told = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(told.values()), told
    assert type(opened).__name__ == "FuyuForCausalLM"
    assert opened.config.image_token_id == model.config.image_token_id
    for (name, a), b in zip(model.named_parameters(), opened.parameters(), strict=True):
        assert torch.equal(a, b), name
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    assert type(processor).__name__ == "FuyuProcessor"
    assert processor.image_processor.patch_size["height"] == 6
    assert processor.tokenizer("A bus")["input_ids"] == fast.encode("A bus").ids
    assert "images" not in result.stdout
    assert takes_images(tmp_path / "back" / "tokenizer.json")


def test_a_text_model_becomes_an_encoder_free_one_and_goes_back(tmp_path):
    llama_json(tmp_path / "source")
    size = Fast.from_file(str(tmp_path / "source" / "tokenizer.json")).get_vocab_size()
    model = text_model("llama", vocab_size=size + 3)
    save(model, tmp_path / "source")
    report = to_work_folder(tmp_path / "source", tmp_path / "work", patch_size=4, seed=1)
    config = checkpoint.read_config(tmp_path / "work").model
    assert config.vocab_size > size + 900 and config.patch_size == 4
    new = config.vocab_size - size  # the file's three unused rows too
    assert report.new["embedding"] == f"{new} rows around the mean row"
    written = to_hugging_face(tmp_path / "work", tmp_path / "back")
    assert "fuyu over llama" in str(written)
    # Their processor takes a token away that only Fuyu's own vocabulary has before an image.
    assert len(written.notes) == 1 and "no images" in written.notes[0]
    opened = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    params, read = read_params(tmp_path / "back")
    assert not read.new
    image = opened.config.image_token_id
    batch = one_batch([[IMAGE] * 5 + list(range(20, 50))], config.patch_channels)
    ours = our_logits(config, params, batch)
    tokens = np.where(batch.tokens == IMAGE, image, batch.tokens)
    theirs = their_logits(opened, tokens, pixel_values=pixels(batch.patches[:, :5]))
    check_logits(ours, theirs, batch)
    # A vocabulary without image tokens goes back as text alone.
    to_work_folder(tmp_path / "source", tmp_path / "plain", image_tokens=False)
    with pytest.raises(UserError, match=r"no piece '\|SPEAKER\|'"):
        to_hugging_face(tmp_path / "plain", tmp_path / "none")
    to_hugging_face(tmp_path / "plain", tmp_path / "same", text_only=True)
    ours, theirs = bits(tmp_path / "same"), bits(tmp_path / "source")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[n][1], theirs[n][1]) for n in theirs)
    # What it knew of text it still knows, as a text model too.
    written = to_hugging_face(tmp_path / "work", tmp_path / "text", text_only=True)
    assert len(written.notes) == 2 and "patch_projection/bias left out" in str(written)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(alone).__name__ == "LlamaForCausalLM"
    rows = [list(range(20, 50))]
    np.testing.assert_array_equal(
        their_logits(alone, rows)[..., :size], their_logits(model, rows)[..., :size]
    )


def test_a_model_that_began_here_goes_to_transformers(tmp_path, tokenizer, tiny_model):
    """No origin: float32 as stored, a tokenizer.json made of the sentencepiece model."""
    model = dataclasses.replace(tiny_model, patch_loss="edges")
    config = TrainConfig(workdir=str(tmp_path / "run"), model=model)
    checkpoint.claim_workdir(tmp_path / "run", config)
    shutil.copyfile(tokenizer.path, tmp_path / "run" / "tokenizer.model")
    sized = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    params = nnx.split(make_decoder(sized, image_id=tokenizer.image_id, newline_id=0))[1]
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(5, params, {"count": jax.numpy.zeros(())}, {"row": 0}, config)
    checkpoints.close()
    written = to_hugging_face(tmp_path / "run", tmp_path / "back")
    assert len(written.notes) == 3 and all("patch_head" in note for note in written.notes[:2])
    assert "no images" in written.notes[2]
    opened = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert opened.config.image_token_id == tokenizer.image_id
    read, _ = read_params(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, read["layers"], params["layers"])
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    text = "Where is the red box?"
    assert processor.tokenizer(text)["input_ids"] == tokenizer.encode(text)
    assert processor.tokenizer.eos_token_id == tokenizer.eos_id


def test_a_tokenizer_that_cannot_be_said_in_json_is_not_written(tmp_path):
    own = [IMAGE_PIECE, NEWLINE_PIECE, EOS_PIECE, *map(str, range(200))]
    model = sentencepiece_model(tmp_path / "tokenizer.model", kind="unigram", own=own)
    told = write_tokenizer_json(model, tmp_path)
    assert "gives other ids for" in told
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]
    # What came beside the model is not touched.
    (tmp_path / "tokenizer_config.json").write_text('{"own": 1}')
    assert write_tokenizer_json(model, tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == '{"own": 1}'


def test_a_runs_own_tokenizer_goes_back_and_not_the_sources(tmp_path):
    """With --config.data.tokenizer a run has another than the folder that it began from."""
    llama_json(tmp_path / "source")
    extended = extend_tokenizer(tmp_path / "source", tmp_path / "mine")
    model = text_model("llama", vocab_size=extended.vocab_size)
    save(model, tmp_path / "source")
    to_work_folder(tmp_path / "source", tmp_path / "work", image_tokens=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "mine" / name, tmp_path / "work" / name)
    to_hugging_face(tmp_path / "work", tmp_path / "back")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    assert processor.image_token_id == extended.tokenizer.image_id
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["image_token_id"] == extended.tokenizer.image_id


def test_what_no_model_of_transformers_has_is_told(tmp_path, monkeypatch):
    source = save(fuyu_model(), tmp_path / "source")
    to_work_folder(source, tmp_path / "work")
    config = checkpoint.read_config(tmp_path / "work")
    from fuyu_jax.interop import exporting

    changed = dataclasses.replace(config.model, image_attention="bidirectional")
    changed = dataclasses.replace(config, model=changed)
    monkeypatch.setattr(exporting, "read_config", lambda _: changed)
    with pytest.raises(UserError, match="image_attention=bidirectional: Fuyu in transformers"):
        to_hugging_face(tmp_path / "work", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    source = save(fuyu_model(), tmp_path / "source")
    to_work_folder(source, tmp_path / "work")
    calls = 0

    def failing(self, *arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls > 9:
            raise KeyboardInterrupt
        return whole(self, *arguments, **keywords)

    for cls, name, convert_to in (
        (StoredParams, "read", to_hugging_face),
        (importing.Weights, "read", to_work_folder),
    ):
        whole, calls = getattr(cls, name), 0
        origin = tmp_path / ("work" if cls is StoredParams else "source")
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(cls, name, failing)
            convert_to(origin, tmp_path / "new")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "work"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    for origin, convert_to in (("work", to_hugging_face), ("source", to_work_folder)):
        with pytest.raises(UserError, match=r"new: already there; give a new folder"):
            convert_to(tmp_path / origin, tmp_path / "new")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["gone", "new"], "gone: no such folder"),
        (["source", "new", "--dtype=float16"], "--dtype is for when SRC is a work folder"),
        (["source", "new", "--mesh=fspd=8"], 'axis "fspd" is unknown; did you mean "fsdp"?'),
        (["source", "new", "--mesh=fsdp"], "write it as fsdp=NUMBER"),
        (["source", "gs://bucket/x"], "only local folders"),
        (["source", "new", "--meshh=fsdp=8"], 'did you mean "--mesh"'),
        (["empty", "new"], "no config.json in it"),
        (["work", "new"], "neither a Hugging Face folder nor a work folder"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    for name in ("source", "empty", "work/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    with pytest.raises(SystemExit) as exit:
        errors.run_main(convert.main)
    told = capsys.readouterr().err
    assert exit.value.code == 2 and message in told and told.count("\n") == 1
    assert not (tmp_path / "new").exists()


SHARDED = """
import sys, json
from pathlib import Path
import numpy as np, jax
from fuyu_jax.checkpoint import Checkpoints
from fuyu_jax.config import MeshConfig, TrainConfig
from fuyu_jax.interop import Weights, describe, read_params, weights
from fuyu_jax.interop.weights import model_shapes
from fuyu_jax.model import make_decoder
from fuyu_jax.parallel.mesh import make_mesh, paths
from fuyu_jax.tokenizer import EOS_PIECE, IMAGE_PIECE, NEWLINE_PIECE
source, work = map(Path, sys.argv[1:])
mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
sizes = {}
whole = Weights.read
def read(self, path, index, dtype=None):
    out = whole(self, path, index, dtype)
    sizes.setdefault(path, []).append(out.size)
    return out
Weights.read = read
params, _ = read_params(source, mesh=mesh)
restored = Checkpoints(work).restore_params(0, model_shapes(describe(source).config), mesh)
alone, _ = read_params(source)
same = jax.tree.map(lambda *x: all(np.array_equal(x[0], y) for y in x), alone, params, restored)
q = params["layers"]["attention"]["q"]["kernel"][...]
print(json.dumps({
    "same": all(jax.tree.leaves(same)),
    "spec": str(q.sharding.spec),
    "shards": sizes["layers/attention/q/kernel"][:8],
    "size": q.size,
}))
"""


def test_shards_read_their_own_slices_on_eight_devices(tmp_path):
    source = save(fuyu_model(), tmp_path / "source")
    result = run(source, tmp_path / "work", "--mesh=fsdp=4,tensor=2")
    assert result.returncode == 0, result.stderr
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, str(source), str(tmp_path / "work")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["same"] and "'fsdp', 'tensor'" in found["spec"]
    assert found["shards"] == [found["size"] // 8] * 8
    # Files are cut as that mesh reads them.
    stored = StoredParams(tmp_path / "work" / "checkpoints" / "0")
    assert stored.chunk("layers/attention/q/kernel") == (1, 8, 2, 8)


MEMORY = """
import sys, threading, time
from pathlib import Path
import psutil
import fuyu_jax.interop.convert
from fuyu_jax.interop.exporting import to_hugging_face
from fuyu_jax.interop.importing import to_work_folder
small, source, work, back = map(Path, sys.argv[1:])
# Both ways once, so that what is only loaded or compiled is not counted.
to_work_folder(small, work.with_name("small_work"))
to_hugging_face(work.with_name("small_work"), back.with_name("small_back"))
process = psutil.Process()
for convert, a, b in ((to_work_folder, source, work), (to_hugging_face, work, back)):
    before, peak, done = process.memory_info().rss, 0, False
    def watch():
        global peak
        while not done:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    convert(a, b)
    done = True
    thread.join()
    print(peak - before)
"""


def write_large(folder, dim=1024, layers=6, vocab=12_000):
    """A Fuyu folder of some hundred megabytes, without making the model."""
    from fuyu_jax.interop.fuyu import file_tensors
    from fuyu_jax.interop.tensors import Tensor, write_tensors

    small = fuyu_model(
        hidden_size=dim, intermediate_size=16, num_hidden_layers=1, vocab_size=7, patch_size=2
    )
    save(small, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= dict(vocab_size=vocab, num_hidden_layers=layers, intermediate_size=4096)
    (folder / "config.json").write_text(json.dumps(raw))
    block = np.random.default_rng(0).normal(size=2**20).astype(np.float32)

    def tensor(t, layer):
        def slabs():
            left = int(np.prod(t.shape))
            while left:
                yield block[: min(left, block.size)]
                left -= min(left, block.size)

        return Tensor(t.name.format(layer), block.dtype, t.shape, slabs)

    config = describe(folder).config
    tensors = []
    for t in file_tensors(config, "persimmon", True):
        tensors += [tensor(t, i) for i in range(layers if t.layered else 1)]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write_tensors(folder, tensors)
    return max(t.bytes for t in tensors), sum(t.bytes for t in tensors)


def test_memory_stays_under_three_of_the_largest_tensor(tmp_path):
    save(fuyu_model(), tmp_path / "small")
    largest, total = write_large(tmp_path / "source")
    assert total > 7 * largest
    result = subprocess.run(
        [sys.executable, "-c", MEMORY]
        + [str(tmp_path / n) for n in ("small", "source", "work", "back")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    grown = [int(line) for line in result.stdout.splitlines()[-2:]]
    print(f"largest {largest / 1e6:.0f} MB, all {total / 1e6:.0f} MB, grown {grown}")
    assert max(grown) < 3 * largest
    (before,), (after,) = ((tmp_path / n).glob("*.safetensors") for n in ("source", "back"))
    a, b = read_header(before), read_header(after)
    assert {n: e.shape for n, e in a.items()} == {n: e.shape for n, e in b.items()}
    for name in list(a)[::17]:
        data = [np.memmap(e.file, np.uint8, "r", e.offset, (1000,)) for e in (a[name], b[name])]
        np.testing.assert_array_equal(*data)


def test_paths_of_shapes_are_those_of_the_model(tiny_model):
    config = dataclasses.replace(tiny_model, vocab_size=9)
    assert "layers/attention/q/kernel" in paths(model_shapes(config))
