"""The mesh, and the table of rules that shards parameters and batches over it."""

import math
import os
import re

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fuyu_jax.config import MeshConfig
from fuyu_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def use_cpu_cores(rows_per_batch: int) -> None:
    """Makes one CPU device of each core, as far as rows divide; no effect on GPU and TPU.

    XLA runs one CPU program on one core but for its large matrix products; rows over devices keep
    all cores busy. Must come before JAX is first used; a number set from outside stays.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count() or 1
    count = max(n for n in range(1, cores + 1) if rows_per_batch % n == 0)
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


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over all devices.

    Axes are of type `Auto`: the compiler places intermediate values (JAX 0.10 would make them
    explicit by default).

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count()
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {dict(zip(AXES, sizes, strict=True))}: one axis at most may be -1")
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(count // known, 1)
    if math.prod(sizes) != count:
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} devices, "
            f"there are {count}"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


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


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over `data` and `fsdp`, after `leading` whole axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ("data", "fsdp")))
