"""Images to patches and back: sizes, padding and order of Fuyu-8B's image processor."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image as PilImage

from fuyu_jax.errors import UserError


class Grid(NamedTuple):
    """How an image lies in patches, known from its height and width alone.

    height, width: pixels after shrinking; rows, columns: patches; scale: shrunk over original.
    """

    height: int
    width: int
    rows: int
    columns: int
    scale: float

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Placeholders and the newline after every patch row, the last too."""
        return self.rows * (self.columns + 1)


def grid_of(
    height: int, width: int, patch_size: int, max_height: int = 1080, max_width: int = 1920
) -> Grid:
    """The grid of an image: shrunk only if it passes the largest size, then cut into patches.

    Args:
      height, width: pixels.
      patch_size: pixels a side.
      max_height, max_width: Fuyu's cap is 1080 × 1920.
    """
    if height < 1 or width < 1:
        raise UserError(f"image of {height}×{width} pixels: both sides must be at least 1")
    scale = 1.0
    if height > max_height or width > max_width:
        scale = min(max_height / height, max_width / width)
        height, width = max(1, int(height * scale)), max(1, int(width * scale))
    return Grid(height, width, -(-height // patch_size), -(-width // patch_size), scale)


def fit(
    pixels: UInt8[np.ndarray, "height width 3"], grid: Grid
) -> UInt8[np.ndarray, "fitted_height fitted_width 3"]:
    """Shrinks decoded pixels to the grid's size (bilinear on uint8, as Fuyu's processor)."""
    if pixels.shape[:2] == (grid.height, grid.width):
        return pixels
    image = PilImage.fromarray(pixels)
    return np.asarray(image.resize((grid.width, grid.height), PilImage.Resampling.BILINEAR))


def patchify(
    pixels: UInt8[np.ndarray, "height width 3"],
    grid: Grid,
    patch_size: int,
    pad_value: int = 1,
    out: UInt8[np.ndarray, "patches C"] | None = None,
) -> UInt8[np.ndarray, "patches C"]:
    """Cuts pixels into row-major patches; within a patch row, column, channel.

    Args:
      pixels: an image of the grid's height and width.
      grid: from `grid_of`.
      patch_size: pixels a side.
      pad_value: fills the bottom and right edge; 1 gives -0.992 after scaling, as the reference
        implementation has it, 255 gives white.
      out: where the patches go, if not into a new array.
    """
    p, rows, columns = patch_size, grid.rows, grid.columns
    if out is None:
        out = np.empty((grid.patches, p * p * 3), np.uint8)
    cells = out.reshape(rows, columns, p, p, 3)
    # Whole patches go over in one copy, without a padded image between; then the edges.
    r, c = grid.height // p, grid.width // p
    h, w = grid.height - r * p, grid.width - c * p
    if r and c:
        if not pixels.flags.c_contiguous:
            pixels = np.ascontiguousarray(pixels)
        # One item is a patch's line of pixels: copied whole, not number by number.
        line = np.dtype((np.void, p * 3))
        stride = grid.width * 3
        lines = np.ndarray((r, c, p), line, pixels.data, strides=(p * stride, p * 3, stride))
        out.view(line).reshape(rows, columns, p)[:r, :c] = lines
    if w:
        cells[:r, c, :, :w] = pixels[: r * p, c * p :].reshape(r, p, w, 3)
        cells[:, c, :, w:] = pad_value
    if h:
        cells[r, :c, :h] = pixels[r * p :, : c * p].reshape(h, c, p, 3).swapaxes(0, 1)
        cells[r, :, h:] = pad_value
    if h and w:
        cells[r, c, :h, :w] = pixels[r * p :, c * p :]
    return out


def unpatchify(
    patches: UInt8[np.ndarray, "patches C"], grid: Grid, patch_size: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Patches back to the picture that they were cut from, without its padding."""
    p = patch_size
    cells = patches.reshape(grid.rows, grid.columns, p, p, 3).swapaxes(1, 2)
    return cells.reshape(grid.rows * p, grid.columns * p, 3)[: grid.height, : grid.width]


def patch_coordinates(grid: Grid) -> Int32[np.ndarray, "patches 2"]:
    """Row and column of every patch in its image."""
    both = np.empty((grid.rows, grid.columns, 2), np.int32)
    both[..., 0] = np.arange(grid.rows)[:, None]
    both[..., 1] = np.arange(grid.columns)
    return both.reshape(-1, 2)


def normalise(patches: UInt8[np.ndarray, "*any C"]) -> Float32[np.ndarray, "*any C"]:
    """(x/255 - 0.5)/0.5 in float32; the model does the same on the device."""
    return (patches.astype(np.float32) / 255 - 0.5) / 0.5
