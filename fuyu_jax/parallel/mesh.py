"""The mesh, and the table of rules that shards parameters and batches over it."""

import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fuyu_jax.config import MeshConfig
from fuyu_jax.errors import UserError
from fuyu_jax.parallel.hosts import row_share
from fuyu_jax.parallel.memory import keep_freed_memory
from fuyu_jax.parallel.shapes import AXES, mesh_sizes, nearest_on_torus, told


def use_cpu_cores(rows_per_batch: int, processes: int = 1) -> None:
    """Makes one CPU device of each core, as far as rows divide; no effect on GPU and TPU.

    XLA runs one CPU program on one core but for its large matrix products; rows over devices keep
    all cores busy. Also keeps freed memory (`parallel/memory.py`). Must come before JAX is first
    used; a number set from outside stays.
    """
    keep_freed_memory()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count() or 1
    count = max(n for n in range(1, cores + 1) if n == 1 or rows_per_batch % (n * processes) == 0)
    jax.config.update("jax_num_cpu_devices", count)


# The last axes of a parameter, by the end of its path; stacked layers have one more axis in front.
# The first match counts; what matches nothing is replicated.
_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding$", ("tensor", "fsdp")),
    (r"head/kernel$", ("fsdp", "tensor")),
    (r"patch_(projection|position)/kernel$", ("fsdp", "tensor")),
    (r"attention/[qkv]/kernel$", ("fsdp", "tensor", None)),
    (r"attention/[qkv]/bias$", ("tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/(up|gate)/kernel$", ("fsdp", "tensor")),
    (r"mlp/(up|gate)/bias$", ("tensor",)),
    (r"mlp/down/kernel$", ("tensor", "fsdp")),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or over those of a topology that is only compiled for.

    Axes are of type `Auto`: the compiler places intermediate values (JAX 0.10 would make them
    explicit by default).

    Raises:
      UserError: the axes do not multiply to the number of devices, or cannot be laid along a
        TPU's torus; names the nearest that do.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError:
        torus = tuple(max(d.coords[i] for d in devices) + 1 for i in range(3))
        raise UserError(
            f"mesh {told(sizes)} cannot be laid along a torus of {'×'.join(map(str, torus))}; the "
            f"nearest that can: {told(nearest_on_torus(sizes, torus))}"
        ) from None


def _path(keys: tuple) -> str:
    names = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", ""))) for k in keys)
    return "/".join(str(n) for n in names if str(n) != "value")


def paths(tree) -> list[str]:
    """Slash-separated paths of a tree's leaves, in leaf order."""
    return [_path(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    for pattern, axes in _RULES:
        if re.search(pattern, path) and len(shape) >= len(axes):
            full = (None,) * (len(shape) - len(axes)) + axes
            # An axis that its mesh axis does not divide stays whole.
            return PartitionSpec(
                *(
                    a if a and n % mesh.shape[a] == 0 else None
                    for a, n in zip(full, shape, strict=True)
                )
            )
    return PartitionSpec()


def state_shardings(tree, mesh: Mesh | AbstractMesh):
    """A sharding for every leaf of parameters or optimizer state (moments have the same paths)."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree.unflatten(
        treedef, [NamedSharding(mesh, _spec(_path(keys), x.shape, mesh)) for keys, x in flat]
    )


def row_devices(mesh: Mesh) -> int:
    """Over how many shards a batch's rows are laid."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def host_rows(mesh: Mesh) -> tuple[int, int]:
    """(which, of how many) equal shares of a batch's rows this process brings.

    Raises:
      UserError: the rows of its devices are in part another process's too.
    """
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return row_share(processes.reshape(row_devices(mesh), -1), jax.process_index())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over `data` and `fsdp`, after `leading` whole axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ("data", "fsdp")))
