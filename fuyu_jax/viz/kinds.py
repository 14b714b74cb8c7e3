"""Kinds of tokens and their colours, the same in every picture (told apart by colour-blind too)."""

import numpy as np
from jaxtyping import Float32, Int32

from fuyu_jax.tokenizer import Tokenizer

# Index in KINDS -> name and colour; taken from the palette of Okabe and Ito.
KINDS: tuple[tuple[str, str], ...] = (
    ("padding", "#ffffff"),
    ("patch", "#56b4e9"),
    ("row newline", "#0b3c5d"),
    ("text", "#c8c8c8"),
    ("answer (has loss)", "#d55e00"),
)
PADDING, PATCH, NEWLINE, TEXT, ANSWER = range(len(KINDS))
SEGMENT_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442")


def token_kinds(
    tokens: Int32[np.ndarray, "S"],
    segment_ids: Int32[np.ndarray, "S"],
    loss_weights: Float32[np.ndarray, "S"],
    tokenizer: Tokenizer,
) -> Int32[np.ndarray, "S"]:
    """The kind of each token, as an index into `KINDS`."""
    kinds = np.full(tokens.shape, TEXT, np.int32)
    kinds[tokens == tokenizer.image_id] = PATCH
    kinds[tokens == tokenizer.newline_id] = NEWLINE
    kinds[loss_weights > 0] = ANSWER
    kinds[segment_ids == 0] = PADDING
    return kinds


def runs(values: Int32[np.ndarray, "S"]) -> list[tuple[int, int, int]]:
    """(value, first index, one past the last) of every run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    starts = [0, *edges.tolist()]
    stops = [*edges.tolist(), len(values)]
    return [(int(values[a]), a, b) for a, b in zip(starts, stops, strict=True) if b > a]
