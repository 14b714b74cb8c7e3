"""Meshes over simulated devices, in processes of their own (the number of devices is fixed)."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fuyu_jax import config as config_lib
from fuyu_jax.config import MeshConfig, ModelConfig
from fuyu_jax.errors import UserError
from fuyu_jax.parallel import make_mesh
from fuyu_jax.parallel.shapes import check_model, check_rows, mesh_sizes

ROOT = Path(__file__).parent.parent

MESHES = {"8x1": (8, 1, 1), "4x2": (4, 2, 1), "2x4": (2, 4, 1), "2x2x2": (2, 2, 2)}

# Runs of one process, in turn: losses, compilations, and what lies where.
SCRIPT = """
import dataclasses, gc, json, sys
import jax, numpy as np
from pathlib import Path
from fuyu_jax import config as C
from fuyu_jax.parallel.mesh import paths
from fuyu_jax.train import Trainer
from fuyu_jax.train.metrics import read_metrics

compiled = 0
def count(event, duration, **about):
    global compiled
    compiled += event == "/jax/core/compile/backend_compile_duration"
jax.monitoring.register_event_duration_secs_listener(count)

base = C.from_json(Path(sys.argv[1]).read_text())
told = {}
for name, (sizes, steps) in json.loads(sys.argv[2]).items():
    config = dataclasses.replace(
        base, workdir=f"{base.workdir}-{name}", mesh=C.MeshConfig(*sizes)
    )
    trainer = Trainer(config)
    state, step, counts = trainer.state, trainer.step_fn, []
    def counted(*arguments):
        counts.append(compiled)
        return step(*arguments)
    trainer.step_fn = counted
    leaves = list(zip(paths(state), jax.tree.leaves(state)))
    whole = sum(x.nbytes for _, x in leaves)
    largest = max(x.nbytes for _, x in leaves)
    # Before shards are looked at, which makes arrays of them.
    alone = [x.shape for x in jax.live_arrays() if len(x.devices()) == 1 and x.nbytes >= largest]
    each = sum(x.addressable_shards[0].data.nbytes for _, x in leaves)
    sharded = {p: str(x.sharding.spec) for p, x in leaves if not x.is_fully_replicated}
    trainer.run(stop_after=steps)
    counts.append(compiled)
    losses = [x["loss"] for x in read_metrics(Path(config.workdir)) if "loss" in x]
    told[name] = {"losses": losses, "counts": counts, "share": each / whole, "sharded": sharded,
                  "alone": alone}
    del trainer, state, step, counted, leaves
    gc.collect()
print(json.dumps(told))
"""


def train(tmp_path, config, devices, runs):
    config = dataclasses.replace(
        config,
        workdir=str(tmp_path / "run"),
        rows_per_batch=8,
        num_steps=101,
        checkpoint_every=1000,
    )
    file = tmp_path / "config.json"
    file.write_text(config_lib.to_json(config))
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file), json.dumps(runs)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def spread(tmp_path_factory, make_tiny_config):
    """Ten steps on each mesh of eight devices, a hundred on the last."""
    folder = tmp_path_factory.mktemp("eight")
    runs = {k: (v, 100 if k == "2x2x2" else 10) for k, v in MESHES.items()}
    return train(folder, make_tiny_config(folder), 8, runs)


def test_losses_are_equal_on_one_device_and_on_eight(spread, tiny_config, tmp_path):
    (alone,) = train(tmp_path, tiny_config, 1, {"1": ((1, 1, 1), 10)}).values()
    assert len(alone["losses"]) == 10
    for name, run in spread.items():
        # float32 sums in another order, over ten updates.
        np.testing.assert_allclose(run["losses"][:10], alone["losses"], rtol=1e-5, err_msg=name)


def test_a_hundred_steps_compile_nothing_after_the_first(spread):
    counts = spread["2x2x2"]["counts"]
    assert len(counts) == 101
    # The first step's numbers are read after the second is begun; then all is there. (The last
    # number is after the checkpoint.)
    assert len(set(counts[3:-1])) == 1, counts


def test_parameters_and_optimizer_state_are_born_sharded(spread):
    run = spread["2x2x2"]
    kernels = {p: s for p, s in run["sharded"].items() if p.endswith("kernel")}
    # The parameters' and both moments'.
    assert len([p for p in kernels if p.endswith("attention/q/kernel")]) == 3
    assert all("'fsdp'" in s for s in kernels.values())
    # The vocabulary of this tokenizer is odd.
    assert all("'tensor'" in s for p, s in kernels.items() if "head" not in p)
    # A quarter, what is too small to split, and half of the embedding and head: the tokenizer's
    # vocabulary, which `tensor` does not divide, is most of so small a model.
    assert run["share"] < 0.4
    assert spread["2x4"]["share"] < 0.3  # a quarter of all
    for one in spread.values():
        assert one["alone"] == []


def test_a_mesh_that_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"needs 3 devices, there are 1; .* works: data=1, fsdp=1"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(UserError, match="one axis at most"):
        make_mesh(MeshConfig(data=-1, fsdp=-1))


@pytest.mark.parametrize(
    ("asked", "devices", "message"),
    [
        ((4, 4, 1), 8, "needs 16 devices, there are 8; the nearest that works: data=2, fsdp=4, "),
        ((-1, 3, 1), 8, "needs a multiple of 3 devices, there are 8; .*: data=2, fsdp=4, tensor=1"),
        ((-1, 1, 16), 8, "needs a multiple of 16 devices, there are 8; .*: data=1, fsdp=1, tensor"),
        ((1, 7, 2), 16, "there are 16; the nearest that works: data=1, fsdp=8, tensor=2"),
    ],
)
def test_the_nearest_mesh_is_told(asked, devices, message):
    with pytest.raises(UserError, match=message):
        mesh_sizes(MeshConfig(*asked), devices)


def test_any_shape_that_multiplies_works():
    assert mesh_sizes(MeshConfig(-1, 4, 2), 64) == (8, 4, 2)
    assert mesh_sizes(MeshConfig(1, -1, 1), 12) == (1, 12, 1)
    assert mesh_sizes(MeshConfig(3, 2, 2), 12) == (3, 2, 2)


def test_a_mesh_that_does_not_divide_the_model_or_the_batch_is_told():
    model = ModelConfig(num_heads=8, num_kv_heads=2, mlp_dim=96, dim=96)
    check_model({"data": 1, "fsdp": 32, "tensor": 2}, model)
    message = r"mesh.tensor=4 does not divide model.num_kv_heads=2; .* does: mesh.tensor=2"
    with pytest.raises(UserError, match=message):
        check_model({"data": 1, "fsdp": 1, "tensor": 4}, model)
    message = r"mesh.fsdp=64 does not divide model.dim=96; the nearest that does: mesh.fsdp=48"
    with pytest.raises(UserError, match=message):
        check_model({"data": 1, "fsdp": 64, "tensor": 1}, model)
    mesh = {"data": 4, "fsdp": 2, "tensor": 1}
    check_rows(mesh, 16)
    message = r"rows_per_batch=12 does not divide over 8 devices \(data=4 × fsdp=2\).*: 8 and 16"
    with pytest.raises(UserError, match=message):
        check_rows(mesh, 12)
    with pytest.raises(UserError, match=r"the nearest that do: 8$"):
        check_rows(mesh, 2)
