"""PackedBatch rows, filled lazily from a plan: element i is a function of i alone."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import DataConfig, digest
from fuyu_jax.data.example import BadImageError, Example
from fuyu_jax.data.layout import Layout, LayoutPolicy, lay_out
from fuyu_jax.data.plan import Plan, make_plan, plan_digest
from fuyu_jax.data.sources.base import Source
from fuyu_jax.errors import TrainingStoppedError, UserError
from fuyu_jax.patches import fit, patch_coordinates, patchify
from fuyu_jax.tokenizer import Tokenizer


class PatchedExample(NamedTuple):
    """A laid-out example with its pixels."""

    layout: Layout
    patches: list[np.ndarray]


def with_pixels(example: Example, layout: Layout, policy: LayoutPolicy) -> PatchedExample:
    """Decodes, shrinks and cuts all images of an example.

    Raises:
      BadImageError: an image is missing or broken.
    """
    cut = []
    for image, grid in zip(example.images, layout.grids, strict=True):
        cut.append(patchify(fit(image.decode(), grid), grid, policy.patch_size, policy.pad_value))
    return PatchedExample(layout, cut)


def fill_row(batch: PackedBatch, row: int, examples: Sequence[PatchedExample]) -> None:
    """Lays examples one after another into a row of an empty batch."""
    at = patch_at = 0
    for segment, (layout, cut) in enumerate(examples, start=1):
        stop = at + len(layout.tokens)
        batch.tokens[row, at:stop] = layout.tokens
        batch.segment_ids[row, at:stop] = segment
        batch.positions[row, at:stop] = np.arange(stop - at)
        batch.loss_weights[row, at:stop] = layout.loss_weights
        at = stop
        for grid, pixels in zip(layout.grids, cut, strict=True):
            patch_stop = patch_at + grid.patches
            batch.patches[row, patch_at:patch_stop] = pixels
            batch.patch_coords[row, patch_at:patch_stop] = patch_coordinates(grid)
            patch_at = patch_stop


class BadExamples:
    """Counts examples whose images failed, each once, and stops when there are too many."""

    def __init__(self, limit: int):
        self.limit = limit
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, id: str, reason: str) -> None:
        """Notes a bad example.

        Raises:
          TrainingStoppedError: this one is over the limit.
        """
        with self._lock:
            if id not in self.reasons:
                self.reasons[id] = reason
                print(f"skipped example {id}: {reason}", flush=True)
            if len(self.reasons) > self.limit:
                raise TrainingStoppedError(
                    f"{len(self.reasons)} examples have missing or broken images "
                    f"(data.max_bad_examples={self.limit}); the last: {reason}"
                )


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Token and patch lengths of every example of a source; 0 tokens: left out as bad.

    difficulty: what the source says of an example, its tokens where it says nothing.
    """

    tokens: Int32[np.ndarray, "N"]
    patches: Int32[np.ndarray, "N"]
    difficulty: Float32[np.ndarray, "N"]
    images: int
    resized: int


def measure(
    source: Source, tokenizer: Tokenizer, policy: LayoutPolicy, bad: BadExamples
) -> Lengths:
    """Lays out every example of a source, from headers alone."""
    tokens = np.zeros(len(source), np.int32)
    patches = np.zeros(len(source), np.int32)
    difficulty = np.ones(len(source), np.float32)
    images = resized = 0
    for i in range(len(source)):
        try:
            example = source[i]
            layout = lay_out(example, tokenizer, policy)
        except BadImageError as error:
            bad.add(source.id(i), str(error))
            continue
        difficulty[i] = example.info.get("difficulty", len(layout.tokens))
        tokens[i], patches[i] = len(layout.tokens), layout.num_patches
        images += len(layout.grids)
        resized += layout.resized
    return Lengths(tokens, patches, difficulty, images, resized)


class Row(NamedTuple):
    """One row, with what a person wants to know of it."""

    batch: PackedBatch  # of one row
    ids: tuple[str, ...]
    skipped: tuple[str, ...]


class RowSource:
    """Random access to the rows of one epoch."""

    def __init__(self, data: "PackedData", epoch: int):
        self.data = data
        self.epoch = epoch
        self.plan = data.plan(epoch)

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> Row:
        data = self.data
        shape = (1, data.config.tokens_per_row, data.config.patches_per_row)
        batch = PackedBatch.empty(*shape, data.policy.patch_size**2 * 3)
        ready, ids, skipped = [], [], []
        for i in self.plan.row(index):
            example = data.source[int(i)]
            layout = lay_out(example, data.tokenizer, data.policy)
            try:
                ready.append(with_pixels(example, layout, data.policy))
                ids.append(example.id)
            except BadImageError as error:
                data.bad.add(example.id, str(error))
                skipped.append(example.id)
        fill_row(batch, 0, ready)
        return Row(batch, tuple(ids), tuple(skipped))


class Position(NamedTuple):
    """Where the next batch begins."""

    epoch: int
    row: int


