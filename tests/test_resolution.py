"""Sizes of images and dropped patches: caps, budgets, chance, schedules."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuyu_jax.batch import PackedBatch
from fuyu_jax.data.example import Example, Image, Text
from fuyu_jax.data.layout import LayoutPolicy, Visit, lay_out
from fuyu_jax.data.resolution import Resolution, TokenDrop, example_rng, scheduled
from fuyu_jax.data.rows import fill_row, with_pixels
from fuyu_jax.decoding import decode_image
from fuyu_jax.errors import UserError
from fuyu_jax.patches import grid_of

SIDE = st.integers(1, 3000)


@given(SIDE, SIDE)
def test_native_is_fuyus_rule(height, width):
    assert Resolution().grid(height, width, 30) == grid_of(height, width, 30)


@settings(max_examples=200)
@given(SIDE, SIDE, st.integers(1, 400), st.integers(4, 32))
def test_a_patch_budget_is_kept_and_used(height, width, budget, patch):
    grid = Resolution("patches", max_patches=budget).grid(height, width, patch)
    assert grid.patches <= budget
    assert grid.height <= height and grid.width <= width
    native = grid_of(height, width, patch)
    if native.patches <= budget:
        assert grid == native
        return
    assert abs(grid.height - height * grid.scale) <= 1  # rounded down, at least 1
    assert abs(grid.width - width * grid.scale) <= 1
    # A little larger no longer fits (the search ends within one part in a million).
    scale = grid.scale * (1 + 3e-6)
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    assert math.ceil(h / patch) * math.ceil(w / patch) > budget or scale > native.scale


def test_a_sampled_side_is_uniform_and_keeps_the_ratio():
    policy = Resolution("sampled", min_side=64, max_side=256)
    sides = []
    for i in range(2000):
        grid = policy.grid(600, 900, 16, rng=example_rng(0, 0, i))
        sides.append(math.sqrt(grid.height * grid.width))
        assert abs(grid.width / grid.height - 1.5) < 1.5 * 2 / 52  # whole pixels of 52 at least
    # Uniform on 64..256: mean 160, standard deviation 55.4; five standard errors of 2,000 draws,
    # and up to one pixel lost to rounding down.
    assert abs(np.mean(sides) - 160) < 5 * 55.4 / 2000**0.5 + 1
    assert abs(np.std(sides) - 55.4) < 4.5
    small = policy.grid(40, 50, 16, rng=example_rng(0, 0, 1))
    assert (small.height, small.width) == (40, 50)  # never enlarged
    assert policy.grid(600, 900, 16).height == int(600 * 256 / math.sqrt(540_000))


def test_schedules_are_linear_between_points():
    points = ((1.0, 0.5), (3.0, 1.0))
    assert [scheduled(points, e) for e in (0, 1, 2, 3, 9)] == [0.5, 0.5, 0.75, 1.0, 1.0]
    policy = Resolution(max_height=100, max_width=100, scale_schedule=points)
    sides = [policy.grid(400, 400, 10, epoch=e).height for e in (0, 2, 5)]
    assert sides == [50, 75, 100]
    budget = Resolution("patches", max_patches=100, scale_schedule=points)
    assert [budget.grid(400, 400, 10, epoch=e).patches for e in (0, 5)] == [25, 100]


def test_drop_rates_are_beta_with_the_mean_and_variance_of_the_paper():
    drop = TokenDrop(((0, 0.8), (10, 0.2)))
    for epoch, mean in ((0, 0.8), (5, 0.5), (10, 0.2)):
        rates = [drop.rate(epoch, example_rng(1, 0, i)) for i in range(4000)]
        variance = 0.3 * mean * (1 - mean)
        # Five standard errors of 4,000 draws; the variance's is below its own size / 20.
        assert abs(np.mean(rates) - mean) < 5 * math.sqrt(variance / 4000)
        assert abs(np.var(rates) - variance) < variance / 8
    assert TokenDrop().rate(0, example_rng(0, 0, 0)) == 0


def test_kept_patches_are_spread_evenly():
    counts = np.zeros(20)
    for i in range(3000):
        kept = TokenDrop().keep(20, 0.5, example_rng(0, 0, i))
        assert len(kept) == 10 and (np.diff(kept) > 0).all() and kept[0] == 0
        counts[kept] += 1
    # 9 of the 19 others stay: five standard errors of a share of 3,000.
    assert np.abs(counts[1:] / 3000 - 9 / 19).max() < 5 * math.sqrt(0.25 / 3000)


def _picture(seed=0, height=37, width=50):
    import io

    from PIL import Image as PilImage

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    file = io.BytesIO()
    PilImage.fromarray(pixels).save(file, format="PNG")
    return Image(file.getvalue(), height, width)


def test_dropping_keeps_positions_newlines_and_text(tokenizer):
    example = Example("a", (_picture(), Text("What colour is it?"), Text("red", train=True)))
    whole = lay_out(example, tokenizer, LayoutPolicy(8))
    policy = LayoutPolicy(8, drop=TokenDrop(((0, 0.6),)))
    seen = set()
    for i in range(30):
        visit = Visit(0, 0, i, 0.0)
        layout = lay_out(example, tokenizer, policy, visit=visit)
        again = lay_out(example, tokenizer, policy, visit=visit)
        np.testing.assert_array_equal(layout.tokens, again.tokens)
        # What is left stands where it stood, and only placeholders are gone.
        np.testing.assert_array_equal(layout.tokens, whole.tokens[layout.positions])
        np.testing.assert_array_equal(layout.loss_weights, whole.loss_weights[layout.positions])
        gone = np.setdiff1d(whole.positions, layout.positions)
        assert (whole.tokens[gone] == tokenizer.image_id).all()
        assert layout.num_patches == (layout.tokens == tokenizer.image_id).sum()
        assert layout.dropped == len(gone)
        seen.add(len(gone))
        row = PackedBatch.empty(1, 128, 64, 192)
        fill_row(row, 0, [with_pixels(example, layout, policy)])
        full = PackedBatch.empty(1, 128, 64, 192)
        fill_row(full, 0, [with_pixels(example, whole, LayoutPolicy(8))])
        # The k-th patch is the one whose placeholder stood at that place.
        numbers = np.cumsum(whole.tokens == tokenizer.image_id) - 1
        kept = numbers[layout.positions[layout.tokens == tokenizer.image_id]]
        count = layout.num_patches
        np.testing.assert_array_equal(row.patches[0, :count], full.patches[0, kept])
        np.testing.assert_array_equal(row.patch_coords[0, :count], full.patch_coords[0, kept])
    assert len(seen) > 5
    np.testing.assert_array_equal(lay_out(example, tokenizer, policy).tokens, whole.tokens)


def test_plain_text_is_trained_on_without_an_answers_marks(tokenizer):
    image = _picture()
    parts = (Text("red", True, plain=True), image, Text("green blue", True, plain=True))
    layout = lay_out(Example("a", parts), tokenizer, LayoutPolicy(8))
    grid = layout.grids[0]
    picture = ([tokenizer.image_id] * grid.columns + [tokenizer.newline_id]) * grid.rows
    red, rest = tokenizer.encode("red", 1.0), tokenizer.encode("green blue", 1.0)
    expected = [tokenizer.bos_id, *red, *picture, *rest, tokenizer.eos_id]
    assert layout.tokens.tolist() == expected
    weights = [0, *[1] * len(red), *[0] * len(picture), *[1] * (len(rest) + 1)]
    assert layout.loss_weights.tolist() == weights


@pytest.mark.parametrize("part, ends", [(0, False), (1, False), (2, True)])
def test_only_the_last_part_of_a_document_ends_it(tokenizer, part, ends):
    info = {"part": part, "parts": 3}
    layout = lay_out(
        Example("a", (Text("red", True, plain=True),), info), tokenizer, LayoutPolicy(8)
    )
    assert (layout.tokens[-1] == tokenizer.eos_id) == ends


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Resolution("patches"), "max_patches"),
        (lambda: Resolution("sampled", min_side=300), "sampled side"),
        (lambda: Resolution(max_height=0), "1 or more"),
        (lambda: Resolution(scale_schedule=((2, 0.5), (1, 1))), "ascending"),
        (lambda: TokenDrop(((0, 1.5),)), r"0\.\.0\.95"),
    ],
)
def test_nonsense_is_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_images_of_a_budget_decode_to_their_grid():
    picture = _picture(height=90, width=70)
    grid = Resolution("patches", max_patches=12).grid(90, 70, 8)
    layout_policy = LayoutPolicy(8, resolution=Resolution("patches", max_patches=12))
    assert layout_policy.grid(picture) == grid
    assert decode_image(picture.read()).shape == (90, 70, 3)
    assert jnp.asarray(grid.patches) <= 12
