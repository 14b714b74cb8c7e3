"""What TPUs can do, for bounds on a step's time.

Figures of a whole chip, from Google's pages (docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e,
/tpu7x): bfloat16 peak, HBM and its rate, and the interconnect in Gbit/s, which is the sum over the
chip's links of one direction.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """A chip, or its share of what JAX calls a device.

    flops: dense bfloat16 a second. hbm: bytes. hbm_rate, link_rate: bytes a second, the latter of
    one link in one direction. axes: of the torus. wrap: a torus axis of at least so many chips
    closes to a ring.
    """

    flops: float
    hbm: int
    hbm_rate: float
    link_rate: float
    axes: int
    wrap: int

    def share(self, devices: int) -> "Chip":
        """One of so many devices that the chip is to JAX."""
        n = devices
        return self._replace(
            flops=self.flops / n,
            hbm=self.hbm // n,
            hbm_rate=self.hbm_rate / n,
            link_rate=self.link_rate / n,
        )


CHIPS: dict[str, Chip] = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 2400e9 / 8 / 6, 3, 4),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8 / 4, 2, 16),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 4800e9 / 8 / 6, 3, 4),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 3584e9 / 8 / 4, 2, 16),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 9600e9 / 8 / 6, 3, 4),
}


def links(chip: Chip, coordinates: list[tuple[int, ...]], torus: tuple[int, ...]) -> int:
    """Links over which each member of a group receives: two an axis along which the group lies,
    one where that axis does not close to a ring or the group is only a part of it."""
    count = 0
    for axis, size in enumerate(torus):
        along = len({c[axis] for c in coordinates})
        if along > 1:
            count += 2 if along == size and size >= chip.wrap else 1
    return max(count, 1)
