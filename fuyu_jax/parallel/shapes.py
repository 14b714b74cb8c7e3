"""Which mesh shapes work: for so many devices, a model, a batch; and the nearest one that does."""

import itertools
import math
from collections.abc import Mapping

from fuyu_jax.config import MeshConfig, ModelConfig
from fuyu_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def told(sizes: tuple[int, ...] | list[int]) -> str:
    """`data=4, fsdp=2, tensor=1`."""
    return ", ".join(f"{k}={v}" for k, v in zip(AXES, sizes, strict=True))


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Devices along each axis, -1 filled in.

    Raises:
      UserError: the axes do not multiply to the number of devices; names the nearest that do.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {told(sizes)}: sizes are 1 or more; one axis at most may be -1")
    asked = list(sizes)
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(devices // known, 1)
    if math.prod(sizes) != devices:
        least = math.prod(s for s in asked if s != -1)
        needs = f"a multiple of {least}" if -1 in asked else str(least)
        near = _nearest(sizes, devices)
        raise UserError(
            f"mesh {told(asked)} needs {needs} devices, there are {devices}; the nearest that "
            f"works: {told(near)}"
        )
    return sizes[0], sizes[1], sizes[2]


def nearest_on_torus(
    sizes: tuple[int, ...] | list[int], torus: tuple[int, ...]
) -> tuple[int, int, int]:
    """The mesh made of whole axes of a torus that keeps most of what was asked."""
    shapes = []
    for owners in itertools.product(range(3), repeat=len(torus)):
        shape = [1, 1, 1]
        for owner, size in zip(owners, torus, strict=True):
            shape[owner] *= size
        shapes.append((shape[0], shape[1], shape[2]))
    return min(shapes, key=lambda shape: _far(shape, sizes))


def _far(shape: tuple[int, ...], asked: tuple[int, ...] | list[int]) -> tuple[float, ...]:
    away = [abs(math.log(a / b)) for a, b in zip(shape, asked, strict=True)]
    return (away[0] + 2 * away[1] + 4 * away[2], *away)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(sizes: list[int], devices: int) -> tuple[int, int, int]:
    """The shape of so many devices that keeps most of what was asked, tensor first."""
    shapes = [
        (devices // (f * t), f, t) for t in _divisors(devices) for f in _divisors(devices // t)
    ]
    return min(shapes, key=lambda shape: _far(shape, sizes))


def check_model(shape: Mapping[str, int], model: ModelConfig) -> None:
    """Looks whether a mesh divides what it must of a model.

    Raises:
      UserError: names the sizes that do not divide and the nearest mesh size that does.
    """
    needed = {
        "tensor": {
            "model.num_heads": model.num_heads,
            "model.num_kv_heads": model.kv_heads,
            "model.mlp_dim": model.mlp_dim,
        },
        "fsdp": {"model.dim": model.dim},
    }
    for axis, sizes in needed.items():
        size = shape[axis]
        odd = [f"{name}={n}" for name, n in sizes.items() if n % size]
        if odd:
            works = [d for d in _divisors(math.gcd(*sizes.values()))]
            near = min(works, key=lambda d: (abs(math.log(d / size)), -d))
            raise UserError(
                f"mesh.{axis}={size} does not divide {' and '.join(odd)}; the nearest that does: "
                f"mesh.{axis}={near}"
            )


def check_rows(shape: Mapping[str, int], rows_per_batch: int) -> None:
    """Looks whether a batch divides over a mesh.

    Raises:
      UserError: names the nearest numbers of rows that do.
    """
    shards = shape["data"] * shape["fsdp"]
    if rows_per_batch < 1 or rows_per_batch % shards:
        below = rows_per_batch // shards * shards
        near = [str(n) for n in (below, below + shards) if n > 0]
        raise UserError(
            f"rows_per_batch={rows_per_batch} does not divide over {shards} devices "
            f"(data={shape['data']} × fsdp={shape['fsdp']}); the nearest that do: "
            f"{' and '.join(near)}"
        )
