"""The harness with a model that needs no JAX: what is asked, kept, gone on with, and refused."""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_asker import FakeAsker, fake_backend, fake_checkpoint
from PIL import Image

from fuyu_jax.errors import UserError
from fuyu_jax.evals.harness import evaluate
from fuyu_jax.evals.output import read_lines
from fuyu_jax.evals.settings import Settings


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


class Place:
    """A folder with pictures, questions and a checkpoint."""

    def __init__(self, folder):
        self.folder = folder
        self.checkpoint = fake_checkpoint(folder / "model")
        for n in range(6):
            colour = (40 * n, 80, 200 - 30 * n)
            Image.new("RGB", (20 + n, 16), colour).save(folder / f"{n}.png")

    def write(self, lines, name="data.jsonl"):
        path = self.folder / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def questions(self, count=12, choices=()):
        return self.write(
            [
                {
                    "id": f"q{n}",
                    "images": [f"{n % 6}.png"],
                    "prompt": f"What is {n}? " + "so so " * (count - n),
                    "answers": ["red"],
                    "subset": "even" if n % 2 == 0 else "odd",
                    **({"choices": choices} if choices else {}),
                }
                for n in range(count)
            ]
        )

    def settings(self, tasks="exact_match", **more):
        data = more.pop("data", self.folder / "data.jsonl")
        more.setdefault("out", self.folder / "out")
        return Settings(data=data, tasks=tasks, checkpoint=self.checkpoint, **more)

    def samples(self, task="exact_match", out="out"):
        return read_lines(self.folder / out / f"samples_{task}.jsonl")


def short_lines(count=12):
    return [{"id": f"q{n}", "prompt": f"What is {n}?", "answers": ["red"]} for n in range(count)]


def test_all_questions_are_asked_at_once_and_kept_in_the_order_of_the_data(place):
    place.questions(choices=["red", "blue", "no"])
    asker = FakeAsker(seed=3)
    found = evaluate(place.settings("multiple_choice", batch_size=2), fake_backend(asker))
    assert len(asker.calls) == 1 and sorted(asker.calls[0]) == sorted(f"q{n}" for n in range(12))
    # The shortest first, so that what stands together is of one length.
    assert asker.calls[0][0] == "q11" and asker.calls[0][-1] == "q0"
    assert [s["id"] for s in place.samples("multiple_choice")] == [f"q{n}" for n in range(12)]
    scores = found["tasks"]["multiple_choice"]
    assert scores["n"] == 12 and set(scores["by_subset"]) == {"even", "odd"}
    # The fake's own numbers, once more.
    best = [max(range(3), key=lambda i: s["logprobs"][i]) for s in place.samples("multiple_choice")]
    assert scores["scores"]["accuracy"] == sum(b == 0 for b in best) / 12
    there = json.loads((place.folder / "out/metrics.json").read_text())
    assert there == json.loads(json.dumps(found))
    assert there["config"]["batch_size"] == 2 and len(there["checkpoint"]["hash"]) == 16
    assert len(there["data"]["hash"]) == 16 and len(there["requests"]["multiple_choice"]) == 16
    speed = there["throughput"]["tasks"]["multiple_choice"]
    assert speed["samples"] == 12 and speed["samples_per_second"] > 0
    assert speed["compile_seconds"] == 0 and speed["prefill_tokens_per_second"] is None


def test_each_answer_is_on_the_disk_when_the_next_comes(place):
    place.write(short_lines())
    seen = []

    class Watching(FakeAsker):
        def _answer(self, questions, keep, say):
            for q in questions:
                keep(q, say(q))
                seen.append(len(place.samples()))

    evaluate(place.settings(), fake_backend(Watching()))
    assert seen == list(range(1, 13))


def test_an_asker_that_leaves_questions_out_is_told(place):
    place.write(short_lines())

    class Lazy(FakeAsker):
        def _answer(self, questions, keep, say):
            super()._answer(questions[1:], keep, say)

    with pytest.raises(RuntimeError, match="task exact_match: no answer to 1, such as q0"):
        evaluate(place.settings(), fake_backend(Lazy()))


def test_what_is_answered_is_not_asked_again(place):
    place.write(short_lines())

    class Ending(FakeAsker):
        def _answer(self, questions, keep, say):
            super()._answer(questions[:5], keep, say)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(place.settings(), fake_backend(Ending()))
    assert len(place.samples()) == 5
    with pytest.raises(UserError, match="--resume goes on with them"):
        evaluate(place.settings(), fake_backend(FakeAsker()))
    asker = FakeAsker()
    evaluate(place.settings(resume=True), fake_backend(asker))
    assert [len(c) for c in asker.calls] == [7]
    evaluate(place.settings(out=place.folder / "whole"), fake_backend(FakeAsker()))
    whole = (place.folder / "whole/samples_exact_match.jsonl").read_bytes()
    assert (place.folder / "out/samples_exact_match.jsonl").read_bytes() == whole
    again = FakeAsker()
    evaluate(place.settings(resume=True), fake_backend(again))
    assert not again.calls  # nothing is left
    assert (place.folder / "out/samples_exact_match.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"limit": 3}, "limit is 0 there, 3 here"),
        ({"max_new_tokens": 5}, "max_new_tokens is 64 there, 5 here"),
        ({"dtype": "bfloat16"}, 'dtype is "float32" there, "bfloat16" here'),
        ("data", "data is"),
        ("picture", "questions is"),
        ("weights", "checkpoint is"),
    ],
)
def test_another_request_is_not_gone_on_with(place, change, told):
    place.questions()
    evaluate(place.settings(), fake_backend(FakeAsker()))
    more = change if isinstance(change, dict) else {}
    if change == "data":
        place.questions(11)
    if change == "picture":
        Image.new("RGB", (20, 16), (1, 2, 3)).save(place.folder / "0.png")
    if change == "weights":
        (place.checkpoint / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=f"are of another request: {told}"):
        evaluate(place.settings(resume=True, **more), fake_backend(FakeAsker()))
    # These change no answer.
    if isinstance(change, dict):
        evaluate(place.settings(resume=True, batch_size=3), fake_backend(FakeAsker()))


