"""An image cut into patches, and the text beside it."""

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fuyu_jax.data.rows import PatchedExample
from fuyu_jax.patches import Grid
from fuyu_jax.tokenizer import IMAGE_PIECE, NEWLINE_PIECE, Tokenizer
from fuyu_jax.viz.kinds import ANSWER, KINDS, NEWLINE, PATCH, TEXT, token_kinds

GAP = 0.12  # between patches, as a share of a patch
CHIP_LINE = 92  # characters of text tokens on a line
CHIP_ALPHA = 0.45
MOST_NUMBERS = 64  # with more patches than this, numbers would hide them


def draw_patches(example: PatchedExample, tokenizer: Tokenizer) -> Figure:
    """The first image of an example in its patches, and its text tokens.

    Above: patches in reading order, each with its index in the sequence, and the newline token that
    ends every row. Below: each text token's piece over its id.

    Args:
      example: laid out, with its pixels; at least one image.
      tokenizer: to show pieces.
    """
    layout, cut = example
    grid, patches = layout.grids[0], cut[0]
    kinds = token_kinds(layout.tokens, np.ones_like(layout.tokens), layout.loss_weights, tokenizer)
    text = np.flatnonzero((kinds == TEXT) | (kinds == ANSWER)).tolist()
    lines = _wrap([tokenizer.piece(int(layout.tokens[i])) for i in text])
    height = min(5.0, 0.62 * grid.rows)
    figure = Figure(figsize=(9.5, height + 0.62 * len(lines) + 1.1), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[height, 0.62 * len(lines)])
    first = int(np.argmax(kinds == PATCH))
    _draw_grid(above, patches, grid, first, height)
    above.set_title(
        f"{grid.height} × {grid.width} pixels: {grid.rows} rows of {grid.columns} patches and a "
        f"newline = {grid.tokens} tokens\n"
        f"a patch stands at {IMAGE_PIECE} (id {tokenizer.image_id}), ↵ is {NEWLINE_PIECE} "
        f"(id {tokenizer.newline_id}); numbers count tokens from 0",
        fontsize=10,
    )
    _draw_chips(below, lines, layout.tokens[text], kinds[text], tokenizer)
    below.set_title(f"{len(text)} tokens of text (piece over id)", fontsize=10)
    handles = [
        Patch(facecolor=KINDS[kind][1], alpha=alpha, label=KINDS[kind][0])
        for kind, alpha in ((NEWLINE, 1), (TEXT, CHIP_ALPHA), (ANSWER, CHIP_ALPHA))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _draw_grid(
    axes: Axes, patches: UInt8[np.ndarray, "P C"], grid: Grid, first: int, height: float
) -> None:
    """Patches apart from each other, `height` inches in all; `first` is the index of the first."""
    side = round((patches.shape[1] / 3) ** 0.5)
    step = 1 + GAP
    cells = patches.reshape(grid.rows, grid.columns, side, side, 3)
    numbered = grid.patches <= MOST_NUMBERS
    font = min(8.0, 72 * height / (grid.rows * step) / 2.8)  # two lines in a newline's cell
    for r in range(grid.rows):
        for c in range(grid.columns):
            x, y = c * step, r * step
            axes.imshow(cells[r, c], extent=(x, x + 1, y + 1, y), interpolation="nearest", zorder=1)
            if numbered:
                axes.text(
                    x + 0.06,
                    y + 0.05,
                    str(first + r * (grid.columns + 1) + c),
                    fontsize=6.5,
                    va="top",
                    bbox={
                        "boxstyle": "square,pad=0.12",
                        "facecolor": "white",
                        "alpha": 0.75,
                        "lw": 0,
                    },
                )
        x, y = grid.columns * step, r * step
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=KINDS[NEWLINE][1], gid="newline"))
        axes.text(
            x + 0.5,
            y + 0.5,
            f"↵\n{first + r * (grid.columns + 1) + grid.columns}",
            color="white",
            fontsize=font,
            ha="center",
            va="center",
        )
    axes.set_xlim(-GAP, (grid.columns + 1) * step)
    axes.set_ylim(grid.rows * step, -GAP)
    axes.set_aspect("equal")
    axes.axis("off")


def _wrap(pieces: list[str]) -> list[list[str]]:
    """Pieces in lines of at most `CHIP_LINE` characters."""
    lines: list[list[str]] = [[]]
    used = 0
    for piece in pieces:
        width = _width(piece)
        if used + width > CHIP_LINE and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append(piece)
        used += width
    return lines


def _width(piece: str) -> float:
    return max(len(piece), 3) + 1.2


def _draw_chips(axes: Axes, lines, ids, kinds, tokenizer: Tokenizer) -> None:
    at = 0
    for row, line in enumerate(lines):
        x = 0.0
        for piece in line:
            width = _width(piece)
            kind = int(kinds[at])
            axes.add_patch(
                Rectangle(
                    (x, row),
                    width - 0.3,
                    0.84,
                    facecolor=KINDS[kind][1],
                    alpha=CHIP_ALPHA,
                    gid="chip",
                )
            )
            middle = x + (width - 0.3) / 2
            font = {"ha": "center", "va": "center", "family": "monospace", "parse_math": False}
            axes.text(middle, row + 0.28, piece, fontsize=8, **font)
            axes.text(middle, row + 0.63, str(int(ids[at])), fontsize=6.5, color="0.25", **font)
            x += width
            at += 1
    axes.set_xlim(0, CHIP_LINE)
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
