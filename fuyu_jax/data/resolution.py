"""How large an image becomes, and how many of its patches are kept: known before it is decoded.

Everything drawn by chance is drawn from (seed, epoch, example), so a plan can be made on lengths
and made again on resume. Policies: Fuyu's own (native size under a cap), a budget of patches an
image, NaViT's sampled side (Dehghani et al. 2023, "Patch n' Pack"), each with a schedule over
training; and NaViT's token dropping with a rate for each example.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64

from fuyu_jax.errors import UserError
from fuyu_jax.patches import Grid, grid_of

Number = int | float
Schedule = Sequence[tuple[Number, Number]]  # (epoch, value), in order; linear in between
_BETA_SHARE = 0.3  # NaViT: the rate's variance is this share of mean · (1 - mean)


def scheduled(schedule: Schedule, epoch: Number) -> float:
    """The value at an epoch: linear between the points, constant before and after them."""
    epochs, values = zip(*schedule, strict=True)
    return float(np.interp(epoch, epochs, values))


def check_schedule(name: str, schedule: Schedule, low: Number, high: Number) -> None:
    """Raises a UserError unless epochs ascend and values lie in low..high."""
    epochs = [e for e, _ in schedule]
    if epochs != sorted(set(epochs)) or not all(low <= v <= high for _, v in schedule):
        raise UserError(
            f"{name}={list(schedule)}: give (epoch, value) pairs with ascending epochs and values "
            f"in {low:g}..{high:g}"
        )


@dataclass(frozen=True)
class Resolution:
    """How images are sized. None is ever enlarged, and every ratio is kept.

    kind: "native": as they are, under the cap. "patches": shrunk until they have at most
      `max_patches`. "sampled": for every image a side is drawn uniformly from `min_side` to
      `max_side` pixels, and the image shrunk to that side's square in area.
    max_height, max_width: the cap on all kinds, in pixels.
    scale_schedule: factor in 0..1 on the cap's sides (and on the sampled side, and on the root of
      the patch budget) by epoch; empty for 1.
    """

    kind: Literal["native", "patches", "sampled"] = "native"
    max_height: int = 1080
    max_width: int = 1920
    max_patches: int = 0
    min_side: int = 64
    max_side: int = 256
    scale_schedule: tuple[tuple[Number, Number], ...] = ()

    def __post_init__(self) -> None:
        if self.max_height < 1 or self.max_width < 1:
            raise UserError(f"largest image {self.max_height}×{self.max_width}: must be 1 or more")
        if self.kind == "patches" and self.max_patches < 1:
            raise UserError("resolution by patches needs max_patches of 1 or more")
        if self.kind == "sampled" and not 1 <= self.min_side <= self.max_side:
            raise UserError(f"sampled side {self.min_side}..{self.max_side}: give 1 <= min <= max")
        check_schedule("scale_schedule", self.scale_schedule, 0.01, 1)

    @property
    def changes(self) -> bool:
        """Whether an image's size depends on when it is met."""
        return self.kind == "sampled" or bool(self.scale_schedule)

    def grid(
        self,
        height: int,
        width: int,
        patch_size: int,
        *,
        epoch: Number = 0,
        rng: np.random.Generator | None = None,
    ) -> Grid:
        """The grid of an image of these pixels.

        Args:
          epoch: where training stands, for the schedule.
          rng: of this (seed, epoch, example), for a sampled side; without one the largest side is
            taken, so that evaluation draws nothing by chance.
        """
        factor = scheduled(self.scale_schedule, epoch) if self.scale_schedule else 1.0
        cap = max(1, int(self.max_height * factor)), max(1, int(self.max_width * factor))
        first = grid_of(height, width, patch_size, *cap)
        if self.kind == "native":
            return first
        if self.kind == "sampled":
            # Always drawn, so that the next image's draw does not depend on this one's size.
            side = self.max_side if rng is None else rng.uniform(self.min_side, self.max_side)
            wanted = min(first.scale, side * factor / (height * width) ** 0.5)
            return _scaled(height, width, patch_size, wanted, first)
        budget = max(1, int(self.max_patches * factor**2))
        if first.patches <= budget:
            return first
        return _fitted(height, width, patch_size, budget, first)


def _scaled(height: int, width: int, patch_size: int, scale: float, first: Grid) -> Grid:
    if scale >= first.scale:
        return first
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    return Grid(h, w, -(-h // patch_size), -(-w // patch_size), scale)


def _fitted(height: int, width: int, patch_size: int, budget: int, first: Grid) -> Grid:
    """The largest scale with at most `budget` patches, up to one part in a million."""
    low, high = 0.0, first.scale
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if _scaled(height, width, patch_size, middle, first).patches <= budget:
            low = middle
        else:
            high = middle
    return _scaled(height, width, patch_size, low, first)


@dataclass(frozen=True)
class TokenDrop:
    """Patches left out of training, by chance and evenly over an image (NaViT, section 2.3).

    mean_schedule: mean rate by epoch, 0..0.95; empty: none are dropped. Each example's rate is
    drawn from a Beta with that mean and a variance of 0.3 · mean · (1 - mean).
    """

    mean_schedule: tuple[tuple[Number, Number], ...] = ()

    def __post_init__(self) -> None:
        check_schedule("token_drop", self.mean_schedule, 0, 0.95)

    def rate(self, epoch: Number, rng: np.random.Generator) -> float:
        """The share of an example's patches to leave out."""
        mean = scheduled(self.mean_schedule, epoch) if self.mean_schedule else 0.0
        if mean <= 0:
            return 0.0
        # Beta(a, b) has variance m(1-m)/(a+b+1).
        total = 1 / _BETA_SHARE - 1
        return float(rng.beta(mean * total, (1 - mean) * total))

    def kept(self, patches: int, rate: Number) -> int:
        """How many patches of an image stay: at least one."""
        return max(1, round(patches * (1 - rate)))

    def keep(self, patches: int, rate: Number, rng: np.random.Generator) -> Int64[np.ndarray, "K"]:
        """Which patches of an image stay, ascending; the first always: it marks a new image."""
        others = self.kept(patches, rate) - 1
        chosen = 1 + rng.choice(patches - 1, others, replace=False) if others else []
        return np.concatenate([[0], np.sort(chosen)]).astype(np.int64)


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one example in one epoch."""
    return np.random.default_rng([seed, epoch, index])
