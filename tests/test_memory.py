"""Freed memory that stays: counted in page faults of a process of its own."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from fuyu_jax.parallel.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
import numpy as np
def faults(turns):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(turns):
        np.ones(int(sys.argv[2]))  # of 8 bytes: 15,625 pages for 8 million
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2)
print(kept, faults(2))
"""


def run(how, numbers=8_000_000, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, str(numbers)],
        capture_output=True,
        text=True,
        check=True,
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
    )
    kept, faults = result.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_what_is_freed_is_kept():
    plain, kept = run("plain"), run("keep")
    # Huge pages would make fewer faults of both; kept memory makes none.
    assert plain[1] > 100
    assert kept == (True, kept[1]) and kept[1] < plain[1] / 10
    # More than 2 GiB at the heap's end stay, too: what a step of a small model asks for.
    assert run("keep", 280_000_000)[1] < plain[1] / 10


def test_not_for_accelerators_nor_over_what_is_set():
    assert not run("keep", JAX_PLATFORMS="cuda")[0]
    assert not run("keep", MALLOC_ARENA_MAX="2")[0]
