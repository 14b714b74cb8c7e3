"""Fully sharded parameters, with every collective written out.

The train step's loss and gradient run inside `shard_map` over the rows' axes: each device sees its
own rows and its own part of every parameter. What is split over `fsdp` is cast to the compute type
and gathered where it is used, a layer at a time inside the scan; the transpose of that gather
scatters the gradient. What is whole on every device has its gradient summed once, after all loops.
Left to the compiler, gathers became all-reduces (docs/performance.md).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from fuyu_jax.parallel.shards import ROW_AXES

GATHERED = "gathered"  # checkpoint name of a gathered parameter; no remat policy keeps it


def _axis(spec: P) -> int:
    """Which axis is split over `fsdp`; -1 for none."""
    for at, names in enumerate(spec):
        if names == "fsdp" or (isinstance(names, tuple) and "fsdp" in names):
            return at
    return -1


class Fsdp(NamedTuple):
    """How parameters are gathered and gradients brought home, inside `shard_map` over rows.

    specs: of every parameter, a tree like the parameters. sizes: of the mesh's axes. dtype: what
    is gathered and scattered.
    """

    specs: Any
    sizes: dict[str, int]
    dtype: jnp.dtype

    @classmethod
    def of(cls, shardings: Any, dtype: jnp.dtype) -> "Fsdp":
        """From the parameters' `NamedSharding`s."""
        mesh = jax.tree.leaves(shardings)[0].mesh
        return cls(jax.tree.map(lambda s: s.spec, shardings), dict(mesh.shape), dtype)

    @property
    def gathers(self) -> bool:
        """Whether anything is split over `fsdp`."""
        return self.sizes["fsdp"] > 1

    def row_specs(self) -> Any:
        """The specs over rows' axes alone, for `shard_map`."""

        def keep(spec: P) -> P:
            at = _axis(spec)
            return P() if at < 0 else P(*(None,) * at, "fsdp")

        return jax.tree.map(keep, self.specs)

    def _gather_one(self, x: jax.Array, spec: P, leading: int) -> jax.Array:
        at = _axis(spec)
        if at < 0 or not self.gathers:
            return x
        x = jax.lax.all_gather(x.astype(self.dtype), "fsdp", axis=at - leading, tiled=True)
        return checkpoint_name(x, GATHERED)

    def layer(self, state: Any) -> Any:
        """One layer's parameters, whole."""
        specs = self.specs["layers"]
        return jax.tree.map(lambda x, s: self._gather_one(x, s, 1), state, specs)

    def rest(self, params: Any) -> Any:
        """All parameters, whole but for the layers'."""
        return _outside_layers(lambda x, s: self._gather_one(x, s, 0), params, self.specs)

    def scatter_rest(self, grads: Any) -> Any:
        """Gradients of what `rest` gave, summed over `fsdp`, each device's part of them."""

        def one(g: jax.Array, spec: P) -> jax.Array:
            at = _axis(spec)
            if at < 0 or not self.gathers:
                return g
            part = jax.lax.psum_scatter(
                g.astype(self.dtype), "fsdp", scatter_dimension=at, tiled=True
            )
            return part.astype(jnp.float32)

        return _outside_layers(one, grads, self.specs)

    def sum_gradients(self, grads: Any) -> Any:
        """Sums over the rows' axes that no scatter has summed over yet."""

        def one(g: jax.Array, spec: P) -> jax.Array:
            left = [a for a in ROW_AXES if self.sizes[a] > 1 and (a == "data" or _axis(spec) < 0)]
            return jax.lax.psum(g, tuple(left)) if left else g

        return jax.tree.map(one, grads, self.specs)


def _outside_layers(function: Any, tree: Any, specs: Any) -> Any:
    """`function(leaf, spec)` on every parameter that is not a layer's."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [
        x if getattr(keys[0], "key", None) == "layers" else function(x, spec)
        for (keys, x), spec in zip(flat, jax.tree.leaves(specs), strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)
