"""How much work a step is, how fast it goes against the chip's peak, and traces of it."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import TrainConfig
from fuyu_jax.errors import UserError
from fuyu_jax.parallel import flops, hosts

PROFILE = "profile"


class Meter:
    """Counts the work of steps.

    Args:
      config: sizes; `peak_flops` of one device, where its kind is not known.
      vocab_size: the model's.
      image_id: the placeholder of a patch.
      copies: how many hosts bring the same rows.
    """

    def __init__(self, config: TrainConfig, vocab_size: int, image_id: int, copies: int = 1):
        self._model, self._vocab = config.model, vocab_size
        self._image_id, self._copies = image_id, copies
        self.peak = flops.peak_flops(jax.devices()[0].device_kind, config.peak_flops)

    def count(self, batches: Sequence[PackedBatch]) -> list[float]:
        """(attended pairs, patches) of this host's rows, as its share of what all hosts have."""
        pairs = patches = 0
        for batch in batches:
            lengths = flops.segment_lengths(np.asarray(batch.segment_ids))
            pairs += flops.attended_pairs(lengths, self._model.window)
            patches += int((np.asarray(batch.tokens) == self._image_id).sum())
        return [pairs / self._copies, patches / self._copies]

    def step_flops(self, tokens: float, loss_tokens: float, counted: Sequence[float]) -> float:
        """Operations of a step, from its metrics and from `count` summed over the hosts."""
        pairs, patches = counted
        work = flops.Work(tokens, pairs, loss_tokens, patches)
        return flops.model_flops(self._model, work, self._vocab).total

    def rates(self, flops_per_second: float) -> dict[str, float]:
        """What the log says of a speed: by device, and as a share of the peak where it is known."""
        each = flops_per_second / jax.device_count()
        rates = {"tflops_per_device": each / 1e12}
        if self.peak:
            rates["mfu"] = each / self.peak
        if peak := peak_device_bytes():
            rates["peak_device_bytes"] = float(peak)
        return rates


def peak_device_bytes() -> int | None:
    """The most memory that any device of this host has held; None where none says (CPU)."""
    held = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    return max((h for h in held if h is not None), default=None)


class Profiler:
    """Writes a trace of some steps, of the first host's devices, into `WORKDIR/profile`.

    Args:
      workdir: of the run.
      steps: "10:13" for steps 10, 11 and 12; "" for none.

    Raises:
      UserError: it is no such range.
    """

    def __init__(self, workdir: Path, steps: str):
        self._folder = workdir / PROFILE
        self._begin, self._end = parse_steps(steps)
        self._on = False

    def before(self, step: int) -> None:
        """Begins to trace where this step is the first."""
        # A run that is taken up in the middle of the range has the rest of it.
        if self._begin <= step < self._end and not self._on and hosts.first():
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: object) -> None:
        """Ends where this step was the last; waits until it is done."""
        if self._on and step >= self._end - 1:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            print(f"trace of steps before {self._end}: {self._folder}", flush=True)


def parse_steps(text: str) -> tuple[int, int]:
    """(first, one after the last) of "10:13"; (0, 0) of "".

    Raises:
      UserError: it is no such range.
    """
    if not text:
        return 0, 0
    begin, colon, end = text.partition(":")
    try:
        first, last = int(begin), int(end)
    except ValueError:
        first = last = 0
    if not colon or not 1 <= first < last:
        near = f"{begin}:{int(begin) + 3}" if begin.isdigit() and int(begin) else "10:13"
        raise UserError(
            f"profile_steps={text}: give FIRST:END, such as {near} (steps FIRST to END - 1, from 1 "
            "on)"
        )
    return first, last
