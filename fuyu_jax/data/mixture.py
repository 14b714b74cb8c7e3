"""Several sources in fixed proportion: draw d is a function of d, the weights and the seed.

Among the first n draws a source of weight w has w·n to within one and half the number of sources,
for every n: no chance, no drift.
Each source is gone through in an order of its own, every example once in each of its epochs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.sources.base import Source
from fuyu_jax.errors import UserError


@dataclass(frozen=True)
class Part:
    """One source of a mixture, with its share of the draws and its own resolution policy."""

    name: str
    source: Source
    weight: int | float
    policy: LayoutPolicy


class Draws(NamedTuple):
    """A run of draws: which part, which of its examples, and in which of the part's epochs."""

    part: Int32[np.ndarray, "N"]
    index: Int64[np.ndarray, "N"]
    epoch: Int32[np.ndarray, "N"]


class Mixture:
    """Sources in exact proportion.

    An epoch of the mixture is as many draws as it takes until every example of every source has
    been drawn once; a source that is small for its weight is repeated meanwhile. With one source
    it is that source's epoch.

    Args:
      parts: named sources; names differ, weights are positive (their sum need not be 1).
      seed: of the orders.

    Raises:
      UserError: no parts, two of one name, an empty source, a weight that is not positive.
    """

    def __init__(self, parts: Sequence[Part], seed: int):
        if not parts:
            raise UserError("a mixture needs at least one source")
        names = [p.name for p in parts]
        for p in parts:
            if names.count(p.name) > 1:
                raise UserError(f'mixture: two sources are named "{p.name}"')
            if not 1e-6 <= p.weight < float("inf"):  # as fine as proportions are kept
                raise UserError(
                    f'mixture: weight {p.weight} of "{p.name}" must be above 0: 1e-6 or more'
                )
            if not len(p.source):
                raise UserError(f'mixture: source "{p.name}" has no examples')
        self.parts = tuple(parts)
        self.seed = seed
        self.sizes = [len(p.source) for p in parts]
        exact = [Fraction(p.weight).limit_denominator(10**6) for p in parts]
        self.shares = [w / sum(exact) for w in exact]
        self.epoch_draws = max(
            -(-n * share.denominator // share.numerator)
            for n, share in zip(self.sizes, self.shares, strict=True)
        )

    def counts(self, draws: int) -> list[int]:
        """How many of the first `draws` draws each part has; sums to `draws`."""
        total, before, counts = Fraction(0), 0, []
        for share in self.shares:
            total += share
            here = int(total * draws)  # floor: cumulative, so that the last one is `draws`
            counts.append(here - before)
            before = here
        return counts

    def passes(self, draws: int) -> dict[str, float]:
        """How often each source has been gone through after so many draws."""
        counts = self.counts(draws)
        return {p.name: c / n for p, c, n in zip(self.parts, counts, self.sizes, strict=True)}

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a mixture lives as long as its run)
    def _order(self, part: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, part, epoch]).permutation(self.sizes[part])

    def draws(self, epoch: int) -> Draws:
        """All draws of an epoch of the mixture, evenly interleaved."""
        first = self.counts(epoch * self.epoch_draws)
        after = self.counts((epoch + 1) * self.epoch_draws)
        columns = []
        for k, (start, stop) in enumerate(zip(first, after, strict=True)):
            visits = np.arange(start, stop)
            passes, places = np.divmod(visits, self.sizes[k])
            index = np.empty(len(visits), np.int64)
            for number in np.unique(passes):
                here = passes == number
                index[here] = self._order(k, int(number))[places[here]]
            # Draw j of a part stands where j + 1/2 of its share has gone by.
            when = (visits - start + 0.5) / max(stop - start, 1)
            columns.append((np.full(len(visits), k), index, passes, when))
        part, index, passes, when = (np.concatenate(c) for c in zip(*columns, strict=True))
        order = np.argsort(when, kind="stable")
        return Draws(part[order].astype(np.int32), index[order], passes[order].astype(np.int32))
