"""What every source ends in: an ordered list of texts and images."""

import contextlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image as PilImage

from fuyu_jax import decoding
from fuyu_jax.errors import UserError


class BadImageError(ValueError):
    """An image that is missing or cannot be read; the message names it."""


@dataclass(frozen=True)
class Text:
    """A run of text; with `train`, an answer that the model learns to give.

    With `train` and `plain` it is learnt as running text: no mark before it, none after it.
    """

    text: str
    train: bool = False
    plain: bool = False

    @property
    def is_answer(self) -> bool:
        """Trained, and with the marks of an answer."""
        return self.train and not self.plain


@dataclass(frozen=True)
class Tokens:
    """Token ids taken as they are, with what marks they bring: no `<s>` comes before them or after
    them, and no `<0x04>` behind them. With `train` they are learnt."""

    ids: tuple[int, ...]
    train: bool = False


@dataclass(frozen=True)
class Span:
    """A file that lies whole and uncompressed within another, as a member of a tar does.

    The outer file is opened for each read, so that a span can be pickled and outlives a fork.
    """

    path: Path
    offset: int
    length: int

    def read(self, limit: int | None = None) -> bytes:
        """Its bytes, or the first `limit` of them.

        Raises:
          OSError: the outer file is missing, unreadable or shorter than the span.
        """
        wanted = self.length if limit is None else min(limit, self.length)
        with self.path.open("rb", buffering=0) as file:
            parts, at = [], self.offset
            while wanted and (part := os.pread(file.fileno(), wanted, at)):
                parts.append(part)  # a read may give less than was asked for
                at, wanted = at + len(part), wanted - len(part)
        if wanted:
            raise OSError(f"{self.path} ends {wanted} bytes too early")
        return b"".join(parts)

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}"


@dataclass(frozen=True, eq=False)
class Pixels:
    """An image that is decoded already; two are equal only if they are one."""

    rgb: UInt8[np.ndarray, "height width 3"]

    def __str__(self) -> str:
        return f"of {self.rgb.shape[0]}×{self.rgb.shape[1]} pixels"


@dataclass(frozen=True)
class Image:
    """An encoded image and its size in pixels; a path or a span is read when it is needed."""

    encoded: bytes | Path | Span | Pixels
    height: int
    width: int
    name: str = ""

    def read(self) -> bytes:
        """The file's bytes (pixels: as PNG).

        Raises:
          BadImageError: the file cannot be read.
        """
        if isinstance(self.encoded, bytes):
            return self.encoded
        if isinstance(self.encoded, Pixels):
            file = io.BytesIO()
            PilImage.fromarray(self.encoded.rgb).save(file, "PNG")
            return file.getvalue()
        try:
            if isinstance(self.encoded, Span):
                return self.encoded.read()
            return self.encoded.read_bytes()
        except OSError as error:
            where = self.encoded if isinstance(self.encoded, Path) else self.name or self.encoded
            raise BadImageError(f"image {where}: {error.strerror or error}") from None

    def decode(
        self, at_least: tuple[int, int] | None = None, *, scratch: bool = False
    ) -> UInt8[np.ndarray, "height width 3"]:
        """RGB pixels, upright.

        Args:
          at_least: (height, width); a JPEG may then come back smaller than its header says, but
            never smaller than this, and in the same proportions.
          scratch: as in `decoding.decode_image`.

        Raises:
          BadImageError: missing, broken, or of another size than its header said.
        """
        if isinstance(self.encoded, Pixels):
            return self.encoded.rgb
        encoded = self.read()
        name = self.name or _told(self.encoded)
        try:
            pixels = decoding.decode_image(encoded, at_least, scratch=scratch)
        except decoding.ImageError as error:
            raise BadImageError(f"image {name}: cannot be decoded ({error})") from None
        height, width = pixels.shape[:2]
        if (height, width) != (self.height, self.width) and not (
            at_least is not None
            and at_least[0] <= height <= self.height
            and at_least[1] <= width <= self.width
            # Both sides are shrunk alike and rounded up.
            and abs(height * self.width - width * self.height) < max(self.height, self.width)
        ):
            raise BadImageError(
                f"image {name}: decodes to {height}×{width} pixels, "
                f"its header says {self.height}×{self.width}"
            )
        return pixels


def open_image(encoded: bytes | Path | Span, name: str = "") -> Image:
    """An `Image` with its size read from the header.

    Raises:
      BadImageError: missing, or not an image.
    """
    name = name or _told(encoded)
    try:
        height, width = (
            _span_size(encoded) if isinstance(encoded, Span) else decoding.image_size(encoded)
        )
    except FileNotFoundError:
        raise BadImageError(f"image {name}: no such file") from None
    except Exception as error:  # a header can be broken in as many ways as a body
        raise BadImageError(f"image {name}: cannot be read ({error})") from None
    return Image(encoded, height, width, name)


def _told(encoded: bytes | Path | Span | Pixels) -> str:
    """For messages: where an image is, or how many bytes it is of."""
    return f"of {len(encoded)} bytes" if isinstance(encoded, bytes) else str(encoded)


_HEADER_BYTES = 1 << 16


def image_of_pixels(pixels: UInt8[np.ndarray, "height width 3"], name: str = "") -> Image:
    """An `Image` of pixels in memory."""
    height, width, _ = pixels.shape
    return Image(Pixels(pixels), height, width, name)


def _span_size(span: Span) -> tuple[int, int]:
    """From the first bytes of a JPEG if they are enough (they nearly always are), else from all."""
    if span.length > _HEADER_BYTES:
        head = span.read(_HEADER_BYTES)
        # Other formats may hold their orientation behind the pixels.
        if head.startswith(b"\xff\xd8\xff"):
            with contextlib.suppress(decoding.ImageError):
                return decoding.image_size(head)
    return decoding.image_size(span.read())


@dataclass(frozen=True)
class Example:
    """Texts and images in order; `info` goes along untouched (family, objects, ...)."""

    id: str
    segments: tuple[Text | Image | Tokens, ...]
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
        if isinstance(segment, Text) and segment.is_answer:
            return Example(example.id, example.segments[:at], example.info), segment.text
    raise UserError(f"example {example.id}: no answer to ask for")
