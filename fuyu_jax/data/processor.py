"""What a person gives (texts, pictures, token ids) to arrays, and a model's tokens back to text.

The way is the one that training goes: prompt → `Example` → `lay_out` → patches → row. Token ids and
pixels are those of Hugging Face's `FuyuProcessor` with its PIL images; `docs/interop.md` says where
it differs, and why.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image as PilImage

from fuyu_jax.batch import PackedBatch
from fuyu_jax.data.example import (
    BadImageError,
    Example,
    Image,
    Text,
    Tokens,
    image_of_pixels,
    open_image,
)
from fuyu_jax.data.layout import LayoutPolicy, lay_out
from fuyu_jax.data.rows import fill_row, with_pixels
from fuyu_jax.decoding import rgb_pixels
from fuyu_jax.errors import UserError
from fuyu_jax.patches import normalise
from fuyu_jax.tokenizer import Location, Tokenizer

# Fuyu-8B's own: 30 pixels, 1080 × 1920, filled with 1 of 255 as Hugging Face does, and every JPEG
# decoded at full size. Adept's own padding is white: `replace(FUYU_POLICY, pad_value=255)`.
FUYU_POLICY = LayoutPolicy(patch_size=30, draft=False)

Side = Literal["left", "right"]
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")


class Processed(NamedTuple):
    """Prompts as arrays, one a row, filled up to the longest.

    input_ids: the padding's id where there is none. attention_mask: 1 for what is there.
    position_ids: 0, 1, ... from a row's first token; 0 in padding. loss_weights: 1 for an answer
    and the `|ENDOFTEXT|` behind it. patches: raw; the k-th placeholder of a row is its k-th patch.
    patch_coords: row and column in the image. patch_counts: patches of each row. box_scales: of
    each row's last image, for boxes in an answer.
    """

    input_ids: Int32[np.ndarray, "B S"]
    attention_mask: Int32[np.ndarray, "B S"]
    position_ids: Int32[np.ndarray, "B S"]
    loss_weights: Float32[np.ndarray, "B S"]
    patches: UInt8[np.ndarray, "B P C"]
    patch_coords: Int32[np.ndarray, "B P 2"]
    patch_counts: Int32[np.ndarray, "B"]
    box_scales: tuple[float, ...]

    @property
    def labels(self) -> Int32[np.ndarray, "B S"]:
        """What is to be learnt; -100 elsewhere, as Hugging Face has it."""
        return np.where(self.loss_weights > 0, self.input_ids, np.int32(-100))

    @property
    def image_patches(self) -> Float32[np.ndarray, "N C"]:
        """All patches of all rows, normalised as the model does it: Hugging Face's array."""
        there = np.arange(self.patches.shape[1]) < self.patch_counts[:, None]
        return normalise(self.patches[there])

    @property
    def packed(self) -> PackedBatch:
        """What our model is fed."""
        return PackedBatch(
            self.input_ids,
            self.attention_mask,
            self.position_ids,
            self.loss_weights,
            self.patches,
            self.patch_coords,
        )


