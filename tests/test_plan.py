"""The planner: every example once, within both budgets, a pure function of its inputs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuyu_jax.data.plan import MAX_WAIT, make_plan


def plan_of(tokens, patches, **settings):
    options = {"tokens_per_row": 256, "patches_per_row": 128, "seed": 0, "epoch": 0} | settings
    return make_plan(np.asarray(tokens, np.int32), np.asarray(patches, np.int32), **options)


def lengths(count, seed=0):
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 60, count)
    return patches + rng.integers(5, 60, count), patches


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 150)), min_size=0, max_size=200),
    st.integers(1, 64),
    st.integers(0, 3),
)
def test_every_example_once_and_both_budgets_kept(pairs, block, epoch):
    tokens = [t for t, _ in pairs]
    patches = [p for _, p in pairs]
    plan = plan_of(tokens, patches, block=block, epoch=epoch)
    fits = [i for i, (t, p) in enumerate(pairs) if t <= 256 and p <= 128]
    assert sorted(plan.examples.tolist()) == fits
    assert sorted(plan.oversize.tolist()) == sorted(set(range(len(pairs))) - set(fits))
    for r in range(plan.rows):
        row = plan.row(r)
        assert len(row) > 0
        assert sum(tokens[i] for i in row) <= 256
        assert sum(patches[i] for i in row) <= 128
    assert plan.max_wait_blocks <= MAX_WAIT + 1


def test_it_is_a_function_of_seed_and_epoch():
    tokens, patches = lengths(500)
    same = plan_of(tokens, patches), plan_of(tokens, patches)
    np.testing.assert_array_equal(same[0].examples, same[1].examples)
    np.testing.assert_array_equal(same[0].offsets, same[1].offsets)
    for other in (plan_of(tokens, patches, epoch=1), plan_of(tokens, patches, seed=1)):
        assert not np.array_equal(same[0].examples, other.examples)


@pytest.mark.parametrize("patch_budget", [160, 64])
def test_little_padding_in_the_budget_that_binds(patch_budget):
    tokens, patches = lengths(5000)
    plan = plan_of(tokens, patches, patches_per_row=patch_budget, block=1024)
    used_tokens = np.sum(tokens) / (plan.rows * 256)
    used_patches = np.sum(patches) / (plan.rows * patch_budget)
    assert max(used_tokens, used_patches) > 0.975  # FFD on random lengths: 2.5 % is the bound
    np.testing.assert_allclose(plan.token_padding, 1 - used_tokens, atol=1e-12)
    np.testing.assert_allclose(plan.patch_padding, 1 - used_patches, atol=1e-12)


def test_easy_first_goes_from_easy_to_hard_and_loses_none():
    tokens, patches = lengths(4000)
    difficulty = np.random.default_rng(1).uniform(1, 16, 4000).astype(np.float32)
    plan = plan_of(tokens, patches, block=256, difficulty=difficulty)
    assert sorted(plan.examples.tolist()) == list(range(4000))
    quarters = np.array_split(difficulty[plan.examples], 4)
    means = [q.mean() for q in quarters]
    assert means == sorted(means)
    assert means[0] < 5.5 < 12 < means[-1]
    assert plan.token_padding < 0.05  # small blocks


def test_text_alone_needs_no_patches():
    plan = plan_of([100, 100, 50], [0, 0, 0], patches_per_row=0)
    assert plan.rows == 1
