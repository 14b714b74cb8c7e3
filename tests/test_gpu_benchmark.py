"""benchmarks/gpu.py at a size for a CPU: all its parts run, and say so."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*flags):
    command = [sys.executable, "benchmarks/gpu.py", *flags]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_every_part_runs_small():
    result = run("--small")
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    told = result.stdout
    assert told.count("check of blockwise, ") == 2
    assert told.count("| blockwise | ") == 6
    assert "train small: " in told and "generate: 2 prompts" in told
    assert told.strip().endswith("failed: nothing")


def test_without_a_gpu_it_says_so():
    result = run()
    assert result.returncode == 1
    assert result.stderr.strip() == "error: this wants a GPU and here is cpu; --small runs anywhere"


def test_a_part_that_is_none():
    result = run("--small", "--parts=check,trian")
    assert result.returncode == 1
    assert "trian is none of check, attention, train, generate" in result.stderr
