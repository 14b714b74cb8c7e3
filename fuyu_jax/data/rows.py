"""PackedBatch rows, filled lazily from a plan: element i is a function of i alone."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from fuyu_jax.batch import PackedBatch
from fuyu_jax.data.example import BadImageError, Example, Image
from fuyu_jax.data.layout import Layout, LayoutPolicy, Visit, lay_out
from fuyu_jax.data.mixture import Draws, Mixture
from fuyu_jax.data.plan import Plan
from fuyu_jax.patches import Grid, fit, patch_coordinates, patchify
from fuyu_jax.tokenizer import Tokenizer


class PatchedExample(NamedTuple):
    """A laid-out example with its pixels: decoded, sized, and kept patches cut."""

    layout: Layout
    patches: list[np.ndarray]


def _cut(
    image: Image, grid: Grid, policy: LayoutPolicy, out: np.ndarray | None = None
) -> UInt8[np.ndarray, "patches C"]:
    """An image's patches: decoded, shrunk, cut at once, while its pixels are in the cache.

    Raises:
      BadImageError: missing or broken.
    """
    least = (grid.height, grid.width) if policy.draft else None
    pixels = fit(image.decode(at_least=least, scratch=True), grid)
    return patchify(pixels, grid, policy.patch_size, policy.pad_value, out=out)


def with_pixels(example: Example, layout: Layout, policy: LayoutPolicy) -> PatchedExample:
    """Decodes, shrinks and cuts all images of an example.

    Raises:
      BadImageError: an image is missing or broken.
    """
    cut = []
    for image, grid, kept in zip(example.images, layout.grids, layout.kept, strict=True):
        patches = _cut(image, grid, policy)
        cut.append(patches if kept is None else patches[kept])
    return PatchedExample(layout, cut)


class _Filler:
    """Lays examples one after another into a row."""

    def __init__(self, batch: PackedBatch, row: int):
        self.batch, self.row = batch, row
        self.segment = self.at = self.patch_at = 0

    def has_room(self, layout: Layout) -> bool:
        tokens, patches = self.batch.tokens.shape[1], self.batch.patches.shape[1]
        return (
            self.at + len(layout.tokens) <= tokens and self.patch_at + layout.num_patches <= patches
        )

    def tokens(self, layout: Layout) -> None:
        batch, row, at = self.batch, self.row, self.at
        stop = at + len(layout.tokens)
        self.segment += 1
        batch.tokens[row, at:stop] = layout.tokens
        batch.segment_ids[row, at:stop] = self.segment
        batch.positions[row, at:stop] = layout.positions
        batch.loss_weights[row, at:stop] = layout.loss_weights
        self.at = stop

    def places(self, count: int, coordinates: np.ndarray) -> np.ndarray:
        """The buffer's next `count` patches, to be written into."""
        start, self.patch_at = self.patch_at, self.patch_at + count
        self.batch.patch_coords[self.row, start : self.patch_at] = coordinates
        return self.batch.patches[self.row, start : self.patch_at]

    def images(self, example: Example, layout: Layout, policy: LayoutPolicy) -> None:
        """Cuts an example's images straight into the buffer.

        Raises:
          BadImageError: one is missing or broken; the row is as it was before the example.
        """
        start = self.patch_at
        try:
            for image, grid, kept in zip(example.images, layout.grids, layout.kept, strict=True):
                coordinates = patch_coordinates(grid)
                if kept is None:
                    _cut(image, grid, policy, self.places(grid.patches, coordinates))
                else:
                    patches = _cut(image, grid, policy)
                    self.places(len(kept), coordinates[kept])[...] = patches[kept]
        except BadImageError:
            self.batch.patch_coords[self.row, start : self.patch_at] = 0
            self.patch_at = start  # what is written behind it is written over, or zeroed
            raise


