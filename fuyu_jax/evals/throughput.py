"""How fast an evaluation goes, with what was compiled and loaded apart."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

# What an asker may tell, summed since it was made.
USAGE = (
    "compile_seconds",
    "compilations",
    "prompt_tokens",
    "prefill_seconds",
    "new_tokens",
    "decode_seconds",
    "reused_tokens",
)


class Clock:
    """Times of a run, by task; only of what was asked in this run."""

    def __init__(self) -> None:
        self._load_seconds = 0.0
        self._tasks: dict[str, dict[str, int | float]] = {}

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._load_seconds += time.perf_counter() - began

    @contextlib.contextmanager
    def asking(self, task: str, asker: Any, samples: int) -> Iterator[None]:
        """Times some questions, and what the asker used for them."""
        sums = self._tasks.setdefault(task, {"samples": 0, "seconds": 0.0})
        before, began = dict(asker.usage()), time.perf_counter()
        yield
        sums["seconds"] += time.perf_counter() - began
        sums["samples"] += samples
        for name, value in asker.usage().items():
            sums[name] = sums.get(name, 0) + value - before.get(name, 0)

    def report(self) -> dict[str, Any]:
        """For `metrics.json`; None where the asker does not tell."""
        return {
            "load_seconds": self._load_seconds,
            "tasks": {name: _rates(sums) for name, sums in self._tasks.items()},
        }


def _rates(sums: Mapping[str, int | float]) -> dict[str, int | float | None]:
    found: dict[str, int | float | None] = {name: sums.get(name) for name in USAGE}
    seconds = max(sums["seconds"] - sums.get("compile_seconds", 0.0), 1e-9)
    return {
        "samples": sums["samples"],
        "seconds": seconds,  # without compiling
        **found,
        "samples_per_second": sums["samples"] / seconds,
        "new_tokens_per_second": _rate(sums.get("new_tokens"), seconds),
        "prefill_tokens_per_second": _rate(sums.get("prompt_tokens"), sums.get("prefill_seconds")),
        "decode_tokens_per_second": _rate(sums.get("new_tokens"), sums.get("decode_seconds")),
    }


def _rate(count: int | float | None, seconds: int | float | None) -> float | None:
    return count / seconds if count is not None and seconds else None
