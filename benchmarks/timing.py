"""Times of several programs that share a machine, and often a process."""

import statistics
import time
from collections.abc import Callable


def in_turn(runs: dict[str, Callable[[], object]], repeats: int, warm: int = 1) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, so that noise meets all.

    Args:
      warm: rounds before, which are not counted: for compilation and, where programs share a heap,
        until it has grown to what all of them want.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm + repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()}
