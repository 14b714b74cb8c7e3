"""Example → token ids, loss weights and patch grids: the one function that training, evaluation
and generation share. It needs an image's height and width only, never its pixels."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from fuyu_jax.config import DataConfig, ModelConfig
from fuyu_jax.data.example import Example, Image
from fuyu_jax.patches import Grid, grid_of
from fuyu_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class LayoutPolicy:
    """How images become patches."""

    patch_size: int
    max_height: int = 1080
    max_width: int = 1920
    pad_value: int = 1

    @classmethod
    def of(cls, model: ModelConfig, data: DataConfig) -> "LayoutPolicy":
        return cls(model.patch_size, data.max_image_height, data.max_image_width, data.pad_value)

    def grid(self, image: Image) -> Grid:
        return grid_of(image.height, image.width, self.patch_size, self.max_height, self.max_width)


@dataclass(frozen=True)
class Layout:
    """A laid-out example of N tokens.

    loss_weights: weight of predicting `tokens[t]`: 1 for an answer and the `|ENDOFTEXT|` that
    ends it. grids: one an image, in order. box_scale: of the last image, for boxes in an answer.
    """

    tokens: Int32[np.ndarray, "N"]
    loss_weights: Float32[np.ndarray, "N"]
    grids: tuple[Grid, ...]
    box_scale: float

    @property
    def num_patches(self) -> int:
        return sum(g.patches for g in self.grids)

    @property
    def resized(self) -> int:
        """Images that had to be shrunk."""
        return sum(g.scale != 1.0 for g in self.grids)


def lay_out(
    example: Example, tokenizer: Tokenizer, policy: LayoutPolicy, *, ask: bool = False
) -> Layout:
    """Lays an example out as Fuyu does.

    An image is `rows × (columns × |SPEAKER| + |NEWLINE|)`. `<s>` comes before the first text, so
    after leading images. An answer is `<0x04> text |ENDOFTEXT|`; conversations repeat question
    and answer. Boxes count in pixels of the image before them.

    Args:
      example: texts and images in order.
      tokenizer: for texts and boxes.
      policy: for images.
      ask: end with `<0x04>`, so that the model answers next.
    """
    tokens: list[int] = []
    trained: list[tuple[int, int]] = []
    grids: list[Grid] = []
    scale = 1.0
    begun = False
    for segment in example.segments:
        if isinstance(segment, Image):
            grid = policy.grid(segment)
            scale = grid.scale
            grids.append(grid)
            row = [tokenizer.image_id] * grid.columns + [tokenizer.newline_id]
            tokens += row * grid.rows
            continue
        if not begun:
            tokens.append(tokenizer.bos_id)
            begun = True
        if segment.train:
            tokens.append(tokenizer.answer_id)
            first = len(tokens)
            tokens += tokenizer.encode(segment.text, scale)
            tokens.append(tokenizer.eos_id)
            trained.append((first, len(tokens)))
        else:
            tokens += tokenizer.encode(segment.text, scale)
    if ask:
        if not begun:
            tokens.append(tokenizer.bos_id)
        tokens.append(tokenizer.answer_id)
    weights = np.zeros(len(tokens), np.float32)
    for first, last in trained:
        weights[first:last] = 1
    return Layout(np.asarray(tokens, np.int32), weights, tuple(grids), scale)
