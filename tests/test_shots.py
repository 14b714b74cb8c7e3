"""Demonstrations before a question: whose, in which form, and never the question's own image."""

import json
import shutil

import pytest
from fake_asker import FakeAsker, fake_backend, fake_checkpoint
from PIL import Image

from fuyu_jax.errors import UserError
from fuyu_jax.evals.harness import evaluate
from fuyu_jax.evals.output import read_lines
from fuyu_jax.evals.records import Record
from fuyu_jax.evals.requests import Given
from fuyu_jax.evals.settings import Settings
from fuyu_jax.evals.shots import shown_answer
from fuyu_jax.evals.tasks import TASKS


@pytest.fixture
def ask(tmp_path):
    """Asks ten questions behind demonstrations. Returns the questions and the samples."""
    fake_checkpoint(tmp_path / "model")
    for n in range(10):
        Image.new("RGB", (9, 8), (25 * n, 9, 9)).save(tmp_path / f"{n}.png")
        shutil.copy(tmp_path / f"{n}.png", tmp_path / f"copy{n}.png")
    write(tmp_path / "data.jsonl", [line(n, f"{n}.png", "q") for n in range(10)])
    # The same pictures: a copy of each by another name.
    write(tmp_path / "shots.jsonl", [line(n, f"copy{n}.png", "s") for n in range(10)])

    def run(out="out", **more):
        asker = FakeAsker()
        settings = Settings(
            **{
                "data": tmp_path / "data.jsonl",
                "tasks": "exact_match",
                "checkpoint": tmp_path / "model",
                "shots": tmp_path / "shots.jsonl",
                "num_shots": 4,
                "out": tmp_path / out,
                **more,
            }
        )
        found = evaluate(settings, fake_backend(asker))
        return asker.questions, read_lines(tmp_path / out / "samples_exact_match.jsonl"), found

    run.folder = tmp_path
    return run


def line(n, image, kind):
    return {
        "id": f"{kind}{n}",
        "segments": ["Look: ", {"image": image}, f"What is {n}?"],
        "answers": [f"answer {n}"],
    }


def write(path, lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_they_are_interleaved_and_logged_by_id(ask):
    questions, samples, found = ask()
    for sample in samples:
        question = questions[sample["id"]]
        assert sample["shots"] == list(question.shots) and len(set(sample["shots"])) == 4
        wanted = []
        for shot in sample["shots"]:
            n = shot.removeprefix("s")
            image = ask.folder / f"copy{n}.png"
            wanted += ["Look: ", image, f"What is {n}?"]
            wanted += [Given(f"answer {n}")]
        n = sample["id"].removeprefix("q")
        wanted += ["Look: ", ask.folder / f"{n}.png", f"What is {n}?"]
        assert list(question.parts) == wanted
    assert found["shots"]["records"] == 10 and len(found["shots"]["hash"]) == 16
    assert len({tuple(s["shots"]) for s in samples}) > 5  # each question has its own


def test_never_the_questions_own_image(ask):
    """Not even a copy of it: with nine asked for, each question gets all the others."""
    _, samples, _ = ask(num_shots=9)
    for sample in samples:
        own = sample["id"].replace("q", "s")
        assert sorted(sample["shots"]) == sorted({f"s{n}" for n in range(10)} - {own})
    with pytest.raises(UserError, match=r"10 shots are asked for.*\(line 1\) there are 9 of 10"):
        ask("more", num_shots=10)


def test_a_question_without_an_image_is_not_shown_itself(ask):
    text = [{"id": f"t{n}", "prompt": f"{n}?", "answers": ["x"]} for n in range(3)]
    write(ask.folder / "data.jsonl", text)
    write(ask.folder / "shots.jsonl", [{**x, "id": f"s{x['id']}"} for x in text])
    _, samples, _ = ask(num_shots=2)
    assert all(f"s{s['id']}" not in s["shots"] for s in samples)


def test_they_are_drawn_by_the_seed_and_the_id_alone(ask):
    _, samples, _ = ask()
    first = {s["id"]: s["shots"] for s in samples}
    lines = (ask.folder / "data.jsonl").read_text().splitlines(True)
    (ask.folder / "data.jsonl").write_text("".join(lines[:2:-1]))
    _, samples, _ = ask("turned", batch_size=1)
    assert all(first[s["id"]] == s["shots"] for s in samples) and len(samples) == 7
    _, samples, _ = ask("other", seed=1)
    assert any(first[s["id"]] != s["shots"] for s in samples)


def test_none(ask):
    questions, samples, found = ask(num_shots=0)
    assert "shots" not in samples[0] and "shots" not in found
    assert not any(isinstance(p, Given) for q in questions.values() for p in q.parts)


def test_other_demonstrations_are_another_request(ask):
    ask()
    with pytest.raises(UserError, match="seed is 0 there, 1 here"):
        ask(resume=True, seed=1)
    with pytest.raises(UserError, match="num_shots is 4 there, 0 here"):
        ask(resume=True, num_shots=0)


def test_bad_demonstrations_are_named(ask):
    (ask.folder / "copy3.png").unlink()
    with pytest.raises(UserError, match=r"shots\.jsonl:4: image .*copy3\.png: no such file"):
        ask()
    _, samples, found = ask(skip_bad=True)
    assert found["shots"]["skipped"] == 1 and found["skipped"] == 0
    assert all("s3" not in s["shots"] for s in samples)


def test_what_is_shown_as_the_answer():
    choices = Record("a", 1, ("Q",), ("v",), ("u", "v"), 1)
    assert shown_answer(TASKS["multiple_choice"], choices) == "v"
    assert shown_answer(TASKS["scienceqa"], choices) == "B"
    people = Record("a", 1, ("Q",), ("blue", "red", "red", "green"))
    assert shown_answer(TASKS["vqav2"], people) == "red"
    box = Record("a", 1, ("Q",), (), boxes=((1, 2, 5, 8),))
    assert shown_answer(TASKS["refcoco"], box) == "<box>1, 2, 5, 8</box>"
    assert shown_answer(TASKS["pointing"], box) == "<point>5, 3</point>"
