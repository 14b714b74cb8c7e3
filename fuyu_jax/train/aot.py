"""The train step compiled for TPUs that are not here: does it fit, what does it send, how fast may
it be. No data, no tokenizer and no parameters are made; the compiler sees shapes alone."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import TrainConfig
from fuyu_jax.errors import UserError
from fuyu_jax.model.attention import choose_backend
from fuyu_jax.model.decoder import make_decoder
from fuyu_jax.model.loss import CHUNK
from fuyu_jax.parallel.chips import links
from fuyu_jax.parallel.flops import Work, attended_pairs, model_flops
from fuyu_jax.parallel.hlo import Program
from fuyu_jax.parallel.mesh import batch_sharding, make_mesh
from fuyu_jax.parallel.shapes import check_model, check_rows, told
from fuyu_jax.parallel.topology import Topology, open_topology
from fuyu_jax.train.advice import advise
from fuyu_jax.train.optimizer import make_optimizer
from fuyu_jax.train.step import Shapes, jit_train_step, state_shapes

# What rows are taken to hold: full, segments of so many tokens, one token in so many with a loss.
SEGMENT = 2048
LOSS_SHARE = 16
IMAGE_ID, NEWLINE_ID = 1, 2  # any: shapes do not depend on them


class Lowered(NamedTuple):
    """A step ready to be compiled."""

    mesh: Mesh
    shapes: Shapes
    lowered: Any


def lower_step(
    config: TrainConfig, devices: list[Any] | None = None, platform: str = ""
) -> Lowered:
    """The real train step of a configuration, lowered from shapes.

    Args:
      config: the run; its model's vocabulary must be set.
      devices: of a topology, or JAX's own.
      platform: what it is compiled for, where it is not JAX's own.

    Raises:
      UserError: no vocabulary, or a mesh, batch or backend that cannot be.
    """
    if not config.model.vocab_size:
        raise UserError(
            "model.vocab_size=0 leaves the vocabulary to the tokenizer, which is not opened here; "
            "give it, as --config.model.vocab_size=262144"
        )
    mesh = make_mesh(config.mesh, devices)
    check_model(mesh.shape, config.model)
    check_rows(mesh.shape, config.rows_per_batch)
    model = config.model
    backend = choose_backend(
        model.attention_backend, platform=platform or None, image_attention=model.image_attention
    )
    model = dataclasses.replace(model, attention_backend=backend)

    def optimizer(params: Any):
        return make_optimizer(config.optim, params, config.num_steps)

    def make():
        return make_decoder(model, image_id=IMAGE_ID, newline_id=NEWLINE_ID, seed=config.seed)

    with jax.set_mesh(mesh):
        shapes = state_shapes(make, optimizer, mesh)
        step = jit_train_step(
            shapes.graph,
            optimizer(shapes.state.params),
            shapes.shardings,
            mesh,
            image_id=IMAGE_ID,
            patch_loss_weight=model.patch_loss_weight,
        )
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes.state,
            shapes.shardings,
        )
        return Lowered(mesh, shapes, step.lower(state, _batch(config, mesh)))


def _batch(config: TrainConfig, mesh: Mesh) -> PackedBatch:
    data, lead = config.data, (config.grad_accum, config.rows_per_batch)
    like = PackedBatch.empty(1, 1, 1, 1)
    tokens, patches = (data.tokens_per_row,), (data.patches_per_row,)
    sizes = PackedBatch(
        tokens, tokens, tokens, tokens, (*patches, config.model.patch_channels), (*patches, 2)
    )
    sharding = batch_sharding(mesh, leading=1)
    return PackedBatch(
        *(
            jax.ShapeDtypeStruct((*lead, *size), x.dtype, sharding=sharding)
            for size, x in zip(sizes, like, strict=True)
        )
    )


def _device_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree's part on one device."""
    parts = jax.tree.map(
        lambda x, s: int(jnp.dtype(x.dtype).itemsize * math.prod(s.shard_shape(x.shape))),
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(parts))


