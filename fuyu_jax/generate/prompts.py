"""Prompts as the engine holds them: tokens, pixels when they are needed, keys of their pages."""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fuyu_jax.data.example import Example, Image, Pixels
from fuyu_jax.data.layout import Layout, LayoutPolicy
from fuyu_jax.data.rows import with_pixels
from fuyu_jax.model.paged import PAGE
from fuyu_jax.patches import patch_coordinates


class ImageSpan(NamedTuple):
    """An image's tokens in its prompt: from `start` to before `stop`, newlines included."""

    start: int
    stop: int


@dataclass(eq=False)
class Prompt:
    """One thing to be run: a prompt to be answered, or a prompt and a continuation to be scored.

    number: among those of a call. begin: index of the continuation's first token; 0 where an answer
    is wanted, of `max_new` tokens at most. blind: patches are zeroed. spans: of its images.
    """

    number: int
    example: Example
    layout: Layout
    policy: LayoutPolicy
    max_new: int = 0
    begin: int = 0
    blind: bool = False
    image_id: int = -1
    spans: list[ImageSpan] = field(default_factory=list)
    _keys: list[bytes] | None = None
    _pixels: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        # Images lie in order, each as its grid says; nothing between them has a placeholder.
        places = np.flatnonzero(self.layout.tokens == self.image_id)
        patch = 0
        for grid in self.layout.grids:
            start = int(places[patch])
            self.spans.append(ImageSpan(start, start + grid.tokens))
            patch += grid.patches

    @property
    def length(self) -> int:
        return len(self.layout.tokens)

    @property
    def pages(self) -> int:
        """Pages for all of it. (The last token of an answer is never looked at.)"""
        return -(-(self.length + max(self.max_new - 1, 0)) // PAGE)

    @property
    def needed(self) -> int:
        """Index of the first token whose hidden state is wanted."""
        return (self.begin or self.length) - 1

    @property
    def keys(self) -> list[bytes]:
        """Of its pages that others may share, those that end before the first token whose state is
        wanted: hashes of all that lies before the page's end.

        Raises:
          BadImageError: an image's file cannot be read.
        """
        if self._keys is None:
            self._keys = self._name_pages()
        return self._keys

    def _name_pages(self) -> list[bytes]:
        tokens = np.ascontiguousarray(self.layout.tokens)
        key = b"blind" if self.blind else b""
        contents = map(digest, self.example.images)
        images = list(zip(self.spans, contents, self.layout.grids, strict=True))
        keys = []
        for page in range(self.needed // PAGE):
            start, stop = page * PAGE, (page + 1) * PAGE
            found = hashlib.blake2b(key, digest_size=16)
            found.update(tokens[start:stop])
            for span, content, grid in images:
                if span.start < stop and start < span.stop:
                    found.update(content + repr((start - span.start, grid)).encode())
            key = found.digest()
            keys.append(key)
        return keys

    @property
    def beginning(self) -> tuple[object, ...]:
        """Equal for prompts that are likely to begin alike; no file is read for it."""
        tokens = bytes(self.layout.tokens[: min(PAGE, self.needed)])
        image = (
            self.example.images[0].encoded if self.spans and self.spans[0].start < PAGE else None
        )
        return tokens, image

    def inside(self, index: int) -> ImageSpan | None:
        """The image that a cut before this token would divide."""
        return next((s for s in self.spans if s.start < index < s.stop), None)

    def open(self) -> None:
        """Decodes its images, if that has not been done.

        Raises:
          BadImageError: one is missing or broken.
        """
        if self._pixels is not None:
            return
        cut = with_pixels(self.example, self.layout, self.policy).patches
        channels = self.policy.patch_size**2 * 3
        patches = np.concatenate(cut) if cut else np.zeros((0, channels), np.uint8)
        coordinates = [patch_coordinates(g) for g in self.layout.grids]
        both = np.concatenate(coordinates) if coordinates else np.zeros((0, 2), np.int32)
        self._pixels = (np.zeros_like(patches) if self.blind else patches), both

    def patches(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Patches and their coordinates of the tokens from `start` to before `stop`."""
        is_patch = self.layout.tokens == self.image_id
        first, last = int(is_patch[:start].sum()), int(is_patch[:stop].sum())
        if first == last:
            return np.zeros((0, self.policy.patch_size**2 * 3), np.uint8), np.zeros((0, 2), int)
        self.open()
        assert self._pixels is not None
        patches, coordinates = self._pixels
        return patches[first:last], coordinates[first:last]

    def close(self) -> None:
        """Forgets the pixels."""
        self._pixels = None


def digest(image: Image) -> bytes:
    """Of an image's content. (Pixels in memory are hashed as they are.)

    Raises:
      BadImageError: the file cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    if isinstance(image.encoded, Pixels):
        rgb = image.encoded.rgb
        found.update(repr(rgb.shape).encode())
        found.update(np.ascontiguousarray(rgb))
    else:
        found.update(image.read())
    return found.digest()
