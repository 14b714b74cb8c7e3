"""Running a function on each device's own rows (and heads) of a batch.

Loops over rows inside a jitted step must not see the whole batch, or the compiler gathers it on
every device first. What is wrapped here sees its shard alone. The train step is inside `shard_map`
over rows already (`parallel/fsdp.py`); there, only heads are left to be split.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

ROW_AXES = ("data", "fsdp")


def mesh_in_use():
    """The mesh that has been set, if it is one of ours."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and set(ROW_AXES) <= set(mesh.axis_names) else None


def row_shards(rows: int) -> int:
    """Over how many shards the mesh in use lays that many rows; 1 without a mesh, or where the
    rows are a device's own already."""
    mesh = mesh_in_use()
    if mesh is None or set(ROW_AXES) <= set(mesh.manual_axes):
        return 1
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return shards if rows % shards == 0 else 1


def map_shards(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function(*arrays)` on each device's part; all inputs and outputs are [rows, heads?, ...].

    Axis 0 is rows; axis 1, where an array has more than two axes, is heads, over `tensor` where it
    divides. Nothing is communicated. Without a mesh, or where the rows do not divide, the
    function sees everything.
    """
    mesh = mesh_in_use()
    shards = row_shards(arrays[0].shape[0])
    if mesh is None or (shards == 1 and mesh.shape["tensor"] == 1):
        return function(*arrays)
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    heads = min(a.shape[1] for a in arrays if a.ndim > 2)
    tensor = "tensor" if "tensor" in free and heads % mesh.shape["tensor"] == 0 else None
    rows = ROW_AXES if shards > 1 else None

    def spec(x: Any) -> P:
        return P(rows, tensor) if x.ndim > 2 else P(rows)

    out = jax.eval_shape(function, *arrays)
    return jax.shard_map(
        function,
        in_specs=tuple(spec(a) for a in arrays),
        out_specs=jax.tree.map(spec, out),
        axis_names=free,
        check_vma=False,
    )(*arrays)


def sum_shards(function: Callable[..., Any], summed: Any, *arrays: jax.Array) -> Any:
    """`function(*arrays)` on each device's rows, some results summed over all.

    Args:
      function: of shards of the arrays.
      summed: a tree like the result of booleans: True is summed over the rows' axes, False stays
        with its rows.
      arrays: [rows, ...] each; what all devices need whole is closed over.

    Inside `shard_map` over rows nothing is summed: that is left to the caller.
    """
    if row_shards(arrays[0].shape[0]) == 1:
        return function(*arrays)

    def local(*parts: jax.Array) -> Any:
        return jax.tree.map(
            lambda s, x: jax.lax.psum(x, ROW_AXES) if s else x, summed, function(*parts)
        )

    return jax.shard_map(
        local,
        in_specs=tuple(P(ROW_AXES) for _ in arrays),
        out_specs=jax.tree.map(lambda s: P() if s else P(ROW_AXES), summed),
        check_vma=False,
    )(*arrays)
