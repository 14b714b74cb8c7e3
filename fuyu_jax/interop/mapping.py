"""How our parameters lie in another program's tensors.

A file tensor, its axes split (`factored`), holds one or more of our parameters: each is a part of
it (`pick` on one axis) with its axes in another order. That is all that differs, so both
directions are views: nothing is computed, and a slice of ours reads only its own bytes.
"""

import math
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """One of our parameters in a file tensor.

    path: ours; a parameter of a layer has a leading axis L in the stack, which is not counted here.
    order: the axes of ours as axes of what `pick` leaves of the factored tensor.
    pick: (axis, index) in the factored tensor, if it holds several.
    """

    path: str
    order: tuple[int, ...]
    pick: tuple[int, int] | None = None

    def view(self, factored: np.ndarray) -> np.ndarray:
        """Our axes over the file's bytes."""
        if self.pick is not None:
            axis, index = self.pick
            factored = factored[(slice(None),) * axis + (index,)]
        return factored.transpose(self.order)

    def shape(self, factored: tuple[int, ...]) -> tuple[int, ...]:
        left = list(factored)
        if self.pick is not None:
            left.pop(self.pick[0])
        return tuple(left[a] for a in self.order)

    @property
    def row_axis(self) -> int:
        """Our axis that is the file tensor's first."""
        return self.order.index(0)


class FileTensor(NamedTuple):
    """A tensor as files have it.

    name: with `{}` for the layer, where there is one of it a layer. shape: as stored. factored:
    the same with axes split. parts: what it holds.
    """

    name: str
    shape: tuple[int, ...]
    factored: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def layered(self) -> bool:
        return "{}" in self.name


class Place(NamedTuple):
    """Where one of our parameters is found."""

    tensor: FileTensor
    part: Part

    @property
    def shape(self) -> tuple[int, ...]:
        """Ours, without the axis L."""
        return self.part.shape(self.tensor.factored)


def vector(name: str, path: str, *shape: int) -> FileTensor:
    """A bias or a norm's weight."""
    return FileTensor(name, (math.prod(shape),), shape, (Part(path, tuple(range(len(shape)))),))


def matrix(name: str, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> FileTensor:
    """A linear map: [outputs, inputs] there, [*inputs, *outputs] here."""
    o, i = len(outputs), len(inputs)
    order = (*range(o, o + i), *range(o))
    return FileTensor(
        name, (math.prod(outputs), math.prod(inputs)), (*outputs, *inputs), (Part(path, order),)
    )


def table(name: str, path: str, rows: int, columns: int) -> FileTensor:
    """An embedding table, the same way round there and here."""
    return FileTensor(name, (rows, columns), (rows, columns), (Part(path, (0, 1)),))


def linear(
    name: str, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool
) -> list[FileTensor]:
    """A linear map's weight and, if it has one, bias."""
    made = [matrix(f"{name}.weight", f"{path}/kernel", inputs, outputs)]
    return made + ([vector(f"{name}.bias", f"{path}/bias", *outputs)] if bias else [])


def norm(name: str, path: str, size: int, bias: bool) -> list[FileTensor]:
    made = [vector(f"{name}.weight", f"{path}/scale", size)]
    return made + ([vector(f"{name}.bias", f"{path}/bias", size)] if bias else [])


def places(tensors: list[FileTensor]) -> dict[str, Place]:
    """Our parameters by path."""
    return {part.path: Place(tensor, part) for tensor in tensors for part in tensor.parts}