class Processor:
    """Prompts in, text and boxes out.

    A prompt is a text, or a list in order of texts, images (`PIL.Image`, `uint8[h, w, 3]`, a
    `Path`, a string that is the path of an image file that is there) and token ids (a list or array
    of integers, taken as they are). A file is turned upright
    by its EXIF; a `PIL.Image` is taken as it is. Both may be of any mode. In a text, boxes are
    `<box>top, left, bottom, right</box>` and points `<point>x, y</point>`, in pixels of the image
    before them.

    Args:
      tokenizer: for texts and boxes.
      policy: how images become patches.
    """

    def __init__(self, tokenizer: Tokenizer, policy: LayoutPolicy = FUYU_POLICY):
        self.tokenizer = tokenizer
        self.policy = policy

    def example(self, prompt: Any, answer: str | None = None, id: str = "prompt") -> Example:
        """A prompt as what everything else here takes (`Engine`, `lay_out`, ...).

        Raises:
          UserError: something in the prompt is none of the above.
          BadImageError: an image that is missing, or is none.
        """
        info = {}
        if isinstance(prompt, Example):
            id, segments, info = prompt.id, prompt.segments, prompt.info
        elif isinstance(prompt, list | tuple):
            segments = tuple(self._segment(part, id) for part in prompt)
        else:
            segments = (self._segment(prompt, id),)
        if answer is not None:
            segments = (*segments, Text(answer, train=True))
        return Example(id, segments, info)

    def _segment(self, part: Any, id: str) -> Text | Image | Tokens:
        if isinstance(part, Text | Image | Tokens):
            return part
        if isinstance(part, str):
            return open_image(Path(part)) if _names_image(part) else Text(part)
        if isinstance(part, Path):
            return open_image(part)
        if isinstance(part, PilImage.Image):
            try:
                part.load()
                return image_of_pixels(np.ascontiguousarray(rgb_pixels(part)))
            except Exception as error:  # decoders raise many kinds, and only now
                reason = " ".join(str(error).split())
                raise BadImageError(f"{id}: image cannot be read ({reason})") from None
        try:
            array = np.asarray(part)
        except ValueError:  # lists of unequal lengths
            array = np.empty(0, object)
        if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size:
            return image_of_pixels(np.ascontiguousarray(array))
        whole = np.issubdtype(array.dtype, np.integer) or array.size == 0
        if array.ndim == 1 and whole and array.dtype != object:
            return self._tokens(array, id)
        kind = (
            f"{array.dtype}{list(array.shape)}" if hasattr(part, "shape") else type(part).__name__
        )
        raise UserError(
            f"{id}: a prompt is of texts, images (PIL, uint8[h, w, 3], Path) and lists of token "
            f"ids, not {kind}"
        )

    def _tokens(self, ids: np.ndarray, id: str) -> Tokens:
        for token in ids.tolist():
            if token == self.tokenizer.image_id:
                raise UserError(
                    f"{id}: token ids hold the image placeholder {token}; give the image itself"
                )
            if not 0 <= token < 1 << 31:
                raise UserError(f"{id}: {token} is no token id")
        return Tokens(tuple(int(token) for token in ids.tolist()))

    def __call__(
        self,
        prompts: Sequence[Any],
        *,
        answers: Sequence[str] | None = None,
        ask: bool | None = None,
        padding_side: Side | None = None,
        length: int = 0,
    ) -> Processed:
        """Lays prompts out, one a row.

        Args:
          prompts: each as above.
          answers: for training; each follows its prompt.
          ask: end with `<0x04>`, so that the model answers next; by default where there are no
            answers. Behind token ids nothing is added.
          padding_side: by default left, for generation, and right with answers, for training.
          length: tokens of a row, if more than the longest prompt's.

        Raises:
          UserError: as in `example`; a prompt longer than `length`.
          BadImageError: an image that is missing or broken.
        """
        if isinstance(prompts, str):
            raise UserError("prompts: give a list of prompts, not one text")
        if answers is not None and len(answers) != len(prompts):
            raise UserError(f"{len(answers)} answers for {len(prompts)} prompts")
        has_mark = self.tokenizer.answer_id is not None  # a plain language model has none
        asked = (answers is None and has_mark) if ask is None else ask
        side = padding_side or ("left" if answers is None else "right")
        if side not in ("left", "right"):
            raise UserError(f'padding_side="{side}": left or right')
        ready = []
        for i, prompt in enumerate(prompts):
            answer = None if answers is None else answers[i]
            example = self.example(prompt, answer, id=f"prompt {i}")
            layout = lay_out(example, self.tokenizer, self.policy, ask=asked)
            ready.append(with_pixels(example, layout, self.policy))
        lengths = np.asarray([len(x.layout.tokens) for x in ready], np.int32)
        counts = np.asarray([x.layout.num_patches for x in ready], np.int32)
        size = max(lengths, default=0)
        if 0 < length < size:
            raise UserError(f"prompt {lengths.argmax()}: {size} tokens, more than length={length}")
        size = max(int(size), length)
        channels = self.policy.patch_size**2 * 3
        batch = PackedBatch.empty(len(ready), size, int(max(counts, default=0)), channels)
        for row, example in enumerate(ready):
            fill_row(batch, row, [example])
        batch.tokens[batch.segment_ids == 0] = self.tokenizer.pad_id
        if side == "left":
            # A row goes as far to the right as it has padding; patches stay where they are.
            at = (np.arange(size) - (size - lengths)[:, None]) % max(size, 1)
            names = ("tokens", "segment_ids", "positions", "loss_weights")
            turned = {n: np.take_along_axis(getattr(batch, n), at, axis=1) for n in names}
            batch = batch._replace(**turned)
        return Processed(
            batch.tokens,
            batch.segment_ids,
            batch.positions,
            batch.loss_weights,
            batch.patches,
            batch.patch_coords,
            counts,
            tuple(x.layout.box_scale for x in ready),
        )

    def decode(self, tokens: Any, scale: int | float = 1.0) -> str:
        """Text of token ids, boxes and points in pixels of the original image.

        Marks that enclose no well-formed box are left out and their integers stay text; no ids make
        it raise.
        """
        return self.tokenizer.decode(np.asarray(tokens, np.int64).tolist(), scale)

    def locations(self, tokens: Any, scale: int | float = 1.0) -> list[Location]:
        """The well-formed boxes and points among token ids, in pixels of the original image."""
        return self.tokenizer.locations(np.asarray(tokens, np.int64).tolist(), scale)

    def answers(self, tokens: Any, processed: Processed) -> list[str]:
        """Texts of what was generated behind each prompt, up to `|ENDOFTEXT|`.

        Args:
          tokens: new tokens, a row a prompt.
          processed: the prompts.
        """
        texts = []
        for row, scale in zip(tokens, processed.box_scales, strict=True):
            ids = np.asarray(row, np.int64).tolist()
            if self.tokenizer.eos_id in ids:
                ids = ids[: ids.index(self.tokenizer.eos_id)]
            texts.append(self.tokenizer.decode(ids, scale))
        return texts


def _names_image(text: str) -> bool:
    """Whether a text is the path of an image file that is there."""
    if len(text) > 1000 or "\0" in text or not text.lower().endswith(_SUFFIXES):
        return False
    try:
        return Path(text).is_file()
    except OSError:  # a name that no file can have
        return False
