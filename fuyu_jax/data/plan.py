"""Which examples share which row: a pure function of lengths, seed, epoch and two budgets.

First-fit on the scarcer of the two budgets, in blocks of a few thousand examples: the larger half
in random order, the smaller half in decreasing order to fill what is left. (Decreasing order
throughout packs no better and puts examples of one size into one row.) Rows that a block leaves
poorly filled go back to the examples of the next block; an example that has waited `MAX_WAIT`
blocks keeps its row whatever its filling.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import time
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, Int64

from fuyu_jax import cli
from fuyu_jax.errors import UserError, run_main
from fuyu_jax.patches import grid_of

# The smallest examples come last, in decreasing order: this share of a block.
FILLERS = 0.5
# Rows filled to less than this share of their tighter budget are given back to the next block...
GOOD_FILL = 0.998
# ... but no example waits longer than this many blocks.
MAX_WAIT = 4
# Balancing sorts rows within this many batches.
BALANCE_WINDOW = 16


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

    @property
    def hash(self) -> str:
        """Of which examples are in which row."""
        found = hashlib.sha256(np.ascontiguousarray(self.examples, "<i8").tobytes())
        found.update(np.ascontiguousarray(self.offsets, "<i8").tobytes())
        return found.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes the plan as an .npz file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            np.savez(file, **dataclasses.asdict(self))
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """A plan that `save` wrote.

        Raises:
          UserError: no such file, or not a plan.
        """
        try:
            with np.load(path) as found:
                fields = {f.name: found[f.name] for f in dataclasses.fields(cls)}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"plan {path}: cannot be read ({error})") from None
        return cls(**{k: v if v.ndim else v.item() for k, v in fields.items()})


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
    balance_rows: int = 0,
    ordered: bool = False,
) -> Plan:
    """Plans one epoch: every example that fits a row is in exactly one.

    Args:
      token_lengths, patch_lengths: of every example.
      tokens_per_row, patches_per_row: the two budgets.
      seed, epoch: choose the order of examples and of rows.
      block: examples planned together.
      difficulty: if given, blocks go from easy examples to hard ones instead of all mixed: a
        curriculum. Only ratios count: the order stays random within a third of an octave.
      ordered: the examples come in a random order already, which holds from block to block (a
        schedule over training needs that).
      balance_rows: rows of a global batch, if these shall have about equally many patches each.

    Memory beyond the lengths is about 40 bytes an example.
    """
    tokens = token_lengths.astype(np.int64)
    patches = patch_lengths.astype(np.int64)
    too_long = (tokens > tokens_per_row) | (patches > patches_per_row)
    rng = np.random.default_rng([seed, epoch])
    usable = np.flatnonzero(~too_long)
    shuffled = usable if ordered else rng.permutation(usable)
    if difficulty is not None:
        rank = np.log2(difficulty[shuffled]) + rng.uniform(-1 / 6, 1 / 6, len(shuffled))
        shuffled = shuffled[np.argsort(rank, kind="stable")]
    # Normalised to their budgets, the larger of the two is what fills a row.
    weight = np.maximum(tokens / tokens_per_row, patches / max(patches_per_row, 1))

    parts: list[np.ndarray] = []  # a block's rows, one example after the other, ...
    sizes: list[np.ndarray] = []  # ... and how many each row has: no row is a Python list for long
    waiting = np.zeros(0, np.int64)
    waited = np.zeros(len(tokens), np.uint8)
    for at in range(0, max(len(shuffled), 1), block):
        pool = np.concatenate([waiting, shuffled[at : at + block]])
        order = pool[np.argsort(-weight[pool], kind="stable")]
        large = len(order) - int(len(order) * FILLERS)
        order = np.concatenate([rng.permutation(order[:large]), order[large:]])
        rows, free_tokens, free_patches = _first_fit(
            order, tokens, patches, tokens_per_row, patches_per_row
        )
        free_share = free_patches / patches_per_row if patches_per_row else 1  # not the tighter
        filled = 1 - np.minimum(free_tokens / tokens_per_row, free_share)
        last = at + block >= len(shuffled)
        kept: list[list[int]] = []
        back: list[int] = []
        for row, fill in zip(rows, filled, strict=True):
            if last or fill >= GOOD_FILL or waited[row].max() >= MAX_WAIT:
                kept.append(row)
            else:
                back += row
        waiting = np.asarray(back, np.int64)
        waited[waiting] += 1
        kept = [kept[i] for i in rng.permutation(len(kept))]
        parts.append(np.asarray([i for row in kept for i in row], np.int64))
        sizes.append(np.asarray([len(row) for row in kept], np.int64))
    examples, counts = np.concatenate(parts), np.concatenate(sizes)
    if difficulty is None and not ordered:
        examples, counts = _reorder(examples, counts, rng.permutation(len(counts)))
    if balance_rows > 1:
        heavy = _row_sums(patches[examples], counts)
        order = _balanced(heavy, balance_rows, rng)
        examples, counts = _reorder(examples, counts, order)
    room_t = max(len(counts) * tokens_per_row, 1)
    room_p = max(len(counts) * patches_per_row, 1)
    return Plan(
        examples=examples,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        oversize=np.flatnonzero(too_long),
        tokens_per_row=tokens_per_row,
        patches_per_row=patches_per_row,
        token_padding=float(1 - tokens[examples].sum() / room_t),
        patch_padding=float(1 - patches[examples].sum() / room_p),
        max_wait_blocks=int(waited.max(initial=0)),
    )


def _row_sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    ends = np.cumsum(counts)
    total = np.concatenate([[0], np.cumsum(values)])
    return total[ends] - total[ends - counts]


def _reorder(
    examples: np.ndarray, counts: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rows in another order."""
    starts = np.cumsum(counts) - counts
    new = counts[order]
    within = np.arange(len(examples)) - np.repeat(np.cumsum(new) - new, new)
    return examples[np.repeat(starts[order], new) + within], new


