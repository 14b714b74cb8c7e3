"""Meshes and sharding: which device holds what.

`make_mesh` lays devices out along `data`, `fsdp` and `tensor`; one table of rules says how every
parameter is split over them.
"""

from fuyu_jax.parallel.mesh import batch_sharding, make_mesh, state_shardings, use_cpu_cores

__all__ = ["batch_sharding", "make_mesh", "state_shardings", "use_cpu_cores"]
