"""Mixtures: exact proportions, every example once in each of its source's epochs."""

import collections
import dataclasses

import numpy as np
import pytest

from fuyu_jax.data.example import Example, Text
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.mixture import Mixture, Part
from fuyu_jax.errors import UserError

POLICY = LayoutPolicy(patch_size=8)


@dataclasses.dataclass
class Numbers:
    """Examples that are nothing but a number."""

    size: int

    def __len__(self):
        return self.size

    def id(self, index):
        return str(index)

    def __getitem__(self, index):
        return Example(str(index), (Text(str(index)),))


def mixture(seed=0, **parts):
    return Mixture([Part(k, Numbers(n), w, POLICY) for k, (n, w) in parts.items()], seed)


def test_proportions_hold_at_every_moment_of_100_000_draws():
    mixed = mixture(a=(700, 0.55), b=(90, 0.3), c=(1300, 0.1), text=(40, 0.05))
    parts = np.concatenate([mixed.draws(e).part for e in range(-(-100_000 // mixed.epoch_draws))])
    parts = parts[:100_000]
    counts = np.cumsum(parts[:, None] == np.arange(4), axis=0)
    wanted = np.arange(1, len(parts) + 1)[:, None] * np.array([0.55, 0.3, 0.1, 0.05])
    # Whole examples, rounded at the ends of epochs (1) and between them (1/2 either side).
    assert np.abs(counts - wanted).max() <= 2
    assert np.abs(counts[-1] - wanted[-1]).max() <= 2


def test_many_small_sources_beside_a_large_one_stay_near_their_shares():
    sizes = {f"s{i}": (7 + i, 0.005) for i in range(20)}
    mixed = mixture(large=(1000, 0.9), **sizes)
    parts = np.concatenate([mixed.draws(e).part for e in range(-(-20_000 // mixed.epoch_draws))])
    counts = np.cumsum(parts[:, None] == np.arange(21), axis=0)
    wanted = np.arange(1, len(parts) + 1)[:, None] * np.array([0.9, *[0.005] * 20])
    # All small ones are due at the same moments: half of their number, and 1 for the rounding.
    assert np.abs(counts - wanted).max() <= 21 / 2 + 1
    assert np.abs(counts[-1] - wanted[-1]).max() <= 2


def test_each_source_is_gone_through_whole_before_it_begins_again():
    mixed = mixture(a=(37, 2), b=(11, 1))
    seen = collections.defaultdict(list)
    for epoch in range(5):
        draws = mixed.draws(epoch)
        for part, index, visit in zip(*draws, strict=True):
            seen[part, visit].append(index)
    sizes = {0: 37, 1: 11}
    for part, size in sizes.items():
        passes = sorted(v for p, v in seen if p == part)
        assert passes == list(range(len(passes))) and len(passes) > 3
        for number in passes[:-1]:
            assert sorted(seen[part, number]) == list(range(size))
        assert len(set(seen[part, passes[-1]])) == len(seen[part, passes[-1]])
    assert seen[0, 0] != seen[0, 1] != list(range(37))  # an order of its own each time


def test_an_epoch_shows_every_example_and_counts_the_passes():
    mixed = mixture(a=(100, 0.5), b=(10, 0.5))
    assert mixed.epoch_draws == 200
    draws = mixed.draws(0)
    for part, size in ((0, 100), (1, 10)):
        assert set(draws.index[draws.part == part]) == set(range(size))
    assert mixed.passes(200) == {"a": 1.0, "b": 10.0}
    alone = mixture(a=(50, 3))
    assert sorted(alone.draws(4).index) == list(range(50))
    assert (alone.draws(4).epoch == 4).all()


def test_draws_are_a_function_of_seed_and_epoch():
    one, same, other = mixture(a=(50, 1)), mixture(a=(50, 1)), mixture(seed=1, a=(50, 1))
    np.testing.assert_array_equal(one.draws(3).index, same.draws(3).index)
    assert not np.array_equal(one.draws(3).index, other.draws(3).index)
    assert not np.array_equal(one.draws(3).index, one.draws(2).index)


@pytest.mark.parametrize(
    "parts, message",
    [
        ([], "at least one"),
        ([("a", 5, 1), ("a", 5, 1)], 'two sources are named "a"'),
        ([("a", 5, 0)], "must be above 0"),
        ([("a", 5, float("nan"))], "must be above 0"),
        ([("a", 5, 1e-7), ("b", 5, 1)], "weight 1e-07 .* must be above 0: 1e-6"),
        ([("a", 5, float("inf")), ("b", 5, 1)], "weight inf"),
        ([("a", 0, 1)], "no examples"),
    ],
)
def test_nonsense_is_one_line(parts, message):
    with pytest.raises(UserError, match=message):
        Mixture([Part(k, Numbers(n), w, POLICY) for k, n, w in parts], 0)
