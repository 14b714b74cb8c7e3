"""Shared by all tests. Shapes in the types of `fuyu_jax` are checked at run time here."""

import json
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Many tests make the same tiny run: its functions are compiled once a session.
_CACHE = tempfile.TemporaryDirectory(prefix="fuyu_jax_test_cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from jaxtyping import install_import_hook

install_import_hook("fuyu_jax", "beartype.beartype")

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fuyu_jax.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


def write_llava(folder, count, seed=0):
    """A small LLaVA-style set: squares of three colours at drawn places, in images of all sizes."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        name = list(COLOURS)[i % 3]
        height, width = (int(n) for n in rng.integers(10, 40, 2))
        image = Image.new("RGB", (width, height), (240, 240, 240))
        top, left = int(rng.integers(0, height - 6)), int(rng.integers(0, width - 6))
        ImageDraw.Draw(image).rectangle((left, top, left + 5, top + 5), fill=COLOURS[name])
        image.save(folder / "images" / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": name},
        ]
        if i % 4 == 1:
            box = f"<box>{top}, {left}, {top + 6}, {left + 6}</box>"
            turns += [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": box}]
        record = {"id": f"r{i}", "image": f"images/{i}.png", "conversations": turns}
        if i % 5 == 4:  # text-only
            record = {
                "id": f"r{i}",
                "conversations": [
                    {"from": "human", "value": f"Say {name}."},
                    {"from": "gpt", "value": name},
                ],
            }
        records.append(record)
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def llava_json(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"), 40)


@pytest.fixture(scope="session")
def tiny_model():
    return ModelConfig(
        dim=32, num_layers=2, num_heads=4, head_dim=8, mlp_dim=64, patch_size=8, init_std=0.1
    )


@pytest.fixture(scope="session")
def make_tiny_config(llava_json, tiny_model):
    """A run of seconds on the small LLaVA-style set, in a folder."""
    return lambda folder: TrainConfig(
        name="tiny",
        workdir=str(folder / "run"),
        num_steps=8,
        rows_per_batch=2,
        checkpoint_every=4,
        log_every=1,
        progress=False,
        model=tiny_model,
        data=DataConfig(
            source="llava",
            train_json=str(llava_json),
            validation_json=str(llava_json),
            tokenizer_vocab=400,
            tokens_per_row=128,
            patches_per_row=96,
            prefetch_rows=2,
        ),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=2),
        eval=EvalConfig(every=0, batch_size=8, max_new_tokens=8, summary=False),
    )


@pytest.fixture
def tiny_config(make_tiny_config, tmp_path):
    return make_tiny_config(tmp_path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece

    texts = ["What colour is it?", "red green blue", "Where is the box? It is over there."] * 20
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return Tokenizer(train_sentencepiece(texts, path, 420))
