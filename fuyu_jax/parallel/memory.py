"""Memory of CPU runs: what a step frees is kept for the next.

XLA's CPU programs ask the system for their buffers anew at every step, and glibc hands large ones
back at once. Each page is then zeroed and mapped again: a tenth of a step's time.
"""

import ctypes
import os
import sys
from pathlib import Path

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = (
    (_MMAP_MAX, 0),  # large blocks come from the heap, which stays
    (_TRIM_THRESHOLD, -1),  # and is never given back at its end
    (_TOP_PAD, 64 * 2**20),
    (_ARENA_MAX, 1),  # one heap for all threads: the others cannot keep large blocks
)
_DEVICES = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def runs_on_cpu() -> bool:
    """Whether JAX will use the CPU, as far as can be told before it is used."""
    named = os.environ.get("JAX_PLATFORMS", "")
    return named == "cpu" if named else not any(Path(p).exists() for p in _DEVICES)


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed; whether it took that. Must come before JAX is first used,
    whose threads else have heaps of their own. What is set by MALLOC_… variables stays."""
    if not sys.platform.startswith("linux") or not runs_on_cpu():
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all([mallopt(name, value) == 1 for name, value in _SETTINGS])