class Batch(NamedTuple):
    """Rows of one batch, their examples, and the position after them."""

    rows: PackedBatch
    ids: tuple[tuple[str, ...], ...]
    after: Position


class PackedData:
    """A source, packed: plans, rows and batches.

    Args:
      source: examples by index.
      tokenizer: for their texts.
      policy: for their images.
      config: budgets and loading.
      seed: of the order.

    Raises:
      UserError: no example fits a row.
      TrainingStoppedError: too many images are missing or broken.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        policy: LayoutPolicy,
        config: DataConfig,
        seed: int,
    ):
        self.source = source
        self.tokenizer = tokenizer
        self.policy = policy
        self.config = config
        self.seed = seed
        self.bad = BadExamples(config.max_bad_examples)
        self.lengths = measure(source, tokenizer, policy, self.bad)
        self.usable = np.flatnonzero(self.lengths.tokens)
        self._plans: dict[int, Plan] = {}
        first = self.plan(0)
        self.oversize = first.oversize
        if not first.rows:
            raise UserError(
                f"none of {len(source)} examples fits a row of {config.tokens_per_row} tokens and "
                f"{config.patches_per_row} patches; raise data.tokens_per_row and "
                "data.patches_per_row, or lower data.max_image_height and data.max_image_width"
            )

    @property
    def hash(self) -> str:
        """Of everything that decides which rows come in which order."""
        settings = {
            "seed": self.seed,
            "tokens": self.config.tokens_per_row,
            "patches": self.config.patches_per_row,
            "block": self.config.plan_block,
            "easy_first_epochs": self.config.easy_first_epochs,
        }
        if self.config.easy_first_epochs:
            settings["difficulty"] = digest(self.lengths.difficulty.tolist())
        return plan_digest(self.lengths.tokens, self.lengths.patches, settings)

    def plan(self, epoch: int) -> Plan:
        """The rows of an epoch, over the usable examples."""
        if epoch not in self._plans:
            plan = make_plan(
                self.lengths.tokens[self.usable],
                self.lengths.patches[self.usable],
                tokens_per_row=self.config.tokens_per_row,
                patches_per_row=self.config.patches_per_row,
                seed=self.seed,
                epoch=epoch,
                block=self.config.plan_block,
                difficulty=(
                    self.lengths.difficulty[self.usable]
                    if epoch < self.config.easy_first_epochs
                    else None
                ),
            )
            self._plans = {
                epoch: dataclasses.replace(
                    plan,
                    examples=self.usable[plan.examples],
                    oversize=self.usable[plan.oversize],
                )
            }
        return self._plans[epoch]

    def sample_patches(self, count: int) -> UInt8[np.ndarray, "N C"]:
        """Some `count` patches of the epoch's first rows (fewer where there are no more)."""
        rows, found, taken = RowSource(self, 0), [], 0
        for index in range(len(rows)):
            batch = rows[index].batch
            used = int((batch.tokens[0] == self.tokenizer.image_id).sum())
            found.append(batch.patches[0, :used])
            taken += used
            if taken >= count:
                break
        return np.concatenate(found)[:count]

    def report(self) -> str:
        """What the plan does with the source, in one line."""
        plan = self.plan(0)
        text = (
            f"{len(self.source)} examples, {plan.rows} rows an epoch of "
            f"{plan.tokens_per_row} tokens and {plan.patches_per_row} patches; padding "
            f"{plan.token_padding:.2%} of tokens, {plan.patch_padding:.2%} of patches"
        )
        if self.lengths.resized:
            text += f"; {self.lengths.resized} of {self.lengths.images} images are shrunk"
        if len(self.oversize):
            first = ", ".join(self.source.id(int(i)) for i in self.oversize[:3])
            text += f"; {len(self.oversize)} examples fit no row and are left out ({first}, ...)"
        if self.bad.reasons:
            text += f"; {len(self.bad.reasons)} examples have bad images and are left out"
        return text

    def rows(self, start: Position) -> Iterator[tuple[Position, Row]]:
        """Rows from a position on, for ever; prefetched in order by grain's threads."""
        epoch, first = start
        while True:
            rows = RowSource(self, epoch)
            options = grain.ReadOptions(
                num_threads=self.config.threads, prefetch_buffer_size=self.config.prefetch_rows
            )
            ahead = grain.MapDataset.source(rows)[first:].to_iter_dataset(options)
            for index, row in enumerate(ahead, start=first):
                after = Position(epoch, index + 1)
                yield (after if index + 1 < len(rows) else Position(epoch + 1, 0)), row
            epoch, first = epoch + 1, 0

    def batches(self, rows_per_batch: int, start: Position) -> Iterator[Batch]:
        """Batches of B rows; one may span two epochs, so that no row is lost."""
        rows = self.rows(start)
        while True:
            taken = [next(rows) for _ in range(rows_per_batch)]
            yield Batch(
                PackedBatch(
                    *(np.concatenate(a) for a in zip(*(r.batch for _, r in taken), strict=True))
                ),
                tuple(r.ids for _, r in taken),
                taken[-1][0],
            )
