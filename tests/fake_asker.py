"""A model that answers from what it is asked, without JAX: for tests of the harness."""

import hashlib
import random
from pathlib import Path

from fuyu_jax.evals.harness import Backend, Said
from fuyu_jax.evals.requests import prompt_text


def number(*parts):
    return int(hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:8], 16)


class FakeAsker:
    """Answers in a drawn order. calls: the ids of each call. broken: ids without an answer."""

    together = False

    def __init__(self, seed=0, broken=()):
        self.calls = []
        self.questions = {}
        self.broken = broken
        self._draw = random.Random(seed)
        self._new_tokens = 0

    def _answer(self, questions, keep, say):
        self.calls.append([q.id for q in questions])
        self.questions.update({q.id: q for q in questions})
        for q in self._draw.sample(list(questions), len(questions)):
            keep(q, Said(error="image a.png: broken") if q.id in self.broken else say(q))

    def _text(self, question):
        words = ("red", "blue", "grün", "yes", "no")
        at = number(prompt_text(question.parts))
        self._new_tokens += 2
        return Said(words[at % len(words)], new_tokens=2, finished=at % 7 > 0)

    def generate(self, questions, max_new_tokens, keep):
        self._answer(questions, keep, self._text)

    def likelihoods(self, questions, keep):
        def say(q):
            found = [-number(prompt_text(q.parts), c) / 2**32 for c in q.continuations]
            return Said(logprobs=tuple(found))

        self._answer(questions, keep, say)

    def documents(self, questions, window, keep):
        def say(q):
            (text,) = q.continuations
            return Said(logprobs=(-float(len(text)),), tokens=len(text.split()))

        self._answer(questions, keep, say)

    def usage(self):
        return {"new_tokens": self._new_tokens, "compile_seconds": 0.0}


def fake_backend(asker, **more):
    return Backend(lambda checkpoint, settings: asker, **more)


def fake_checkpoint(folder: Path) -> Path:
    """What has the name of a Hugging Face folder's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder
