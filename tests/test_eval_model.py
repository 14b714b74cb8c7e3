"""`eval.py` with a model: killed and resumed, on two hosts, with broken pictures."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuyu_jax import load
from fuyu_jax.evals import asking
from fuyu_jax.evals.command import run_tasks
from fuyu_jax.evals.output import read_lines
from fuyu_jax.evals.settings import Settings
from fuyu_jax.evals.throughput import USAGE
from fuyu_jax.train import Trainer

ROOT = Path(__file__).parent.parent
# Float32 sums of another batch, whose shapes make XLA add in another order; values are near -5.
SAME = 1e-4


class Place:
    """A checkpoint of a few steps, and questions in two files."""

    def __init__(self, config, pictures, folder):
        Trainer(config).run()
        self.folder = folder
        self.checkpoint = config.workdir
        asked, chosen = [], []
        for n in range(60):
            line = {"id": f"q{n}", "prompt": f"What colour is {n}?", "subset": "ab"[n % 2]}
            if n % 5 != 4:
                line["images"] = [str(pictures / f"{n % 40}.png")] if n % 40 % 5 != 4 else []
            asked.append({**line, "answers": ["red"]})
            chosen.append({**line, "answers": ["red"], "choices": ["red", "blue is it", "no"]})
        for name, lines in (("asked", asked), ("chosen", chosen)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text)

    def flags(self, task, out, *more):
        data = "asked" if task == "exact_match" else "chosen"
        return [
            f"--checkpoint={self.checkpoint}", f"--tasks={task}", "--max_new_tokens=9",
            f"--data={self.folder / data}.jsonl", f"--out={self.folder / out}", "--batch_size=4",
            *more,
        ]  # fmt: skip

    def begin(self, *flags):
        return subprocess.Popen(
            [sys.executable, "eval.py", *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        )  # fmt: skip

    def samples(self, out, task):
        return self.folder / out / f"samples_{task}.jsonl"


@pytest.fixture(scope="module")
def place(make_tiny_config, llava_json, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    return Place(make_tiny_config(folder), llava_json.parent / "images", folder)


def ended(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, (process.returncode, out[-1000:], err[-3000:])
    return out


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_and_resumed_it_ends_with_the_same_file(place):
    ended(place.begin(*place.flags("exact_match", "whole")))
    flags = place.flags("exact_match", "killed", "--resume")
    samples = place.samples("killed", "exact_match")
    cut = []
    for least in (0, 1, 25):  # once while the model is loaded, twice among the answers
        process = place.begin(*flags)
        until = time.monotonic() + 120
        while lines_of(samples) < least or (not least and not samples.parent.exists()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        cut.append(lines_of(samples))
    assert cut[0] <= cut[1] <= cut[2] < 60 and cut[2] >= 25
    ended(place.begin(*flags))
    assert samples.read_bytes() == place.samples("whole", "exact_match").read_bytes()
    ids = [line["id"] for line in read_lines(samples)]
    assert ids == [f"q{n}" for n in range(60)]
    speed = json.loads((place.folder / "killed/metrics.json").read_text())["throughput"]
    assert speed["tasks"]["exact_match"]["samples"] == 60 - cut[2]


def test_two_hosts(place):
    """Each writes its share; together they answer as one does."""
    for task in ("exact_match", "multiple_choice"):
        if not place.samples("whole", task).exists():
            ended(place.begin(*place.flags(task, "whole")))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        hosts = [
            place.begin(
                *place.flags(task, "hosts", "--mesh=data=1,fsdp=-1"),
                f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={n}",
            )
            for n in range(2)
        ]  # fmt: skip
        first, second = (ended(host) for host in hosts)
        assert task in first and task not in second
        whole = read_lines(place.samples("whole", task))
        there = read_lines(place.samples("hosts", task))
        assert [x["id"] for x in there] == [x["id"] for x in whole]
        if task == "exact_match":
            assert there == whole
        for a, b in zip(there, whole, strict=True):
            assert a.get("logprobs", []) == pytest.approx(b.get("logprobs", []), abs=SAME)
        assert len(list((place.folder / "hosts").glob(f"samples_{task}*"))) == 1


def test_what_the_model_says_is_what_is_kept(place):
    """One by one as at once; a picture broken behind its header is its question's error."""
    broken = place.folder / "broken.png"
    picture = json.loads((place.folder / "chosen.jsonl").read_text().splitlines()[0])["images"][0]
    broken.write_bytes(Path(picture).read_bytes()[:60])
    questions = [
        {"id": "a", "images": [picture], "prompt": "What?", "answers": ["red"]},
        {"id": "b", "images": [str(broken)], "prompt": "What?", "answers": ["red"]},
        {"id": "c", "prompt": "Say red.", "answers": ["red"]},
    ]
    choices = {"choices": ["red", "blue"]}
    found = {}
    for task, more in (("exact_match", {}), ("multiple_choice", choices), ("perplexity", {})):
        data = place.folder / f"{task}.jsonl"
        lines = [{**q, **more} for q in questions]
        if task == "perplexity":
            lines.append({"id": "d", "answers": ["red"]})  # a document by itself
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out = place.folder / f"few_{task}"
        settings = Settings(
            data, task, Path(place.checkpoint), out, max_new_tokens=5, num_processes=1
        )
        metrics = run_tasks(settings)
        assert metrics["tasks"][task]["errors"] == 1
        found[task] = {x["id"]: x for x in read_lines(out / f"samples_{task}.jsonl")}
        assert "broken.png" in found[task]["b"]["error"]
    model = load(place.checkpoint)
    parts = [Path(picture), "What?"]
    (answer,) = model.generate([parts], 5)
    assert found["exact_match"]["a"]["prediction"] == answer.text
    said = found["multiple_choice"]["a"]["logprobs"]
    alone = [model.score(parts, c).logprob for c in ("red", "blue")]
    assert said == pytest.approx(alone, abs=SAME)
    ids = model.tokenizer.encode("red")
    begun = [model.tokenizer.bos_id]
    documents = found["perplexity"]
    for id, before in (("c", ["Say red."]), ("d", [begun])):
        assert documents[id]["tokens"] == len(ids)
        alone = model.score(before, ids).logprob
        assert documents[id]["logprobs"][0] == pytest.approx(alone, abs=SAME)
    # What ends an answer is counted too.
    usage = asking.ModelAsker(model, 4).usage()
    assert usage.keys() == set(USAGE)
    assert usage["new_tokens"] == len(answer.tokens) + answer.finished
