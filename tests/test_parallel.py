"""Meshes over simulated devices, in processes of their own (the number of devices is fixed)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fuyu_jax.config import MeshConfig
from fuyu_jax.errors import UserError
from fuyu_jax.parallel import make_mesh

ROOT = Path(__file__).parent.parent

SCRIPT = """
import json, sys
from fuyu_jax import config as C
from fuyu_jax.train import Trainer
from fuyu_jax.train.metrics import read_metrics
from pathlib import Path
config = C.from_json(Path(sys.argv[1]).read_text())
trainer = Trainer(config)
trainer.run()
losses = [x["loss"] for x in read_metrics(Path(config.workdir)) if "loss" in x]
kernel = trainer.state.params["layers"]["attention"]["q"]["kernel"][...]
print(json.dumps({"losses": losses, "sharding": str(kernel.sharding.spec)}))
"""


def train(tmp_path, config, devices, **mesh):
    import dataclasses

    from fuyu_jax import config as config_lib

    name = "-".join(str(n) for n in mesh.values())
    config = dataclasses.replace(
        config, workdir=str(tmp_path / name), mesh=MeshConfig(**mesh), rows_per_batch=8, num_steps=4
    )
    file = tmp_path / f"{name}.json"
    file.write_text(config_lib.to_json(config))
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_losses_are_equal_on_one_device_and_on_eight(tiny_config, tmp_path):
    alone = train(tmp_path, tiny_config, 1, data=1, fsdp=1, tensor=1)
    spread = train(tmp_path, tiny_config, 8, data=2, fsdp=2, tensor=2)
    assert len(alone["losses"]) == 4
    # float32 sums in another order, over four updates.
    np.testing.assert_allclose(spread["losses"], alone["losses"], rtol=1e-5)
    assert "'fsdp', 'tensor'" in spread["sharding"]


def test_a_mesh_that_does_not_fit_is_told():
    with pytest.raises(UserError, match="needs 3 devices, there are 1"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(UserError, match="one axis at most"):
        make_mesh(MeshConfig(data=-1, fsdp=-1))
