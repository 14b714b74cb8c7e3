"""`eval.py` from the command line, as far as it needs no model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_asker import fake_checkpoint
from PIL import Image

from fuyu_jax.errors import UserError
from fuyu_jax.evals.command import run
from fuyu_jax.evals.settings import parse_mesh

ROOT = Path(__file__).parent.parent

# Runs a program, and says whether it ever imported JAX.
WATCHED = """
import runpy, sys
try:
    runpy.run_path("eval.py", run_name="__main__")
finally:
    print("imported jax" if "jax" in sys.modules else "no jax")
"""


def evaluate(*flags):
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


GOOD = {"id": "a", "images": ["a.png"], "prompt": "Is it red?", "answers": ["yes"]}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 6), (200, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    fake_checkpoint(tmp_path / "model")
    return tmp_path


def write(folder, *lines, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# A second line, and what is said of it. {} stands for the folder.
BAD = {
    "missing image": ({"images": ["b.png"]}, "image {}/b.png: no such file"),
    "broken image": ({"images": ["broken.png"]}, "image {}/broken.png: cannot be read"),
    "duplicate id": ({"id": "a"}, 'id "a" is that of line 1 too; give each its own'),
    "empty answers": ({"answers": [" "]}, '"answers" is empty'),
    "no answers": ({"answers": []}, '"answers" is empty'),
    "another task's answers": ({"answers": ["red"]}, "pope needs"),
    "another task's form": ({"choices": ["yes", "no"]}, "pope takes no"),
    "a misspelt field": ({"answers": None, "answer": ["yes"]}, 'did you mean "answers"?'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_named_before_a_model_is_loaded(folder, case):
    change, told = BAD[case]
    bad = {k: v for k, v in ({**GOOD, "id": "b"} | change).items() if v is not None}
    data = write(folder, GOOD, bad)
    flags = ("--tasks=pope", f"--data={data}", f"--checkpoint={folder}/model")
    ended = evaluate(*flags)
    assert ended.returncode == 2 and ended.stdout == "no jax\n"
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {data}:2: ") and told.format(folder) in line
    assert not (folder / "model" / "eval").exists()


# Flags, and what is said of them.
FLAGS = {
    "an unknown task": (["--tasks=popes"], 'unknown task "popes"; did you mean "pope"?'),
    "no task": (["--tasks="], "give --tasks=NAMES"),
    "no data": (["--data="], "give --data=FILE"),
    "no such data": (["--data=none.jsonl"], "none.jsonl: No such file or directory; give a JSON"),
    "no model": (["--checkpoint="], "give --checkpoint=FOLDER, or --score_only"),
    "no such model": (["--checkpoint=nowhere"], "checkpoint nowhere: no such folder"),
    "an empty folder": (["--checkpoint={}/empty"], "neither a work folder of train.py nor a"),
    "a misspelt flag": (["--resumed"], 'unknown flag "--resumed"; did you mean "--resume"?'),
    "shots from nowhere": (["--num_shots=4"], "--num_shots=4: give --shots=FILE"),
    "no number of shots": (["--shots=x.jsonl"], "--shots: give --num_shots too, such as 4"),
    "shots of the data": (["--num_shots=1", "--shots={}/data.jsonl"], "it is the data itself"),
    "both": (["--score_only", "--predict_only"], "give one or the other"),
    "a model to score with": (["--score_only"], "--score_only loads no model; leave"),
    "a batch of none": (["--batch_size=0"], "--batch_size=0: give 1 or more"),
    "no number": (["--limit=x"], "argument --limit: invalid int value: 'x'"),
    "another way's flag": (["--blind"], "--blind is for a run's own data; leave it out"),
    "a config": (["--config.data.source=x"], "--config.data.source=x is for a run's own data"),
    "an axis": (["--mesh=dat=2"], 'unknown axis "dat"; did you mean "data"?'),
    "a mesh": (["--mesh=data=x"], "--mesh=data=x: give data=NUMBER"),
    "a precision": (["--dtype=int8"], '--dtype=int8: "float32" or "bfloat16"'),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_make_no_sense(folder, case):
    flags, told = FLAGS[case]
    (folder / "empty").mkdir()
    given = {"--tasks": "pope", "--data": write(folder, GOOD), "--checkpoint": folder / "model"}
    names = [f.partition("=")[0] for f in flags]
    argv = [f"{k}={v}" for k, v in given.items() if k not in names]
    with pytest.raises(UserError) as caught:
        run("", [*argv, *(f.format(folder) for f in flags)])
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "model" / "eval").exists()


def test_an_unknown_task_from_the_command_line(folder):
    ended = evaluate("--tasks=popes", f"--data={write(folder, GOOD)}", "--score_only")
    assert ended.returncode == 2 and ended.stdout == "no jax\n"
    assert ended.stderr == 'error: unknown task "popes"; did you mean "pope"?\n'


def test_answers_that_are_there_are_scored_without_jax(folder):
    right = {**GOOD, "prediction": "Yes.", "subset": "red"}
    wrong = {**GOOD, "id": "b", "prediction": "No, it is not.", "subset": "other"}
    lost = {**GOOD, "id": "c", "prediction": "perhaps", "images": ["gone.png"]}
    data = write(folder, right, {"id": "d"}, wrong, lost)
    out = folder / "scores"
    flags = ("--tasks=pope,anls", f"--data={data}", "--score_only", f"--out={out}")
    ended = evaluate(*flags)
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: {data}:2: ")
    assert ended.stderr.count("\n") == 1 and not out.exists()

    ended = evaluate(*flags, "--skip_bad")
    assert ended.returncode == 0, ended.stderr
    *table, skipped, where, jax = ended.stdout.splitlines()
    assert jax == "no jax" and where == str(out)
    assert skipped == "1 bad lines left out; metrics.json lists them"
    assert table[1].split()[:4] == ["pope", "3", "accuracy", "0.6667"]  # "perhaps" counts as yes
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["records"] == 3 and metrics["skipped"] == 1
    (bad,) = metrics["skipped_lines"]
    assert bad["line"] == 2 and bad["id"] == "d" and bad["reason"]
    assert metrics["tasks"]["pope"]["parse_failures"] == 1
    assert metrics["checkpoint"] is None and len(metrics["data"]["hash"]) == 16
    samples = [json.loads(x) for x in (out / "samples_pope.jsonl").read_text().splitlines()]
    assert [(s["id"], s["score"]) for s in samples] == [("a", 1), ("b", 0), ("c", 1)]
    page = (out / "report.html").read_text()
    assert "gone.png: no such file" in page and "1 bad lines left out" in page

    # The same once more is the same; nothing is in the way.
    assert evaluate(*flags, "--skip_bad").returncode == 0


def test_a_mesh():
    assert parse_mesh("") is None
    mesh = parse_mesh("data=2,fsdp=4")
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (2, 4, 1)
    assert parse_mesh("fsdp=-1").data == 1  # or both would take what is left
