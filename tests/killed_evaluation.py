"""Kills an evaluation at each of its writes and goes on: run by `test_harness_killed.py`.

`python killed_evaluation.py FOLDER`: each run is a child of its own that ends by a real SIGKILL
before, within or behind the n-th write, rename or removal of a file.
"""

import io
import os
import shutil
import signal
import sys
from pathlib import Path

from fake_asker import FakeAsker, fake_backend

from fuyu_jax.evals import output
from fuyu_jax.evals.harness import evaluate
from fuyu_jax.evals.settings import Settings

HOW = ("before", "within", "behind")


class Killer:
    """Counts what changes files, and ends this process at one of them."""

    def __init__(self, at, how):
        self.left = at
        self.how = how

    def around(self, change, half=None):
        self.left -= 1
        if self.left == 0 and self.how == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.left == 0 and self.how == "within" and half:
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        made = change()
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return made


class Watched(io.FileIO):
    """A file of answers without a buffer, so that a write is one that a kill can cut."""

    def __init__(self, killer, path, mode):
        super().__init__(path, mode)
        self._killer = killer

    def write(self, data):
        write = super().write
        return self._killer.around(lambda: write(data), lambda: write(data[: len(data) // 2]))


def watch(killer):
    """Lets the killer see every write of this process."""
    open_file, write_text, replace, unlink = Path.open, Path.write_text, Path.replace, Path.unlink

    def opening(path, mode="r", *args, **kwargs):
        if mode == "ab":
            return Watched(killer, path, mode)
        return open_file(path, mode, *args, **kwargs)

    def writing(path, text, *args, **kwargs):
        def whole():
            return write_text(path, text, *args, **kwargs)

        return killer.around(whole, lambda: write_text(path, text[: len(text) // 2]))

    Path.open = opening
    Path.write_text = writing
    Path.replace = lambda path, to: killer.around(lambda: replace(path, to))
    Path.unlink = lambda path, **kwargs: killer.around(lambda: unlink(path, **kwargs))


def child(settings, asker, killer=None):
    """Evaluates in a child. Returns the signal that ended it, 0 if it came to its end."""
    if not (pid := os.fork()):
        code = 1
        try:
            if killer:
                watch(killer)
            evaluate(settings, fake_backend(asker))
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def final(out):
    """All that is there at the end, but for what tells the time or the folder's name."""
    names = sorted(p.name for p in out.iterdir())
    samples = (out / "samples_exact_match.jsonl").read_bytes()
    return names, samples, (out / "report.html").read_bytes()


def main(folder):
    def settings(out, **more):
        return Settings(
            data=folder / "data.jsonl",
            tasks="exact_match",
            checkpoint=folder / "model",
            out=folder / out,
            **more,
        )

    child(settings("whole"), FakeAsker())
    whole = final(folder / "whole")
    kills = 0
    for how in HOW:
        at = 0
        while True:
            at += 1
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            # The answers of the second run come in another order.
            ended = child(settings("out"), FakeAsker(seed=1), Killer(at, how))
            if not ended:
                break
            assert ended == signal.SIGKILL
            kills += 1
            # It is killed once more, at its third write, and then comes to its end.
            child(settings("out", resume=True), FakeAsker(seed=2), Killer(3, "within"))
            if out.exists() and (out / "samples_exact_match.jsonl").exists():
                lines = output.read_lines(out / "samples_exact_match.jsonl")
                assert len({line["id"] for line in lines}) == len(lines), (how, at)
            child(settings("out", resume=True), FakeAsker(seed=3))
            assert final(out) == whole, (how, at)
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
