"""Sizes, padding and order of images in patches."""

import numpy as np
import pytest
from PIL import Image

from fuyu_jax.errors import UserError
from fuyu_jax.patches import (
    fit,
    grid_of,
    normalise,
    patch_coordinates,
    patchify,
    unpatchify,
)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (480, 640, 16, 22, 1.0)),
        (30, 30, (30, 30, 1, 1, 1.0)),
        (31, 1, (31, 1, 2, 1, 1.0)),
        (1080, 1920, (1080, 1920, 36, 64, 1.0)),
        (2160, 1920, (1080, 960, 36, 32, 0.5)),  # the height binds
        (1080, 3840, (540, 1920, 18, 64, 0.5)),  # the width binds
        (1081, 100, (1080, 99, 36, 4, 1080 / 1081)),  # int() rounds down
    ],
)
def test_grid_follows_the_reference_rule(height, width, expected):
    assert grid_of(height, width, 30) == expected


def test_tokens_count_a_newline_after_every_row():
    assert grid_of(480, 640, 30).tokens == 16 * 23


def test_an_image_without_pixels_is_refused():
    with pytest.raises(UserError, match="0×5"):
        grid_of(0, 5, 30)


def test_patches_are_row_major_with_channel_fastest_and_padded_after():
    pixels = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    grid = grid_of(3, 5, 2)
    patches = patchify(pixels, grid, 2, pad_value=7)
    assert patches.shape == (6, 12)
    for row in range(2):
        for column in range(3):
            for y in range(2):
                for x in range(2):
                    for c in range(3):
                        at = (2 * row + y, 2 * column + x)
                        inside = at[0] < 3 and at[1] < 5
                        expected = pixels[at][c] if inside else 7
                        assert patches[row * 3 + column, (y * 2 + x) * 3 + c] == expected
    np.testing.assert_array_equal(unpatchify(patches, grid, 2), pixels)
    np.testing.assert_array_equal(
        patch_coordinates(grid), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    )


def test_patchify_into_a_slice_of_a_row():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 10, 3)).astype(np.uint8)
    grid = grid_of(9, 10, 4)
    room = np.zeros((20, 48), np.uint8)
    patchify(pixels, grid, 4, out=room[3 : 3 + grid.patches])
    np.testing.assert_array_equal(room[3 : 3 + grid.patches], patchify(pixels, grid, 4))
    assert (room[:3] == 0).all()
    assert (room[3 + grid.patches :] == 0).all()


def test_normalise_is_minus_one_to_one():
    values = normalise(np.array([[0, 1, 255]], np.uint8))
    np.testing.assert_allclose(values, [[-1, -0.99215686, 1]], atol=1e-7)


def test_fit_shrinks_as_pillow_does():
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    grid = grid_of(40, 60, 8, max_height=20, max_width=60)
    expected = Image.fromarray(pixels).resize((30, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(fit(pixels, grid), np.asarray(expected))
