"""Tasks: names, how they ask, and files of answers scored without a model and without JAX."""

import json
import subprocess
import sys

import pytest

from fuyu_jax.errors import UserError
from fuyu_jax.evals.records import Record
from fuyu_jax.evals.tasks import TASKS, find_tasks, score_file


def write(folder, lines):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_unknown_tasks_name_the_nearest():
    with pytest.raises(UserError, match=r'^unknown task "popes"; did you mean "pope"\?$'):
        find_tasks("anls,popes")
    with pytest.raises(UserError, match="no task given; known: anls, "):
        find_tasks(" , ")
    assert [t.name for t in find_tasks("pope, anls,pope")] == ["pope", "anls"]


def test_how_a_task_asks(tmp_path):
    image = tmp_path / "a.png"
    record = Record("a", 1, (image, "Which?"), ("red",), ("red", "blue"), 0)
    assert TASKS["multiple_choice"].segments(record) == [image, "Which?"]
    assert TASKS["multiple_choice"].continuations(record) == [" red", " blue"]
    listed = TASKS["mmlu"].segments(record)
    assert listed == [image, "Which?\nA. red\nB. blue\nAnswer:"]
    assert TASKS["mmlu"].continuations(record) == [" A", " B"]
    asked = TASKS["pope"].segments(Record("a", 1, ("Is it red?\n", image), ("yes",)))
    assert asked == ["Is it red?\n", image, "Answer yes or no.\n"]
    assert TASKS["perplexity"].continuations(Record("a", 1, (), ("It was.",))) == ["It was."]
    with pytest.raises(ValueError, match="no likelihoods"):
        TASKS["pope"].continuations(record)
    assert {t.ask for t in TASKS.values()} == {"generate", "likelihood", "perplexity"}


# One line that each task takes, and the answer in it that is right.
PEOPLE = {"answers": ["red"] * 10, "prediction": "red"}
SHORT = {"answers": ["red"], "prediction": "red"}
CHOICES = {"choices": ["u", "v"], "answers": ["v"]}
BOX = {"boxes": [[1, 1, 5, 5]], "prediction": "<box>1, 1, 5, 5</box>"}
RIGHT = {
    "vqav2": [PEOPLE],
    "vqa_official": [PEOPLE],
    "vqa_normalised": [PEOPLE],
    "okvqa": [PEOPLE],
    "textvqa": [PEOPLE],
    "docvqa": [SHORT],
    "infovqa": [SHORT],
    "anls": [SHORT],
    "chartqa": [SHORT],
    "exact_match": [SHORT],
    "pope": [{"answers": ["Yes"], "prediction": "Yes."}],
    "mme": [
        {"group": "i", "answers": ["Yes"], "prediction": "Yes"},
        {"group": "i", "answers": ["No"], "prediction": "No"},
    ],
    "mmbench": [CHOICES | {"group": "g", "prediction": "B"}],
    "mmmu": [CHOICES | {"prediction": "(B)"}],
    "scienceqa": [CHOICES | {"prediction": "B"}],
    "multiple_choice": [CHOICES | {"logprobs": [-2, -1]}],
    "mmlu": [CHOICES | {"logprobs": [-2, -1]}],
    "classification": [CHOICES | {"logprobs": [-2, -1]}],
    "winoground": [
        CHOICES | {"group": "g", "logprobs": [-2, -1]},
        CHOICES | {"group": "g", "logprobs": [-1, -2], "answers": ["u"]},
    ],
    "refcoco": [BOX],
    "pointing": [BOX],
    "perplexity": [{"answers": ["It was."], "logprobs": [0.0], "tokens": 2}],
    "demo": [SHORT | {"subset": "colour"}],
    "demo_compositional": [SHORT | {"subset": "colour"}],
    "caption": [
        {"answers": ["a red dog runs home"], "prediction": "a red dog runs home"},
        {"answers": ["two cats sleep all day"], "prediction": "two cats sleep all day"},
    ],
}
BEST = {"mme": 200.0, "caption": 10.0}


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"caption_ptb"}))
def test_each_task_scores_right_answers(tmp_path, name):
    lines = [{"id": f"x{n}", **line} for n, line in enumerate(RIGHT[name])]
    scored = score_file(write(tmp_path, lines), name)
    found = scored.metrics[name]
    assert found["scores"][found["main"]] == pytest.approx(BEST.get(name, 1.0))
    assert found["n"] == len(lines)
    assert found["parse_failures"] == 0
    assert set(found["stderr"]) == set(found["scores"])
    assert [s["id"] for s in scored.samples[name]] == [line["id"] for line in lines]
    assert all(s["score"] == 1 and not s["parse_failed"] for s in scored.samples[name])
    json.dumps([scored.metrics, scored.samples], allow_nan=False)


def test_the_two_ways_of_vqa_differ_where_people_agree(tmp_path):
    """All ten say "Two.": the official script compares texts as they are, the other normalises."""
    path = write(tmp_path, [{"id": "a", "answers": ["Two."] * 10, "prediction": "2"}])
    found = score_file(path, "vqa_official,vqa_normalised,vqav2,textvqa")
    mains = {name: m["scores"][m["main"]] for name, m in found.metrics.items()}
    assert mains == {"vqa_official": 0, "vqa_normalised": 1, "vqav2": 0, "textvqa": 1}
    assert {name: lines[0]["score"] for name, lines in found.samples.items()} == mains


@pytest.mark.parametrize(
    ("task", "line", "told"),
    [
        ("anls", {"answers": ["x"]}, 'anls needs "prediction"'),
        ("anls", {"answers": ["x"], "predictions": "x"}, 'did you mean "prediction"?'),
        ("anls", {"answers": ["x"], "prediction": [1, 2]}, "needs a text"),
        ("multiple_choice", CHOICES | {"prediction": "B"}, 'needs "logprobs", one a choice'),
        ("mmlu", CHOICES | {"logprobs": [-1]}, 'needs 2 in "logprobs", not 1'),
        ("mmlu", CHOICES | {"logprobs": ["-1", "-2"]}, "no list of numbers"),
        ("perplexity", {"answers": ["x"], "logprobs": [-1]}, 'needs "tokens"'),
    ],
)
def test_answers_of_another_form_are_named(tmp_path, task, line, told):
    path = write(tmp_path, [{"id": "a", **line}])
    with pytest.raises(UserError) as error:
        score_file(path, task)
    assert str(error.value).startswith(f"{path}:1: ")
    assert told in str(error.value)


def test_several_tasks_over_one_file_with_bad_lines(tmp_path):
    lines = [
        {"id": "a", "prompt": "?", **SHORT},
        {"id": "a", "prompt": "?", **SHORT},
        {"id": "b", "images": ["gone.png"], "answers": ["red"], "prediction": "Red"},
    ]
    scored = score_file(write(tmp_path, lines), ["anls", "exact_match"], skip_bad=True)
    assert scored.metrics["anls"]["scores"]["anls"] == 1.0
    assert scored.metrics["exact_match"]["scores"]["exact"] == 0.5
    assert [s.line for s in scored.skipped] == [2]


def test_a_file_is_scored_without_jax(tmp_path):
    path = write(tmp_path, [{"id": "a", **PEOPLE}])
    code = f"""
import sys
from fuyu_jax.evals.tasks import score_file
print(score_file({str(path)!r}, "vqav2,textvqa").metrics["textvqa"]["n"])
assert "jax" not in sys.modules and "flax" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (0, "1"), run.stderr
