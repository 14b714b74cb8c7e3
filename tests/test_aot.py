"""Compiled steps: what they hold and send, on CPU, and for TPUs that are not here."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fuyu_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from fuyu_jax.errors import UserError
from fuyu_jax.model.attention import attention
from fuyu_jax.parallel import topology
from fuyu_jax.parallel.hlo import Program
from fuyu_jax.train import aot

ROOT = Path(__file__).parent.parent
SIZE, VOCAB, DIM = 2048, 3000, 512
KEYS = {
    "fits",
    "devices",
    "hbm_bytes_per_device",
    "bytes_per_device",
    "model_flops_per_step",
    "collectives",
    "step_seconds_bound",
    "mfu_bound",
}


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is not installed")
    topology.use_libtpu()


def small(**changes) -> TrainConfig:
    """Long rows, a small model: a buffer of S×S or S×V would be the largest by far."""
    model = ModelConfig(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=3,
        num_heads=2,
        head_dim=64,
        mlp_dim=512,
        patch_size=8,
        remat="full",
        dtype="bfloat16",
    )
    data = DataConfig(tokens_per_row=SIZE, patches_per_row=512)
    config = TrainConfig(name="small", rows_per_batch=4, num_steps=10, model=model, data=data)
    return dataclasses.replace(config, **changes)


def largest(program: Program) -> int:
    """Numbers in the largest array that a row could make: most are [rows, S, ...]."""
    sizes = 0
    for shape in program.shapes():
        total = 1
        for n in shape.sizes:
            total *= n
        sizes = max(sizes, total)
    return sizes


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_step_holds_nothing_of_size_tokens_by_tokens_or_vocabulary(remat):
    config = small(rows_per_batch=1, mesh=MeshConfig(data=1))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    program = Program(aot.lower_step(config).lowered.compile().as_text())
    for shape in program.shapes():
        assert shape.sizes.count(SIZE) < 2, shape
        assert not {SIZE, VOCAB} <= set(shape.sizes), shape
    # A flattened one would be as large. Loss chunks have 1.5 million numbers, all layers' states of
    # a kind 3.1 million; that is less.
    assert largest(program) < SIZE * min(SIZE, VOCAB)


def test_a_vocabulary_is_wanted():
    config = small()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=0))
    with pytest.raises(UserError, match=r"model\.vocab_size=0 .* --config\.model\.vocab_size="):
        aot.lower_step(config)


def test_a_report_on_a_small_step(libtpu, tmp_path, capsys):
    config = small(workdir=str(tmp_path), mesh=MeshConfig(data=1, fsdp=4), grad_accum=2)
    assert aot.run(config, "v5p:2x2x1")
    found = json.loads((tmp_path / "aot.json").read_text())
    assert set(found) >= KEYS
    assert found["devices"] == 4
    assert found["fits"] and found["bytes_per_device"]["spare"] > 0.9
    assert len(found["advice"]) == 3
    assert 0 < found["mfu_bound"] < 1
    # Nothing but weights and their gradients is sent. (Of those so small some are summed whole.)
    kinds = found["collectives"]
    assert kinds["all-gather"]["in_loops"] >= 6 * 3 * 2
    assert set(kinds) <= {"all-gather", "reduce-scatter", "all-reduce"}
    text = capsys.readouterr().out
    assert "v5p:2x2x1: 4 devices, mesh data=1, fsdp=4, tensor=1" in text
    assert "fits" in text


def test_the_head_is_gathered_once_and_before_all_loops(libtpu):
    opened = topology.open_topology("v5p:2x2x1")
    config = small(mesh=MeshConfig(data=1, fsdp=4), grad_accum=2)
    program = Program(aot.lower_step(config, opened.devices, "tpu").lowered.compile().as_text())
    heads = [c for c in program.collectives() if c.bytes == VOCAB * DIM * 2]
    gathers = [c for c in heads if c.kind == "all-gather"]
    assert [(c.times, c.in_loop) for c in gathers] == [(1, False)] * 2  # embedding and head
    for shape in program.shapes():
        assert shape.sizes.count(SIZE) < 2 and not {SIZE, VOCAB} <= set(shape.sizes), shape


def test_what_does_not_fit_is_told(libtpu, tmp_path, capsys):
    config = small(workdir=str(tmp_path), mesh=MeshConfig(data=4), rows_per_batch=4)
    model = dataclasses.replace(config.model, vocab_size=2**22, num_layers=1)
    assert not aot.run(dataclasses.replace(config, model=model), "v5e:2x2")
    found = json.loads((tmp_path / "aot.json").read_text())
    assert not found["fits"]
    assert any("mesh.fsdp=4" in tip for tip in found["advice"])
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 64), (2, 2, 128)])
def test_splash_compiles_for_tpu(libtpu, heads, kv_heads, width):
    device = topology.open_topology("v5e:2x2").devices[0]
    where = jax.sharding.SingleDeviceSharding(device)

    def of(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def total(q, k, v, ids):
        out = attention(q, k, v, ids, window=300, backend="splash")
        return jnp.sum(out.astype(jnp.float32))

    q, kv = of((2, 1000, heads, width)), of((2, 1000, kv_heads, width))
    lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, kv, kv, of((2, 1000), jnp.int32))
    text = lowered.compile().as_text()
    assert all(f"splash_mha_{part}" in text for part in ("fwd", "dq", "dkv"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5p:3x3x3", r"none that libtpu knows; the nearest: v5p:2x4x4 \(32 chips\)"),
        ("v5p:4x4", r"the nearest: v5p:4x4x1 \(16 chips\)"),
        ("v6e:16x17", "the nearest: v6e:16x16"),
        ("v5x:2x2x2", 'no chip "v5x"; did you mean "v5'),
        ("v5p", "write it as v5p:4x4x4"),
    ],
)
def test_a_topology_that_is_none(libtpu, name, told):
    with pytest.raises(UserError, match=told):
        topology.open_topology(name)


def test_a_mesh_across_a_torus_is_told(libtpu):
    devices = topology.open_topology("v5p:4x4x4").devices
    with pytest.raises(UserError, match=r"torus of 4×4×4; the nearest that can: data=4, fsdp=16"):
        aot.lower_step(small(mesh=MeshConfig(data=2, fsdp=32), rows_per_batch=64), devices, "tpu")


def test_the_command_ends_in_one_line(libtpu, tmp_path):
    command = [sys.executable, "train.py", "--config=configs/fuyu_8b.py", "--aot=v5p:5x5x5"]
    result = subprocess.run(
        [*command, f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith('error: topology "v5p:5x5x5"')
    assert "Traceback" not in result.stderr
