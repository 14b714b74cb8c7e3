"""Several hosts: flags, shares of rows, and two processes against one."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from fuyu_jax import config as config_lib
from fuyu_jax.checkpoint import read_config
from fuyu_jax.config import MeshConfig
from fuyu_jax.errors import UserError
from fuyu_jax.generate.loading import model_maker, read_checkpoint_params
from fuyu_jax.parallel import hosts, make_mesh
from fuyu_jax.tokenizer import Tokenizer
from fuyu_jax.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent

# --- start-up -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", None, None), "--coordinator=h:1 without --num_processes and --process_id: give"),
        ((None, 2, 1), "--num_processes=2, --process_id=1 without --coordinator: give all of"),
        (("h:1", 2, None), "without --process_id"),
        (("h", 2, 0), r"--coordinator=h: give HOST:PORT of process 0, such as h:1234"),
        (("h:1", 2, 2), "--process_id=2 of --num_processes=2: give 0 to 1"),
        (("h:1", 0, 0), "--num_processes=0: give 1 or more"),
    ],
)
def test_flags_that_do_not_fit_are_told(given, message):
    with pytest.raises(UserError, match=message) as caught:
        hosts.start_hosts(*given)
    assert "\n" not in str(caught.value)


LAUNCHERS = """
import os, jax
from fuyu_jax.errors import UserError
from fuyu_jax.parallel.hosts import start_hosts

assert start_hosts() == 1 and not jax.distributed.is_initialized()
for name, value in (("OMPI_COMM_WORLD_SIZE", "4"), ("JOB_COMPLETION_INDEX", "1")):
    os.environ[name] = value
    try:
        start_hosts()
    except UserError as error:
        print(error)
    assert start_hosts(num_processes=1) == 1
    del os.environ[name]
assert not jax.distributed.is_initialized()
# As srun and Open MPI 4 say it; a run of one process.
os.environ |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1",
               "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
assert start_hosts() == 1 and jax.distributed.is_initialized()
"""


def test_launchers():
    """A plain machine starts nothing; processes of a launcher that JAX does not know do not train
    side by side; Slurm is found."""
    told = subprocess.run(
        [sys.executable, "-c", LAUNCHERS],
        cwd=ROOT, env=_env(1), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    first, second = told.stdout.splitlines()
    assert "Open MPI started 4 processes" in first
    assert "--num_processes=4 --process_id=$OMPI_COMM_WORLD_RANK" in first
    assert "pod 1 of an indexed job" in second and "jax[k8s]" in second


# --- rows ---------------------------------------------------------------------------------------


def test_each_process_brings_the_rows_of_its_devices():
    four = np.array([[0], [0], [1], [1]])  # two row shards each
    assert [hosts.row_share(four, p) for p in (0, 1)] == [(0, 2), (1, 2)]
    # A TPU's mesh may lay a host's devices apart.
    assert hosts.row_share(np.array([[0], [1], [0], [1]]), 1) == (1, 2)
    # A tensor axis within a host, and over two: these bring the same rows.
    assert hosts.row_share(np.array([[0, 0], [1, 1]]), 1) == (1, 2)
    over = np.array([[0, 1], [2, 3]])
    assert [hosts.row_share(over, p) for p in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(UserError, match=r"3 row shards of 2 devices.*divides a host's devices"):
        hosts.row_share(np.array([[0, 0], [0, 1], [1, 1]]), 0)


# --- two processes ------------------------------------------------------------------------------


def _env(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags}


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Runs:
    """`train.py` on a config, in two processes of one device or in one of two."""

    def __init__(self, config, folder):
        self.folder = folder
        self.config = folder / "config.py"
        (folder / "config.json").write_text(config_lib.to_json(config))
        self.config.write_text(
            "from pathlib import Path\nfrom fuyu_jax import config\n\ndef get_config():\n"
            f"    return config.from_json(Path({str(folder / 'config.json')!r}).read_text())\n"
        )

    def begin(self, name, devices, *flags):
        return subprocess.Popen(
            [
                sys.executable,
                "train.py",
                f"--config={self.config}",
                f"--workdir={self.folder / name}",
                *flags,
            ],
            cwd=ROOT,
            env=_env(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def begin_two(self, name, *flags):
        address = f"--coordinator=127.0.0.1:{_free_port()}"
        return [
            self.begin(name, 1, address, "--num_processes=2", f"--process_id={i}", *flags)
            for i in range(2)
        ]

    def losses(self, name):
        return {x["step"]: x["loss"] for x in read_metrics(self.folder / name) if "loss" in x}


def ended(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, (process.returncode, out[-1000:], err[-3000:])
    return out, err


@pytest.fixture
def runs(tiny_config, tmp_path):
    config = dataclasses.replace(
        tiny_config,
        num_steps=40,
        rows_per_batch=4,
        checkpoint_every=1000,
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    changes = {"model.patch_init": "whiten", "eval.summary": True, "eval.final_examples": 4}
    return Runs(config_lib.replace(config, changes), tmp_path)


def params_of(workdir, step):
    """Read by one process on one device."""
    tokenizer = Tokenizer(workdir)
    make = model_maker(read_config(workdir), tokenizer)
    shapes = nnx.split(nnx.eval_shape(make))[1]
    return jax.tree.leaves(read_checkpoint_params(workdir, step, shapes, make_mesh(MeshConfig())))


def test_two_processes_are_one_run(runs):
    """They equal one process bit for bit; a signal to one of them stops both at the same step, and
    they go on from there."""
    ended(runs.begin("one", 2))
    one = runs.losses("one")
    assert list(one) == list(range(1, 41))

    both = runs.begin_two("two")
    while len(runs.losses("two")) < 10:
        assert both[1].poll() is None, both[1].communicate()
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        _, err = ended(process, 3)
        assert "stopped by signal 15 at step" in err
    reached = max(runs.losses("two"))
    assert 10 <= reached < 40
    (first, _), (second, _) = (ended(p) for p in runs.begin_two("two"))
    assert "devices: 2 cpu on 2 hosts (data=1, fsdp=2, tensor=1)" in first
    assert f"resumed from step {reached}" in first
    assert not [line for line in second.splitlines() if "Gloo" not in line]
    assert runs.losses("two") == one
    a, b = (params_of(runs.folder / name, 40) for name in ("one", "two"))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    a, b = (json.loads((runs.folder / n / "summary.json").read_text()) for n in ("one", "two"))
    assert a["exact_match"] == b["exact_match"] and a["by_family"] == b["by_family"]


def test_an_error_of_one_host_ends_both(runs):
    """The first host finds it while the other waits."""
    for process in runs.begin_two("bad", "--config.data.train_json=/nonexistent.json"):
        _, err = ended(process, 2)
        assert "nonexistent.json: no such file" in err.strip().splitlines()[-1]
    assert not (runs.folder / "bad").exists()
    assert not [p for p in runs.folder.iterdir() if p.name.startswith(".")]
