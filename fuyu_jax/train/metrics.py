"""What a run says of itself: a progress bar, TensorBoard, a JSON line a step, and pictures."""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from tensorboardX import SummaryWriter
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line cut off by a crash is left out."""
    file = workdir / METRICS_FILE
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Recorder:
    """Writes metrics by step.

    Args:
      workdir: for `metrics.jsonl` and the TensorBoard files.
      start: the step that training begins or goes on at; later lines of an earlier run, whose
        steps will be made again, are taken out.
      total: steps in all.
      progress: show a bar.
      config: goes to Weights & Biases, where it is installed and WANDB_MODE or WANDB_API_KEY is
        set.
    """

    def __init__(
        self, workdir: Path, start: int, total: int, progress: bool, config: dict[str, Any]
    ):
        kept = [line for line in read_metrics(workdir) if line["step"] <= start]
        self.file = workdir / METRICS_FILE
        partial = self.file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.file)
        self._lines = self.file.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start or None)
        self._bar = tqdm(
            total=total, initial=start, disable=not progress, unit="step", dynamic_ncols=True
        )
        self._wandb = _start_wandb(workdir, config)
        self._process = psutil.Process()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of numbers at a step."""
        self._lines.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(step - self._bar.n)

    def show(self, **shown: str) -> None:
        """Numbers beside the bar, and the memory in use."""
        memory = self._process.memory_info().rss / 2**30
        self._bar.set_postfix(**shown, mem=f"{memory:.2f}GiB", refresh=False)

    def say(self, text: str) -> None:
        """A line that the bar does not swallow."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(workdir: Path, config: dict[str, Any]):
    if not (os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY")):
        return None
    try:
        import wandb
    except ImportError:
        return None
    return wandb.init(project="fuyu_jax", dir=str(workdir), config=config, resume="allow")


class SilentRecorder(Recorder):
    """That of a host which leaves it to the first to write and to show."""

    def __init__(self, *run: Any):
        del run

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def show(self, **shown: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Speed(NamedTuple):
    """Real tokens and operations a second; shares of padding, and of time that the loader made us
    wait."""

    tokens: float
    flops: float
    padding: float
    wait: float


class Window:
    """Tokens, padding, work and time since the last line."""

    def __init__(self) -> None:
        self.tokens = self.places = self.flops = self.wait = 0.0
        self.all_tokens = self.all_places = 0.0  # since the totals were last brought up to date
        self.began = time.perf_counter()

    def add(self, tokens: float, places: float, flops: float) -> None:
        self.tokens += tokens
        self.flops += flops
        self.places += places
        self.all_tokens += tokens
        self.all_places += places

    def pause(self, seconds: float) -> None:
        """Leaves out what was no training: a validation, the beginning of a checkpoint."""
        self.began += seconds

    def take(self) -> Speed:
        """The figures, which begin anew."""
        now = time.perf_counter()
        seconds = max(now - self.began, 1e-9)
        result = Speed(
            self.tokens / seconds,
            self.flops / seconds,
            1 - self.tokens / self.places if self.places else 0.0,
            self.wait / seconds,
        )
        self.tokens = self.places = self.flops = self.wait = 0.0
        self.began = now
        return result