@pytest.mark.parametrize("task", ["multiple_choice", "exact_match"])
def test_a_question_without_an_answer_is_counted_and_wrong(place, task):
    place.questions(4, choices=["red", "blue"] if task == "multiple_choice" else ())
    found = evaluate(place.settings(task), fake_backend(FakeAsker(broken=("q1",))))["tasks"][task]
    assert found["errors"] == 1 and found["n"] == 4
    bad = place.samples(task)[1]
    assert bad["error"] == "image a.png: broken" and bad["score"] == 0
    json.loads((place.folder / "out/metrics.json").read_text(), parse_constant=pytest.fail)
    assert "image a.png: broken" in (place.folder / "out/report.html").read_text()


def test_predict_only_and_then_its_scores(place):
    place.questions()
    found = evaluate(place.settings("anls", predict_only=True), fake_backend(FakeAsker()))
    assert found["tasks"]["anls"] == {"task": "anls", "n": 12, "errors": 0}
    assert (
        "score" not in place.samples("anls")[0] and not (place.folder / "out/report.html").exists()
    )
    scored = evaluate(
        Settings(
            data=place.folder / "data.jsonl",
            tasks="anls",
            out=place.folder / "out",
            resume=True,
            score_only=True,
        )
    )
    evaluate(place.settings("anls", out=place.folder / "whole"), fake_backend(FakeAsker()))
    assert place.samples("anls") == place.samples("anls", "whole")
    assert scored["tasks"]["anls"]["scores"]["anls"] > 0


# --- several hosts ------------------------------------------------------------------------------


class Together:
    """One of several hosts, each a thread."""

    def __init__(self, index, barrier, values):
        self.index = index
        self.count = len(values)
        self._barrier = barrier
        self._values = values

    def gather(self, value):
        self._values[self.index] = value
        self._barrier.wait(30)
        found = list(self._values)
        self._barrier.wait(30)
        return found

    def guard(self):
        return contextlib.nullcontext()


def run_hosts(settings, askers):
    """What each host returned or raised."""
    barrier, values = threading.Barrier(len(askers)), [None] * len(askers)

    def run(index):
        hosts = Together(index, barrier, values)
        try:
            return evaluate(settings, fake_backend(askers[index], join=lambda settings: hosts))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(askers)) as pool:
        return list(pool.map(run, range(len(askers))))


@pytest.mark.parametrize("together", [False, True])
def test_each_host_writes_its_share_and_the_first_merges(place, together):
    place.questions()
    evaluate(place.settings(out=place.folder / "whole"), fake_backend(FakeAsker()))
    whole = (place.folder / "whole/samples_exact_match.jsonl").read_bytes()
    shares = {}

    class Watching(FakeAsker):
        def _answer(self, questions, keep, say):
            super()._answer(questions, keep, say)
            for path in (place.folder / "out").glob("samples_*"):
                shares[path.name] = path.read_text().count("\n")

    askers = [Watching(seed=n) for n in range(2)]
    for asker in askers:
        asker.together = together
    first, second = run_hosts(place.settings(), askers)
    assert first["records"] == 12 and second == {}
    parts = [f"samples_exact_match.{n}-of-2.jsonl" for n in range(2)]
    assert shares == {parts[0]: 6, parts[1]: 6}
    # Of one computation over a mesh both hosts hear all answers; else each asks its own.
    assert [len(a.calls[0]) for a in askers] == ([12, 12] if together else [6, 6])
    assert [p.name for p in (place.folder / "out").glob("samples_*")] == [
        "samples_exact_match.jsonl"
    ]
    assert (place.folder / "out/samples_exact_match.jsonl").read_bytes() == whole


def test_a_run_of_two_hosts_that_stopped_goes_on_on_one(place):
    place.questions()
    evaluate(place.settings(out=place.folder / "whole"), fake_backend(FakeAsker()))
    out = place.folder / "out"
    out.mkdir()
    (out / "request_exact_match.json").write_bytes(
        (place.folder / "whole/request_exact_match.json").read_bytes()
    )
    lines = (place.folder / "whole/samples_exact_match.jsonl").read_bytes().splitlines(True)
    # One id in both parts, as after a change of the number of hosts; a line that was cut.
    (out / "samples_exact_match.0-of-2.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:9])
    (out / "samples_exact_match.1-of-3.jsonl").write_bytes(b"".join(lines[2:5]))
    asker = FakeAsker()
    evaluate(place.settings(resume=True), fake_backend(asker))
    assert sorted(asker.calls[0]) == sorted(f"q{n}" for n in range(5, 12))
    assert [p.name for p in out.glob("samples_*")] == ["samples_exact_match.jsonl"]
    assert (out / "samples_exact_match.jsonl").read_bytes() == b"".join(lines)


def test_what_the_first_host_refuses_all_refuse(place):
    place.questions()
    evaluate(place.settings(), fake_backend(FakeAsker()))
    first, second = run_hosts(place.settings(), [FakeAsker(), FakeAsker()])
    assert first == second and "--resume goes on with them" in first