def _kernel_flops(program: Program, size: int) -> float:
    """Work of splash attention's kernels, whose blocks under the diagonal are all computed."""
    products = {"_fwd_": 2, "_dq_": 3, "_dkv_": 4}
    total = 0.0
    for op, _, times, _ in program.running():
        if op.kind == "custom-call" and "splash" in op.name:
            count = next((n for key, n in products.items() if key in op.name), 0)
            # [rows, heads, S, E] of q, out or their gradients, over half of S keys.
            total += (
                times * count * size * max(math.prod(s.sizes) for s in op.shapes if s.kind != "f32")
            )
    return total


def report(config: TrainConfig, topology: Topology) -> dict[str, Any]:
    """Compiles for a topology, and reads what came of it. The keys are those of aot.json."""
    begun = time.perf_counter()
    mesh, shapes, lowered = lower_step(config, topology.devices, "tpu")
    chip = topology.chip
    told_short = ""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, told_short = None, str(error).splitlines()[0]
    seconds = time.perf_counter() - begun
    params = _device_bytes(shapes.state.params, shapes.shardings.params)
    optimizer = _device_bytes(shapes.state.opt_state, shapes.shardings.opt_state)
    rows = config.rows_per_batch * config.grad_accum
    size = config.data.tokens_per_row
    work = Work(
        tokens=rows * size,
        pairs=rows * attended_pairs(_segments(size), config.model.window),
        loss_tokens=rows * size / LOSS_SHARE,
        patches=rows * config.data.patches_per_row,
    )
    useful = model_flops(config.model, work).total
    devices = len(topology.devices)
    found: dict[str, Any] = {
        "topology": topology.name,
        "mesh": dict(mesh.shape),
        "devices": devices,
        "compile_seconds": round(seconds, 1),
        "assumed": {
            "rows": rows,
            "tokens_per_row": size,
            "segment_tokens": min(SEGMENT, size),
            "loss_tokens_per_row": size // LOSS_SHARE,
            "patches_per_row": config.data.patches_per_row,
        },
        "hbm_bytes_per_device": chip.hbm,
        "model_flops_per_step": useful,
    }
    if compiled is None:
        found |= {
            "fits": False,
            "bytes_per_device": {"params": params, "optimizer": optimizer},
            "compiler": told_short,
        }
        return found | {"advice": advise(config, found)}
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    found["fits"] = total <= chip.hbm
    found["bytes_per_device"] = {
        "params": params,
        "optimizer": optimizer,
        "activations": total - params - optimizer,
        "total": total,
        "spare": round(1 - total / chip.hbm, 4),
        "host": memory.host_temp_size_in_bytes,
    }
    # The loss's loop turns as often as there are chunks of loss positions on a device.
    here = config.rows_per_batch // (mesh.shape["data"] * mesh.shape["fsdp"]) * size
    program = Program(compiled.as_text(), max(1, -(-here // LOSS_SHARE // CHUNK)))
    found |= _bounds(program, topology, mesh, size)
    bound = found["step_seconds_bound"]
    found["mfu_bound"] = round(useful / (bound * devices * chip.flops), 4)
    return found | {"advice": advise(config, found)}


def _segments(size: int) -> np.ndarray:
    return np.array([SEGMENT] * (size // SEGMENT) + [n for n in (size % SEGMENT,) if n])


def _bounds(program: Program, topology: Topology, mesh: Mesh, size: int) -> dict[str, Any]:
    """Collectives, and what compute, HBM and interconnect each need at the least."""
    chip = topology.chip
    places = list(mesh.devices.flat)
    kinds: dict[str, dict[str, int]] = {}
    largest = []
    sending = 0.0
    for one in program.collectives():
        if len(one.group) < 2:
            continue
        sums = kinds.setdefault(one.kind, {"count": 0, "bytes": 0, "wire_bytes": 0, "in_loops": 0})
        sums["count"] += one.times
        sums["bytes"] += one.bytes * one.times
        sums["wire_bytes"] += one.wire
        sums["in_loops"] += one.times if one.in_loop else 0
        lanes = links(chip, [tuple(places[i].coords) for i in one.group], topology.torus)
        n = len(one.group)
        sending += one.wire * (n - 1) / n / (lanes * chip.link_rate)
        largest.append((one.wire, one))
    largest.sort(key=lambda pair: -pair[0])
    flops = program.matmul_flops() + _kernel_flops(program, size)
    seconds = {
        "compute": flops / chip.flops,
        "hbm": program.hbm_bytes() / chip.hbm_rate,
        "interconnect": sending,
    }
    return {
        "collectives": kinds,
        "largest_collectives": [
            {
                "kind": one.kind,
                "times": one.times,
                "devices": len(one.group),
                "bytes": one.bytes,
                "in_loop": one.in_loop,
            }
            for _, one in largest[:12]
        ],
        "computed_flops_per_device": flops,
        "attention_kernel_flops_per_device": _kernel_flops(program, size),
        "seconds": seconds,
        "step_seconds_bound": max(seconds.values()),
        "step_seconds_without_overlap": seconds["compute"] + seconds["interconnect"],
    }


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def describe(found: dict[str, Any]) -> str:
    """The report in lines to be read."""
    parts = found["bytes_per_device"]
    assumed = found["assumed"]
    hbm = found["hbm_bytes_per_device"]
    mesh = told(list(found["mesh"].values()))
    lines = [
        f"{found['topology']}: {found['devices']} devices, mesh {mesh}; "
        f"compiled in {found['compile_seconds']} s",
        f"a step: {assumed['rows']} rows of {assumed['tokens_per_row']} tokens, taken to be full, "
        f"in segments of {assumed['segment_tokens']}, with {assumed['loss_tokens_per_row']} loss "
        f"positions and {assumed['patches_per_row']} patches a row",
    ]
    names = [k for k in ("params", "optimizer", "activations", "total") if k in parts]
    lines.append("a device: " + ", ".join(f"{k} {_gib(parts[k])}" for k in names))
    if "total" in parts:
        fits = "fits" if found["fits"] else "DOES NOT FIT"
        lines[-1] += f" of {_gib(hbm)}: {fits}, {parts['spare']:.0%} spare"
    else:
        lines.append(f"DOES NOT FIT {_gib(hbm)}: {found['compiler']}")
    lines.append(f"model FLOPs a step: {found['model_flops_per_step']:.3e}")
    if "collectives" in found:
        for kind, sums in found["collectives"].items():
            lines.append(
                f"  {kind}: {sums['count']} a step ({sums['in_loops']} in loops), "
                f"{sums['bytes'] / 1e9:.2f} GB, {sums['wire_bytes'] / 1e9:.2f} GB on the wire"
            )
        seconds = ", ".join(f"{k} {v:.3f} s" for k, v in found["seconds"].items())
        lines.append(
            f"at least: {seconds}; so a step takes {found['step_seconds_bound']:.3f} s or more "
            f"(compute and interconnect one after the other: "
            f"{found['step_seconds_without_overlap']:.3f} s), and MFU is {found['mfu_bound']:.3f} "
            "at most"
        )
    lines.append("to change first:")
    lines += [f"  {n}. {text}" for n, text in enumerate(found["advice"], 1)]
    return "\n".join(lines)


def run(config: TrainConfig, name: str) -> bool:
    """Prints the report on a topology and writes it to WORKDIR/aot.json; whether it fits.

    Raises:
      UserError: a topology that libtpu does not know, or a configuration that cannot be.
    """
    topology = open_topology(name)
    found = report(config, topology)
    folder = Path(config.workdir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "aot.json").write_text(json.dumps(found, indent=1) + "\n")
    print(describe(found), flush=True)
    print(f"written to {folder / 'aot.json'}", flush=True)
    return found["fits"]
