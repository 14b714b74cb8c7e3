"""What each token may see, and where a token looks in an image."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fuyu_jax.patches import Grid, unpatchify
from fuyu_jax.viz.kinds import runs

NOT_SEEN, EARLIER, LATER = "#ffffff", "#0072b2", "#e69f00"
# From clear to full colour, so that the picture shows where there is no attention.
HEAT = LinearSegmentedColormap.from_list("heat", [(0.84, 0.37, 0, 0), (0.84, 0.37, 0, 0.92)])
COLUMNS = 5


def draw_masks(
    masks: Mapping[str, Bool[np.ndarray, "S S"]],
    segment_ids: Int32[np.ndarray, "S"],
    *,
    segment: int = 1,
) -> Figure:
    """Attention masks of one row side by side: whole above, one segment of it below.

    Args:
      masks: by title; [query, key], True where the query sees the key.
      segment_ids: of the row.
      segment: the one to look at closely.
    """
    figure = Figure(figsize=(4.6 * len(masks), 9), layout="constrained")
    panels = figure.subplots(2, len(masks), squeeze=False)
    size = len(segment_ids)
    inside = np.flatnonzero(segment_ids == segment)
    for (title, mask), (whole, near) in zip(masks.items(), panels.T, strict=True):
        shown = mask.astype(np.uint8) * (1 + np.triu(np.ones((size, size), np.uint8), 1))
        _draw_mask(whole, shown, 0)
        whole.set_title(title, fontsize=11)
        blocks = runs(segment_ids)
        middles = [(a + b - 1) / 2 for _, a, b in blocks]
        labels = [str(s) if s and b - a > 0.02 * size else "" for s, a, b in blocks]
        whole.set_xticks(middles, labels)
        whole.set_yticks(middles, labels)
        whole.tick_params(length=0)
        whole.set_xlabel("key, by segment", fontsize=9)
        whole.set_ylabel("query, by segment", fontsize=9)
        if len(inside):
            a, b = int(inside[0]), int(inside[-1]) + 1
            _draw_mask(near, shown[a:b, a:b], a)
            near.set_title(f"segment {segment} alone", fontsize=10)
            near.set_xlabel("key, index in the row", fontsize=9)
            near.set_ylabel("query, index in the row", fontsize=9)
    handles = [
        Patch(facecolor=EARLIER, label="seen: itself and earlier tokens"),
        Patch(facecolor=LATER, label="seen: later tokens of its image"),
        Patch(facecolor=NOT_SEEN, edgecolor="0.5", label="not seen"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _draw_mask(axes: Axes, shown: UInt8[np.ndarray, "Q T"], first: int) -> None:
    last = first + len(shown)
    axes.imshow(
        shown,
        cmap=ListedColormap([NOT_SEEN, EARLIER, LATER]),
        vmin=0,
        vmax=2,
        interpolation="nearest",
        extent=(first - 0.5, last - 0.5, last - 0.5, first - 0.5),
    )
    axes.tick_params(labelsize=8)


def patch_attention(
    maps: Float32[np.ndarray, "L H S S"],
    query: int,
    tokens: Int32[np.ndarray, "S"],
    image_id: int,
) -> Float32[np.ndarray, "L H P"]:
    """Weights that one query gives to the row's patches, in the patches' order."""
    return maps[:, :, query, tokens == image_id]


def draw_attention(
    maps: Float32[np.ndarray, "L H S S"],
    query: int,
    tokens: Int32[np.ndarray, "S"],
    patches: UInt8[np.ndarray, "P C"],
    grid: Grid,
    image_id: int,
    *,
    heads: int = 5,
    title: str = "",
) -> Figure:
    """One query's attention on an image: every layer's mean over heads, and single heads.

    Each panel has its own scale, from 0 to the largest weight, which its title tells, with the
    share of the attention that falls on patches at all.

    Args:
      maps: attention weights, one row of `Decoder.attention_maps`.
      query: index of the token that looks.
      tokens: of the row.
      patches: of the row; its first image is drawn.
      grid: of that image.
      image_id: the placeholder.
      heads: how many single heads: those with the largest weight on one patch.
      title: of the figure.
    """
    weights = patch_attention(maps, query, tokens, image_id)[:, :, : grid.patches]
    strongest = np.argsort(-weights.max(axis=-1), axis=None, kind="stable")[:heads]
    chosen = [np.unravel_index(i, weights.shape[:2]) for i in strongest]
    panels = [(f"layer {n + 1}, mean of heads", w.mean(axis=0)) for n, w in enumerate(weights)]
    panels += [(f"layer {n + 1}, head {h + 1}", weights[n, h]) for n, h in chosen]

    side = round((patches.shape[1] / 3) ** 0.5)
    pixels = unpatchify(patches[: grid.patches], grid, side)
    lines = -(-(len(panels) + 1) // COLUMNS)
    tall = float(np.clip(grid.rows / grid.columns, 0.45, 1.8))
    figure = Figure(
        figsize=(11, lines * (1.95 * tall + 0.5) + (0.4 if title else 0)), layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.08)
    places = figure.add_gridspec(lines, COLUMNS + 1, width_ratios=[1] * COLUMNS + [0.06])
    axes = [figure.add_subplot(places[n // COLUMNS, n % COLUMNS]) for n in range(lines * COLUMNS)]
    axes[0].imshow(pixels, extent=(0, grid.width, grid.height, 0), interpolation="nearest")
    axes[0].set_title("the image\n", fontsize=8.5)
    drawn = None
    for panel, (name, heat) in zip(axes[1:], panels, strict=False):
        drawn = _draw_heat(panel, pixels, heat.reshape(grid.rows, grid.columns), grid, side)
        panel.set_title(f"{name}\n{heat.sum():.0%} on patches, max {heat.max():.1%}", fontsize=8.5)
    for panel in axes:
        panel.set_xlim(0, grid.columns * side)
        panel.set_ylim(grid.rows * side, 0)
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in axes[len(panels) + 1 :]:
        panel.axis("off")
    if drawn is not None:
        bar = figure.colorbar(drawn, cax=figure.add_subplot(places[0, COLUMNS]))
        bar.set_ticks([0, 1], labels=["0", "max"], fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _draw_heat(
    axes: Axes,
    pixels: UInt8[np.ndarray, "height width 3"],
    heat: Float32[np.ndarray, "rows columns"],
    grid: Grid,
    side: int,
):
    # Pale, so that heat shows on dark pictures too.
    grey = 255 - (255 - pixels.mean(axis=-1)) * 0.35
    axes.imshow(
        grey,
        cmap="gray",
        vmin=0,
        vmax=255,
        extent=(0, grid.width, grid.height, 0),
        interpolation="nearest",
    )
    share = heat / max(float(heat.max()), 1e-12)
    drawn = axes.imshow(
        share,
        cmap=HEAT,
        vmin=0,
        vmax=1,
        extent=(0, grid.columns * side, grid.rows * side, 0),
        interpolation="nearest",
    )
    return drawn