def _balanced(heavy: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """An order in which the rows of a batch have about equally many patches.

    Within windows of `BALANCE_WINDOW` batches rows are sorted by patches, cut into batches, and the
    batches shuffled: a row moves no further than its window.
    """
    order = np.arange(len(heavy))
    window = BALANCE_WINDOW * batch
    parts = []
    for at in range(0, len(order), window):
        part = order[at : at + window]
        part = part[np.argsort(heavy[part], kind="stable")]
        whole = len(part) // batch * batch
        batches = part[:whole].reshape(-1, batch)
        parts += [batches[rng.permutation(len(batches))].ravel(), part[whole:]]
    return np.concatenate(parts) if parts else order


def recommend_patches(
    token_lengths: Int32[np.ndarray, "N"],
    patch_lengths: Int32[np.ndarray, "N"],
    *,
    tokens_per_row: int,
    seed: int = 0,
    sample: int = 50_000,
    multiple: int = 64,
) -> int:
    """The smallest patch budget that costs next to no tokens.

    Rows are planned with tokens alone; of the patches that their rows then hold, quantiles are
    tried from the smallest, until token padding is within 0.0005 of what it was. Every example that
    fits the token budget fits the result.

    Args:
      token_lengths, patch_lengths: of every example; a sample of `sample` is planned.
      tokens_per_row: the other budget.
      multiple: the result is a multiple of this.
    """
    tokens, patches = np.asarray(token_lengths), np.asarray(patch_lengths)
    fits = np.flatnonzero(tokens <= tokens_per_row)
    largest = int(patches[fits].max(initial=0))
    if not largest:
        return 0
    if len(fits) > sample:
        fits = np.random.default_rng(seed).choice(fits, sample, replace=False)
    tokens, patches = tokens[fits], patches[fits]

    def plan(budget: int) -> Plan:
        return make_plan(
            tokens,
            patches,
            tokens_per_row=tokens_per_row,
            patches_per_row=budget,
            seed=seed,
            epoch=0,
        )

    free = plan(max(int(patches.max(initial=0)), tokens_per_row))
    held = _row_sums(patches[free.examples], np.diff(free.offsets))
    for quantile in (0.5, 0.75, 0.9, 0.95, 0.99, 1.0):
        budget = max(int(np.quantile(held, quantile)), largest)
        budget = -(-budget // multiple) * multiple
        if plan(budget).token_padding <= free.token_padding + 0.0005:
            break
    return budget


# --- python -m fuyu_jax.data.plan ---------------------------------------------------------------


def read_lengths(
    path: str | Path, patch_size: int, max_height: int = 1080, max_width: int = 1920
) -> tuple[Int32[np.ndarray, "N"], Int32[np.ndarray, "N"]]:
    """Tokens and patches of every line `height,width,text_tokens` of a CSV file with that header.

    A height and width of 0 mean no image; those of several are written `480;600`. An image adds
    rows × (columns + 1) tokens, an example its `<s>` and `|ENDOFTEXT|`.

    Raises:
      UserError: no such file, another header, or a line that is not three counts (named).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"--lengths={path}: no such file; it has lines height,width,text_tokens")
    tokens, patches = array("q"), array("q")
    known: dict[tuple[str, str], tuple[int, int]] = {}

    def measured(heights: str, widths: str) -> tuple[int, int]:
        sides = [[int(x) for x in side.split(";")] for side in (heights, widths)]
        if sides == [[0], [0]]:
            return 0, 0
        if min(map(min, sides)) < 1:
            raise ValueError
        grids = [grid_of(*s, patch_size, max_height, max_width) for s in zip(*sides, strict=True)]
        return sum(g.tokens for g in grids), sum(g.patches for g in grids)

    # Spreadsheets put a mark before the first line; what is not UTF-8 is no count either.
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        lines = csv.reader(file)
        if (line := next(lines, None)) != ["height", "width", "text_tokens"]:
            raise UserError(f"{path}: the first line is {line}, not height,width,text_tokens")
        try:
            for line in lines:
                heights, widths, count = line
                if (heights, widths) not in known:
                    known[heights, widths] = measured(heights, widths)
                length = known[heights, widths][0] + int(count) + 2
                if int(count) < 0 or length > np.iinfo(np.int32).max:
                    raise ValueError
                tokens.append(length)
                patches.append(known[heights, widths][1])
        except (ValueError, csv.Error):
            raise UserError(
                f"{path}, line {lines.line_num}: {','.join(line)[:80]!r} is not height,width,"
                "text_tokens (0,0 for no image)"
            ) from None
    return np.asarray(tokens, np.int32), np.asarray(patches, np.int32)


def main() -> None:
    flags = cli.parser("Plans one epoch on lengths alone and prints what it comes to, as JSON.")
    flags.add_argument("--lengths", required=True, help="CSV: height,width,text_tokens")
    flags.add_argument("--tokens", type=int, required=True, help="tokens a row")
    flags.add_argument("--patches", type=int, required=True, help="patches a row")
    sizes = {"patch_size": 30, "max_height": 1080, "max_width": 1920}
    for name, default in (sizes | {"seed": 0, "epoch": 0}).items():
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--block", type=int, default=4096, help="examples planned together")
    flags.add_argument("--balance_rows", type=int, default=0, help="rows of a global batch")
    flags.add_argument("--out", help="where to save the plan (.npz)")
    args, overrides = cli.parse(flags)
    if overrides:
        raise UserError("the planner takes no --config flags")
    _check_least(args, 1, ("tokens", "block", *sizes))
    _check_least(args, 0, ("patches", "seed", "epoch", "balance_rows"))
    tokens, patches = read_lengths(args.lengths, args.patch_size, args.max_height, args.max_width)
    began = time.perf_counter()
    plan = make_plan(
        tokens,
        patches,
        tokens_per_row=args.tokens,
        patches_per_row=args.patches,
        seed=args.seed,
        epoch=args.epoch,
        block=args.block,
        balance_rows=args.balance_rows,
    )
    seconds = time.perf_counter() - began
    if args.out:
        try:
            plan.save(args.out)
        except OSError as error:
            raise UserError(f"--out={args.out}: {error.strerror or error}") from None
    best = recommend_patches(tokens, patches, tokens_per_row=args.tokens, seed=args.seed)
    report = {
        "rows": plan.rows,
        "examples": len(plan.examples),
        "token_padding": plan.token_padding,
        "patch_padding": plan.patch_padding,
        "microseconds_per_example": seconds * 1e6 / max(len(tokens), 1),
        "max_wait_blocks": plan.max_wait_blocks,
        "oversize": len(plan.oversize),
        "recommended_patches": best,
        "hash": plan.hash,
    }
    print(json.dumps(report, indent=2))


def _check_least(args: argparse.Namespace, least: int, names: tuple[str, ...]) -> None:
    if low := [n for n in names if getattr(args, n) < least]:
        raise UserError(f"--{low[0]}={getattr(args, low[0])}: must be {least} or more")


if __name__ == "__main__":
    run_main(main)
