"""What every source ends in: an ordered list of texts and images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuyu_jax import patches
from fuyu_jax.errors import UserError


class BadImageError(ValueError):
    """An image that is missing or cannot be read; the message names it."""


@dataclass(frozen=True)
class Text:
    """A run of text; with `train`, an answer that the model learns to give."""

    text: str
    train: bool = False


@dataclass(frozen=True)
class Image:
    """An encoded image (bytes, or a path that is read when needed) and its size in pixels."""

    encoded: bytes | Path
    height: int
    width: int
    name: str = ""

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
          BadImageError: the file cannot be read.
        """
        if isinstance(self.encoded, bytes):
            return self.encoded
        try:
            return self.encoded.read_bytes()
        except OSError as error:
            raise BadImageError(f"image {self.encoded}: {error.strerror or error}") from None

    def decode(self):
        """RGB pixels uint8 [height, width, 3].

        Raises:
          BadImageError: missing, broken, or of another size than its header said.
        """
        encoded = self.read()
        name = self.name or self.encoded
        try:
            pixels = patches.decode_image(encoded)
        except Exception as error:  # Pillow's decoders raise many kinds for broken bytes
            raise BadImageError(f"image {name}: cannot be decoded ({error})") from None
        if pixels.shape[:2] != (self.height, self.width):
            raise BadImageError(
                f"image {name}: decodes to {pixels.shape[0]}×{pixels.shape[1]} pixels, "
                f"its header says {self.height}×{self.width}"
            )
        return pixels


def open_image(encoded: bytes | Path, name: str = "") -> Image:
    """An `Image` with its size read from the header.

    Raises:
      BadImageError: missing, or not an image.
    """
    name = name or str(encoded)
    try:
        height, width = patches.image_size(encoded)
    except FileNotFoundError:
        raise BadImageError(f"image {name}: no such file") from None
    except Exception as error:  # a header can be broken in as many ways as a body
        raise BadImageError(f"image {name}: cannot be read ({error})") from None
    return Image(encoded, height, width, name)


@dataclass(frozen=True)
class Example:
    """Texts and images in order; `info` goes along untouched (family, objects, ...)."""

    id: str
    segments: tuple[Text | Image, ...]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(s for s in self.segments if isinstance(s, Image))


def split_answer(example: Example) -> tuple[Example, str]:
    """The prompt before the last answer, and that answer: a question for generation.

    Earlier answers of a conversation stay in the prompt.

    Raises:
      UserError: the example has no answer.
    """
    for at in range(len(example.segments) - 1, -1, -1):
        segment = example.segments[at]
        if isinstance(segment, Text) and segment.train:
            return Example(example.id, example.segments[:at], example.info), segment.text
    raise UserError(f"example {example.id}: no answer to ask for")
