"""Which examples share which row: a pure function of lengths, seed, epoch and two budgets.

First-fit on the scarcer of the two budgets, in blocks of a few thousand examples: the larger ones
in random order, the smallest in decreasing order to fill what is left. (Decreasing order throughout
packs no better and puts examples of one size into one row: the standard deviation of lengths in a
row was 4 of 28 tokens on the demo set, and is 23 so.) Rows that a block leaves poorly filled go
back to the examples of the next block; an example that has waited `MAX_WAIT` blocks keeps its row
whatever its filling.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64

from fuyu_jax.config import digest

# The smallest examples come last, in decreasing order: this share of a block.
FILLERS = 0.3
# Rows filled to less than this share of their tighter budget are given back to the next block...
GOOD_FILL = 0.98
# ... but no example waits longer than this many blocks.
MAX_WAIT = 4


@dataclass(frozen=True)
class Plan:
    """The rows of one epoch.

    examples: example indices, row after row; row r holds `examples[offsets[r]:offsets[r+1]]`.
    oversize: examples that fit no row; they are left out and reported.
    """

    examples: Int64[np.ndarray, "packed"]
    offsets: Int64[np.ndarray, "rows_plus_1"]
    oversize: Int64[np.ndarray, "left_out"]
    tokens_per_row: int
    patches_per_row: int
    token_padding: float
    patch_padding: float
    max_wait_blocks: int

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Int64[np.ndarray, "examples"]:
        return self.examples[self.offsets[index] : self.offsets[index + 1]]


def _first_fit(
    order: np.ndarray,
    tokens: np.ndarray,
    patches: np.ndarray,
    token_budget: int,
    patch_budget: int,
) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Places examples in the first row with room for both; returns rows and what room is left."""
    rows: list[list[int]] = []
    free_tokens = np.zeros(len(order), np.int64)
    free_patches = np.zeros(len(order), np.int64)
    # Rows before `first` have no room for even the smallest example.
    first, smallest = 0, int(tokens[order].min()) if len(order) else 0
    for i in order:
        t, p = tokens[i], patches[i]
        n = len(rows)
        while first < n and free_tokens[first] < smallest:
            first += 1
        fits = (free_tokens[first:n] >= t) & (free_patches[first:n] >= p)
        at = int(fits.argmax()) + first if n > first else n
        if at == n or not fits[at - first]:
            at = n
            rows.append([])
            free_tokens[at], free_patches[at] = token_budget, patch_budget
        rows[at].append(int(i))
        free_tokens[at] -= t
        free_patches[at] -= p
    return rows, free_tokens[: len(rows)], free_patches[: len(rows)]


def make_plan(
    token_lengths: Int32[np.ndarray, "N"],
    patch_lengths: Int32[np.ndarray, "N"],
    *,
    tokens_per_row: int,
    patches_per_row: int,
    seed: int,
    epoch: int,
    block: int = 4096,
    difficulty: Float32[np.ndarray, "N"] | None = None,
) -> Plan:
    """Plans one epoch: every example that fits a row is in exactly one.

    Args:
      token_lengths, patch_lengths: of every example.
      tokens_per_row, patches_per_row: the two budgets.
      seed, epoch: choose the order of examples and of rows.
      block: examples planned together.
      difficulty: if given, blocks go from easy examples to hard ones instead of all mixed: a
        curriculum. Only ratios count: the order stays random within a third of an octave.
    """
    tokens = token_lengths.astype(np.int64)
    patches = patch_lengths.astype(np.int64)
    too_long = (tokens > tokens_per_row) | (patches > patches_per_row)
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(np.flatnonzero(~too_long))
    if difficulty is not None:
        rank = np.log2(difficulty[shuffled]) + rng.uniform(-1 / 6, 1 / 6, len(shuffled))
        shuffled = shuffled[np.argsort(rank, kind="stable")]
    # Normalised to their budgets, the larger of the two is what fills a row.
    weight = np.maximum(tokens / tokens_per_row, patches / max(patches_per_row, 1))

    done: list[list[int]] = []
    begun = 0  # rows of earlier blocks
    waiting = np.zeros(0, np.int64)
    waited = np.zeros(len(tokens), np.int64)
    for at in range(0, max(len(shuffled), 1), block):
        pool = np.concatenate([waiting, shuffled[at : at + block]])
        order = pool[np.argsort(-weight[pool], kind="stable")]
        large = len(order) - int(len(order) * FILLERS)
        order = np.concatenate([rng.permutation(order[:large]), order[large:]])
        rows, free_tokens, free_patches = _first_fit(
            order, tokens, patches, tokens_per_row, patches_per_row
        )
        filled = 1 - np.minimum(
            free_tokens / tokens_per_row, free_patches / max(patches_per_row, 1)
        )
        last = at + block >= len(shuffled)
        back: list[int] = []
        for row, fill in zip(rows, filled, strict=True):
            if last or fill >= GOOD_FILL or waited[row].max() >= MAX_WAIT:
                done.append(row)
            else:
                back += row
        waiting = np.asarray(back, np.int64)
        waited[waiting] += 1
        if difficulty is not None or last:
            order = rng.permutation(len(done) - begun) + begun
            done[begun:] = [done[i] for i in order]
            begun = len(done)
    sizes = np.asarray([0, *(len(r) for r in done)], np.int64)
    examples = np.asarray([i for r in done for i in r], np.int64)
    room_t = max(len(done) * tokens_per_row, 1)
    room_p = max(len(done) * patches_per_row, 1)
    return Plan(
        examples=examples,
        offsets=np.cumsum(sizes),
        oversize=np.flatnonzero(too_long),
        tokens_per_row=tokens_per_row,
        patches_per_row=patches_per_row,
        token_padding=float(1 - tokens[examples].sum() / room_t),
        patch_padding=float(1 - patches[examples].sum() / room_p),
        max_wait_blocks=int(waited.max(initial=0)),
    )


def plan_digest(
    token_lengths: np.ndarray, patch_lengths: np.ndarray, settings: dict[str, int | str]
) -> str:
    """A hash of all that a plan depends on, epoch aside: equal hash, equal rows."""
    lengths = np.stack([token_lengths, patch_lengths]).astype(np.int64)
    return digest({"lengths": digest(lengths.tolist()), **settings})
