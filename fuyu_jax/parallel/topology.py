"""TPU topologies that can be compiled for on a machine without one: libtpu knows them by name."""

import importlib.util
import itertools
import math
import os
import re
from typing import Any, NamedTuple

from fuyu_jax.errors import UserError, nearest
from fuyu_jax.parallel.chips import CHIPS, Chip

LIBTPU = "0.0.42"  # what jax 0.10 was built with; the `aot` extra has it


class Topology(NamedTuple):
    """Devices to compile for. chip: what one of them can do. torus: chips along each axis."""

    name: str
    devices: list[Any]
    chip: Chip
    torus: tuple[int, ...]


def use_libtpu() -> None:
    """Sets what libtpu wants to find on a machine without TPUs; before JAX is first used.

    Raises:
      UserError: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--aot needs libtpu, the compiler for TPUs: pip install 'fuyu-jax[aot]'")
    # libtpu takes a lock on the machine's TPUs, and asks Google's cloud what it runs on.
    settings = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")  # where JAX was imported before


def open_topology(name: str) -> Topology:
    """The devices of a topology such as v5p:4x4x4.

    Raises:
      UserError: libtpu does not know it; names the nearest that it does.
    """
    kind, _, layout = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f'topology "{name}": no chip "{kind}"{nearest(kind, CHIPS)} (v5p:4x4x4)')
    chip = CHIPS[kind]
    if not re.fullmatch(r"[0-9]+(x[0-9]+)*", layout):
        example = f"{kind}:{'x'.join(['4'] * chip.axes)}"
        raise UserError(f'topology "{name}": write it as {example}')
    torus = tuple(int(n) for n in layout.split("x"))
    devices = _open(kind, torus) if len(torus) == chip.axes else None
    if not devices:
        near = _nearest(kind, torus, chip)
        raise UserError(
            f'topology "{name}" is none that libtpu knows; the nearest: {kind}:{_text(near)} '
            f"({math.prod(near)} chips)"
        )
    return Topology(name, devices, chip.share(len(devices) // math.prod(torus)), torus)


def _text(torus: tuple[int, ...]) -> str:
    return "x".join(map(str, torus))


def _open(kind: str, torus: tuple[int, ...]) -> list[Any] | None:
    import jax
    from jax.experimental import topologies

    if not 0 < math.prod(torus) <= 2**16:
        return None
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{_text(torus)}")
    except jax.errors.JaxRuntimeError:
        return None
    return list(found.devices)


def _nearest(kind: str, torus: tuple[int, ...], chip: Chip) -> tuple[int, ...]:
    """Of the shapes whose axes are powers of two, the one nearest in chips, then in shape."""
    count = max(math.prod(torus), 1)
    wanted = sorted(max(n, 1) for n in torus)[-chip.axes :]
    wanted = [1] * (chip.axes - len(wanted)) + wanted
    powers = (1, 2, 4, 8, 16, 32)
    shapes = itertools.combinations_with_replacement(powers, chip.axes)

    def far(shape: tuple[int, ...]) -> tuple[float, float, float]:
        away = sum(abs(math.log(a / b)) for a, b in zip(shape, wanted, strict=True))
        return abs(math.log(math.prod(shape) / count)), away, shape[-1] / shape[0]

    # Axes of one chip come last: v5p:2x2x1.
    ordered = (
        (*(n for n in s if n > 1), *(n for n in s if n == 1)) for s in sorted(shapes, key=far)
    )
    return next(shape for shape in ordered if _open(kind, shape))
