"""The model for lmms-eval: with a stand-in for its modules, and with itself where it is installed
(`.ci/lmms` makes an environment for it)."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from fuyu_jax import config as config_lib
from fuyu_jax.data.example import BadImageError
from fuyu_jax.errors import UserError
from fuyu_jax.generate.engine import Answer
from fuyu_jax.generate.pretrained import Score

ROOT = Path(__file__).parent.parent
RED, BLUE = (Image.new("RGB", (9, 8), c) for c in ("red", "blue"))


class FakeModel:
    """Says how many images it saw and the last word it read; knows what it was asked."""

    tokenizer = SimpleNamespace(answer_id=4)

    def __init__(self):
        self.calls = []

    def generate(self, prompts, on_answer, **settings):
        self.calls.append((prompts, settings))
        for i in reversed(range(len(prompts))):
            images = sum(isinstance(p, Image.Image) for p in prompts[i])
            if prompts[i][-1] == "broken":
                on_answer(i, Answer("", (), False, "image: broken"))
            else:
                on_answer(i, Answer(f"{images} {prompts[i][-1].split()[-1]}\n\nmore", (1, 2), True))

    def scores(self, pairs, on_score):
        self.calls.append(pairs)
        for i in reversed(range(len(pairs))):
            on_score(i, Score(-float(len(pairs[i][1])), 1, 1, i == 1))


@dataclasses.dataclass
class GenerationResult:
    text: object
    token_counts: object = None


@dataclasses.dataclass
class TokenCounts:
    output_tokens: int


class lmms:
    def __init__(self):
        self.task_dict = {}


@pytest.fixture
def fuyu(monkeypatch):
    """The class over a stand-in of lmms-eval, with a stand-in of a model."""

    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "GenerationResult": GenerationResult,
            "TokenCounts": TokenCounts,
        },
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": lambda name, **more: (name, more)},
    }
    for name, there in modules.items():
        module = types.ModuleType(name)
        vars(module).update(there)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fuyu_jax.evals.lmms_model", raising=False)
    module = importlib.import_module("fuyu_jax.evals.lmms_model")
    opened = []
    monkeypatch.setattr(module, "load", lambda path, **more: opened.append(path) or FakeModel())
    model = module.FuyuJax(checkpoint="folder", batch_size="8", device="cpu")
    assert opened == ["folder"]
    docs = {i: {"images": [RED, BLUE][:i]} for i in range(3)}
    model.task_dict = {"t": {"test": docs}}
    yield model
    sys.modules.pop("fuyu_jax.evals.lmms_model", None)


def see(doc):
    return doc["images"]


def request(*args):
    return SimpleNamespace(args=args)


def test_the_entry_point(fuyu):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = EntryPoint("fuyu_jax", project["entry-points"]["lmms_eval.models"]["fuyu_jax"], "")
    name, paths = found.load()()
    assert name == "fuyu_jax"
    module, _, name = paths["simple_class_path"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is type(fuyu)


def test_generate_until(fuyu):
    greedy = {"max_new_tokens": 6, "temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False}
    drawn = {"temperature": 0.7, "top_p": 0.9, "until": "\n\n", "num_beams": None}
    found = fuyu.generate_until(
        [
            request("what", greedy, see, 1, "t", "test"),
            request("before <image>\nbetween <image> who", drawn, see, 2, "t", "test"),
            request("how", greedy, see, 0, "t", "test"),
        ]
    )
    assert [f.text for f in found] == ["1 what\n\nmore", "2 who", "0 how\n\nmore"]
    assert found[0].token_counts.output_tokens == 2
    (first, settings), (second, drawing) = fuyu.model.calls
    assert first == [[RED, "what"], ["how"]]  # what is generated alike, at once
    assert second == [["before", RED, "between", BLUE, " who"]]
    assert settings == {"max_new_tokens": 6, "num_beams": 1, "batch_size": 8, "seed": 0}
    assert drawing["temperature"] == 0.7 and drawing["top_p"] == 0.9
    assert drawing["max_new_tokens"] == 128
    fuyu.generate_until([request("what", {"do_sample": True}, see, 1, "t", "test")])
    assert fuyu.model.calls[-1][1]["temperature"] == 1.0


def test_likelihoods_are_negative_and_in_their_wrapper(fuyu):
    """The smallest is the best: lmms-eval takes the argmin."""
    found = fuyu.loglikelihood(
        [
            request("what", " red", see, 1, "t", "test"),
            request("what", lambda doc: " greenish", see, 1, "t", "test"),
            request("", "red"),  # a choice by itself
        ]
    )
    assert [f.text for f in found] == [(3.0, False), (8.0, True), (3.0, False)]
    assert fuyu.model.calls[0][0] == ([RED, "what"], "red")
    fuyu.model.tokenizer = SimpleNamespace(answer_id=None)  # a model that reads on
    fuyu.loglikelihood([request("what", " red", see, 1, "t", "test")])
    assert fuyu.model.calls[-1][0][1] == " red"


def test_rounds(fuyu):
    told = []

    def to_text(doc, previous_output, round_idx, previous_round_info):
        told.append((round_idx, list(previous_output), previous_round_info))
        if round_idx == len(doc["images"]):
            return None, None, True, previous_output, None
        return doc["images"][:1], f"round {round_idx}", False, previous_output, "info"

    options = {"until": ["\n\n"]}
    found = fuyu.generate_until_multi_round(
        [request("first", options, see, to_text, n, "t", "test") for n in (1, 2)]
    )
    assert found == [["1 first"], ["2 first", "1 1"]]
    assert told == [
        (1, ["1 first"], None),
        (1, ["2 first"], None),
        (2, ["2 first", "1 1"], "info"),
    ]


def test_what_is_refused(fuyu):
    with pytest.raises(UserError, match='unknown "chekpoint"; did you mean "checkpoint"'):
        type(fuyu)(chekpoint="x")
    with pytest.raises(UserError, match="give checkpoint=FOLDER"):
        type(fuyu)()
    with pytest.raises(UserError, match="sees images, not str"):
        fuyu.generate_until([request("what", {}, lambda doc: ["a.mp4"], 1, "t", "test")])
    with pytest.raises(UserError, match="2 <image> marks for 1 images"):
        fuyu.generate_until([request("<image> <image> a", {}, see, 1, "t", "test")])
    with pytest.raises(BadImageError, match="request 0: image: broken"):
        fuyu.generate_until([request("broken", {}, see, 1, "t", "test")])
    with pytest.warns(UserWarning, match=r"generation_kwargs.image_aspect_ratio=pad"):
        fuyu.generate_until([request("a", {"image_aspect_ratio": "pad"}, see, 1, "t", "test")])


# --- lmms-eval itself ---------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: .ci/lmms"
)
def test_lmms_eval_itself(make_tiny_config, llava_json, tmp_path):
    """`--tasks pope` on data that lies where it would be fetched from, likelihoods, and rounds."""
    import datasets

    from fuyu_jax import load
    from fuyu_jax.train import Trainer

    changes = {"num_steps": 300, "rows_per_batch": 4, "checkpoint_every": 300}
    config = config_lib.replace(make_tiny_config(tmp_path), changes)
    Trainer(config).run()
    choices = ["red", "green", "blue"]
    lines = []
    for r in json.loads(llava_json.read_text()):
        if "image" in r:
            question, image = "<image>\nWhat colour is it?", str(llava_json.parent / r["image"])
            answer = r["conversations"][1]["value"]
            lines.append(
                {"image": image, "question": question, "answer": answer, "choices": choices}
            )
    data = tmp_path / "squares.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for file in (ROOT / "tests/lmms_tasks").iterdir():
        if file.is_file():
            (tasks / file.name).write_text(file.read_text().replace("__DATA__", str(data)))
    pope = (
        tmp_path / "lmms-lab-encoder/POPE"
    )  # as the hub's, which a folder of this name stands for
    pope.mkdir(parents=True)
    asked = "Is it red?"
    datasets.Dataset.from_dict(
        {
            "question_id": [str(n) for n in range(len(lines))],
            "question": [asked] * len(lines),
            "answer": ["yes" if x["answer"] == "red" else "no" for x in lines],
            "image": [x["image"] for x in lines],
        }
    ).cast_column("image", datasets.Image()).to_parquet(pope / "test.parquet")

    ended = subprocess.run(
        [
            sys.executable, "-m", "lmms_eval", "--model", "fuyu_jax",
            "--model_args", f"checkpoint={config.workdir}",
            "--tasks", "pope,squares_choice,squares_rounds", "--include_path", str(tasks),
            "--batch_size", "8", "--output_path", str(tmp_path / "out"), "--log_samples",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1",
             "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    # It exits with 0 after an error too.
    found = next((tmp_path / "out").rglob("*_results.json"), None)
    assert ended.returncode == 0 and found, ended.stderr[-3000:]
    results = json.loads(found.read_text())["results"]
    # 300 steps teach the colours; with the other sign no choice would be right.
    assert results["squares_choice"]["acc,none"] > 0.9
    assert results["squares_rounds"]["exact,none"] > 0.9
    (found,) = (tmp_path / "out").rglob("*_samples_pope.jsonl")
    said = [json.loads(line)["filtered_resps"] for line in found.read_text().splitlines()]
    prompt = f"{asked}\nAnswer the question using a single word or phrase."
    ours = load(config.workdir).generate([[Image.open(x["image"]), prompt] for x in lines], 128)
    assert said == [a.text.strip() for a in ours]
