"""A packed row as coloured segments, with both of its budgets."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fuyu_jax.batch import PackedBatch
from fuyu_jax.tokenizer import Tokenizer
from fuyu_jax.viz.kinds import KINDS, PADDING, PATCH, SEGMENT_COLOURS, runs, token_kinds


def draw_row(
    batch: PackedBatch, tokenizer: Tokenizer, *, row: int = 0, ids: Sequence[str] = ()
) -> Figure:
    """One row three times: its segments and its kinds of tokens over the token budget, and its
    segments again over the patch budget.

    Args:
      batch: packed rows.
      tokenizer: to tell placeholders and newlines.
      row: which row.
      ids: of the examples in the row, for the legend.
    """
    tokens = np.asarray(batch.tokens[row])
    segment_ids = np.asarray(batch.segment_ids[row])
    kinds = token_kinds(tokens, segment_ids, np.asarray(batch.loss_weights[row]), tokenizer)
    budget = batch.patches.shape[1]
    count = int(segment_ids.max(initial=0))
    owners = np.zeros(budget, np.int32)
    of_patches = segment_ids[kinds == PATCH]
    owners[: len(of_patches)] = of_patches

    extra = 0.22 * -(-len(ids) // 5)
    figure = Figure(figsize=(11, 4.2 + extra), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1)
    left = {"loc": "left", "fontsize": 10}
    _bars(upper, segment_ids)
    upper.set_title(_budget("tokens", int((segment_ids > 0).sum()), len(tokens)), **left)
    upper.set_ylabel("segments", fontsize=9)
    for kind, first, stop in runs(kinds):
        _bar(middle, first, stop, None if kind == PADDING else KINDS[kind][1], "kind")
    middle.set_xlim(0, len(tokens))
    middle.set_title("the same tokens by kind", **left)
    middle.set_ylabel("kinds", fontsize=9)
    _bars(lower, owners)
    lower.set_title(_budget("patches", len(of_patches), budget), **left)
    lower.set_ylabel("segments", fontsize=9)
    for axes in (upper, middle, lower):
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
    handles = [Patch(facecolor=colour, edgecolor="0.3", label=name) for name, colour in KINDS[1:]]
    handles.append(Patch(facecolor="white", edgecolor="0.5", hatch="////", label="padding"))
    middle.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=5,
        fontsize=8,
        frameon=False,
        borderaxespad=0.2,
    )
    if ids:
        named = [
            Patch(facecolor=_colour(n), edgecolor="0.3", label=f"{n}: {id}")
            for n, id in enumerate(ids[:count], start=1)
        ]
        figure.legend(handles=named, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _budget(name: str, used: int, budget: int) -> str:
    free = budget - used
    share = free / budget if budget else 0.0
    return f"{name}: {used:,} of {budget:,} used, {free:,} padding ({share:.1%})"


def _colour(segment: int) -> str:
    return SEGMENT_COLOURS[(segment - 1) % len(SEGMENT_COLOURS)]


def _bar(axes: Axes, first: int, stop: int, colour: str | None, gid: str) -> None:
    look = {"facecolor": colour, "lw": 0} if colour else {"facecolor": "white", "hatch": "////"}
    edge = {} if colour else {"edgecolor": "0.5", "lw": 0}
    axes.add_patch(
        Rectangle((first, 0), stop - first, 1, gid=gid if colour else "padding", **look, **edge)
    )


def _bars(axes: Axes, owners: np.ndarray) -> None:
    """Segments as blocks with their numbers; what belongs to none is hatched."""
    size = max(len(owners), 1)
    for segment, first, stop in runs(owners):
        _bar(axes, first, stop, _colour(segment) if segment else None, "segment")
        if segment:
            axes.axvline(stop, color="white", lw=1)
        if segment and stop - first > 0.014 * size:
            axes.text((first + stop) / 2, 0.5, str(segment), ha="center", va="center", fontsize=9)
    axes.set_xlim(0, size)