def fill_row(batch: PackedBatch, row: int, examples: Sequence[PatchedExample]) -> None:
    """Lays examples one after another into a row of an empty batch."""
    filler = _Filler(batch, row)
    for layout, cut in examples:
        filler.tokens(layout)
        for grid, kept, patches in zip(layout.grids, layout.kept, cut, strict=True):
            coordinates = patch_coordinates(grid)
            if kept is not None:
                coordinates = coordinates[kept]
            filler.places(len(patches), coordinates)[...] = patches


class Buffers:
    """Patch buffers that rows are done with, to be written again.

    A row's is tens of megabytes: taken fresh from the system, its first writing costs as much as
    decoding a third of its images.
    """

    def __init__(self) -> None:
        self._free: collections.deque[np.ndarray] = collections.deque()  # its ends are thread-safe

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of this shape, with anything in it."""
        try:
            found = self._free.pop()
        except IndexError:
            return np.empty(shape, np.uint8)
        return found if found.shape == shape else np.empty(shape, np.uint8)

    def give_back(self, array: np.ndarray) -> None:
        """Nobody may look at the array any more."""
        self._free.append(array)

    def __reduce__(self):
        return Buffers, ()  # another process has its own


class Row(NamedTuple):
    """One row, with what a person wants to know of it.

    skipped: (id, reason) of examples whose images cannot be read. dropped: patches left out by
    token dropping.
    """

    batch: PackedBatch  # of one row
    ids: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    dropped: int


class RowSource:
    """Random access to the rows of one epoch; it can be sent to worker processes.

    Args:
      mixture: where examples come from.
      tokenizer: for their texts.
      plan: which draws share a row.
      draws: of this epoch.
      epoch: of the mixture.
      seed: for what is drawn by chance.
      buffers: where patch buffers come from; whoever keeps a row does not give its own back.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        plan: Plan,
        draws: Draws,
        epoch: int,
        seed: int,
        buffers: Buffers | None = None,
    ):
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.plan = plan
        self.draws = draws
        self.epoch = epoch
        self.seed = seed
        self.buffers = buffers or Buffers()

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> Row:
        patch_size = self.mixture.parts[0].policy.patch_size
        tokens, patches = self.plan.tokens_per_row, self.plan.patches_per_row
        batch = PackedBatch.empty(1, tokens, patches, 0)
        batch = batch._replace(patches=self.buffers.take((1, patches, patch_size**2 * 3)))
        filler = _Filler(batch, 0)
        ids: list[str] = []
        skipped: list[tuple[str, str]] = []
        dropped = 0
        for d in self.plan.row(index):
            part = self.mixture.parts[self.draws.part[d]]
            at = int(self.draws.index[d])
            try:
                example = part.source[at]
                layout = lay_out(example, self.tokenizer, part.policy, visit=self.visit(int(d)))
                if not filler.has_room(layout):  # or the row's last examples do not fit
                    raise BadImageError("an image or text has grown since the plan was made")
                filler.images(example, layout, part.policy)
            except BadImageError as error:
                skipped.append((self.name(int(d)), str(error)))
                continue
            filler.tokens(layout)
            ids.append(self.name(int(d)))
            dropped += layout.dropped
        batch.patches[0, filler.patch_at :] = 0
        return Row(batch, tuple(ids), tuple(skipped), dropped)

    def visit(self, draw: int) -> Visit:
        """What is left to chance about a draw of this epoch."""
        return visit_of(self.mixture, self.draws, draw, self.epoch, self.seed)

    def name(self, draw: int) -> str:
        """The example's id, with its source's name where there are several."""
        part = self.mixture.parts[self.draws.part[draw]]
        id = part.source.id(int(self.draws.index[draw]))
        return id if len(self.mixture.parts) == 1 else f"{part.name}/{id}"


def visit_of(mixture: Mixture, draws: Draws, draw: int, epoch: int, seed: int) -> Visit:
    """The visit that a draw is: seeded by its source's epoch, scheduled by the mixture's."""
    part = int(draws.part[draw])
    return Visit(
        # Two sources' examples of one number are drawn for apart.
        seed * len(mixture.parts) + part,
        int(draws.epoch[draw]),
        int(draws.index[draw]),
        epoch + draw / mixture.epoch_draws,
    )
