"""Example → token ids, loss weights and patch grids: the one function that training, evaluation
and generation share. It needs an image's height and width only, never its pixels."""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from fuyu_jax.config import DataConfig, ModelConfig
from fuyu_jax.data.example import Example, Image, Text, Tokens
from fuyu_jax.data.resolution import Resolution, TokenDrop, example_rng
from fuyu_jax.patches import Grid
from fuyu_jax.tokenizer import Tokenizer


class Visit(NamedTuple):
    """One meeting with an example in training: what is left to chance is drawn from this.

    epoch: how often its source has been gone through. at: the same with its fraction, for
    schedules.
    """

    seed: int
    epoch: int
    index: int
    at: int | float


@dataclass(frozen=True)
class LayoutPolicy:
    """How images become patches."""

    patch_size: int
    max_height: int = 1080
    max_width: int = 1920
    pad_value: int = 1
    resolution: Resolution | None = None  # None: native under the cap above
    drop: TokenDrop = field(default_factory=TokenDrop)
    draft: bool = True  # decode JPEGs at a half, a quarter or an eighth where that is enough

    @classmethod
    def of(cls, model: ModelConfig, data: DataConfig) -> "LayoutPolicy":
        """The policy of a run's data, where a source has none of its own."""
        return cls(
            model.patch_size,
            data.max_image_height,
            data.max_image_width,
            data.pad_value,
            Resolution(
                data.resolution,
                data.max_image_height,
                data.max_image_width,
                data.max_image_patches,
                data.min_image_side,
                data.max_image_side,
                data.resolution_schedule,
            ),
            TokenDrop(data.token_drop),
            data.jpeg_draft,
        )

    @property
    def changes(self) -> bool:
        """Whether an example's lengths depend on when it is met."""
        return bool(self.drop.mean_schedule) or self._resolution.changes

    @property
    def _resolution(self) -> Resolution:
        return self.resolution or Resolution("native", self.max_height, self.max_width)

    def grid(
        self, image: Image, *, at: int | float = 0, rng: np.random.Generator | None = None
    ) -> Grid:
        return self.sized(image.height, image.width, at=at, rng=rng)

    def sized(
        self,
        height: int,
        width: int,
        *,
        at: int | float = 0,
        rng: np.random.Generator | None = None,
    ) -> Grid:
        """The grid of an image of these pixels."""
        return self._resolution.grid(height, width, self.patch_size, epoch=at, rng=rng)


@dataclass(frozen=True)
class Layout:
    """A laid-out example of N tokens.

    loss_weights: weight of predicting `tokens[t]`: 1 for an answer and the `|ENDOFTEXT|` that
    ends it. grids: one an image, in order. box_scale: of the last image, for boxes in an answer.
    positions: 0, 1, ... with gaps where patches are dropped. kept: which patches of each image
    stay; None for all.
    """

    tokens: Int32[np.ndarray, "N"]
    loss_weights: Float32[np.ndarray, "N"]
    grids: tuple[Grid, ...]
    box_scale: float
    positions: Int32[np.ndarray, "N"]
    kept: tuple[Int64[np.ndarray, "_"] | None, ...]

    @property
    def num_patches(self) -> int:
        pairs = zip(self.grids, self.kept, strict=True)
        return sum(g.patches if kept is None else len(kept) for g, kept in pairs)

    @property
    def dropped(self) -> int:
        """Patches left out by token dropping."""
        return sum(g.patches for g in self.grids) - self.num_patches

    @property
    def resized(self) -> int:
        """Images that had to be shrunk."""
        return sum(g.scale != 1.0 for g in self.grids)


def lay_out(
    example: Example,
    tokenizer: Tokenizer,
    policy: LayoutPolicy,
    *,
    ask: bool = False,
    visit: Visit | None = None,
) -> Layout:
    """Lays an example out as Fuyu does.

    An image is `rows × (columns × |SPEAKER| + |NEWLINE|)`. `<s>` comes before the first text, so
    after leading images. An answer is `<0x04> text |ENDOFTEXT|`; conversations repeat question
    and answer. Plain text has no marks around it, and `|ENDOFTEXT|` after the last of a document;
    the loss is on all of it where it is to be trained on. Boxes count in pixels of the image before
    them. Token ids bring their own marks: after them no `<s>` is put in, and directly after them
    neither an answer nor the end of a question gets a `<0x04>`.

    Args:
      example: texts and images in order.
      tokenizer: for texts and boxes.
      policy: for images.
      ask: end with `<0x04>`, so that the model answers next.
      visit: in training; without it nothing is drawn by chance and no patch is dropped.
    """
    tokens = array("i")  # an image has thousands: as a list of integers they would take longer
    trained: list[tuple[int, int]] = []
    grids: list[Grid] = []
    kept: list[np.ndarray | None] = []
    left_out: list[np.ndarray] = []
    rng, rate = None, 0.0
    if visit is not None and policy.changes:
        rng = example_rng(visit.seed, visit.epoch, visit.index)
        rate = policy.drop.rate(visit.at, rng)
    scale = 1.0
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    begun = False
    last_plain = -1
    if example.info.get("part", 0) + 1 >= example.info.get("parts", 1):
        plain = (isinstance(s, Text) and s.plain for s in example.segments)
        last_plain = max((i for i, p in enumerate(plain) if p), default=-1)
    for number, segment in enumerate(example.segments):
        if isinstance(segment, Image):
            grid = policy.grid(segment, at=visit.at if visit else 0, rng=rng)
            scale = grid.scale
            grids.append(grid)
            kept.append(None)
            if rate and rng is not None:
                kept[-1] = policy.drop.keep(grid.patches, rate, rng)
                gone = np.setdiff1d(np.arange(grid.patches), kept[-1], assume_unique=True)
                left_out.append(len(tokens) + gone + gone // grid.columns)  # past the newlines
            row = array("i", [tokenizer.image_id]) * grid.columns
            row.append(tokenizer.newline_id)
            tokens += row * grid.rows
            continue
        if isinstance(segment, Tokens):
            if segment.train:
                trained.append((len(tokens), len(tokens) + len(segment.ids)))
            tokens.extend(segment.ids)
            begun = True
            continue
        if not begun:
            tokens.extend(begin)
            begun = True
        after_ids = number > 0 and isinstance(example.segments[number - 1], Tokens)
        if segment.is_answer and not after_ids:
            tokens.append(tokenizer.answer_id)
        first = len(tokens)
        tokens.extend(tokenizer.encode(segment.text, scale))
        if segment.is_answer or number == last_plain:
            tokens.append(tokenizer.eos_id)
        if segment.train:
            trained.append((first, len(tokens)))
    if ask and not (example.segments and isinstance(example.segments[-1], Tokens)):
        if not begun:
            tokens.extend(begin)
        tokens.append(tokenizer.answer_id)
    weights = np.zeros(len(tokens), np.float32)
    for first, last in trained:
        weights[first:last] = 1
    ids, positions = np.array(tokens, np.int32), np.arange(len(tokens), dtype=np.int32)
    if left_out:
        stays = np.ones(len(tokens), bool)
        stays[np.concatenate(left_out)] = False
        ids, weights, positions = ids[stays], weights[stays], positions[stays]
    return Layout(ids, weights, tuple(grids), scale, positions, tuple(kept))
