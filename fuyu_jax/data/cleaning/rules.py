"""What one example shows: the rule on its size, shape or text that it breaks, and its digests."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fuyu_jax.config import CleaningConfig
from fuyu_jax.data.example import BadImageError, Example, Image, Text
from fuyu_jax.data.sources.base import Source

RULES = (
    "unreadable",
    "min_image_side",
    "max_aspect_ratio",
    "min_text_chars",
    "max_text_chars",
    "exact_duplicate",
    "near_duplicate",
)


class Broken(NamedTuple):
    """A rule that an example breaks, and how."""

    rule: str
    reason: str


class Header(NamedTuple):
    """What is known of an example without its pixels.

    key: digest of its texts and image sizes in order: equal for exact duplicates.
    """

    broken: Broken | None
    key: bytes


class Pixels(NamedTuple):
    """Of an image, or joined of an example's: digest of the decoded pixels, perceptual hashes."""

    digest: bytes
    hashes: tuple[int, ...]


def look_at_header(source: Source, config: CleaningConfig, index: int) -> Header:
    try:
        example = source[index]
    except BadImageError as error:
        return Header(Broken("unreadable", str(error)), b"")
    key = hashlib.blake2b(digest_size=16)
    for segment in example.segments:
        if isinstance(segment, Image):
            key.update(f"image {segment.height} {segment.width};".encode())
        else:
            # A text may come from JSON with half a surrogate pair.
            text = segment.text.encode("utf-8", "surrogatepass")
            key.update(f"text {segment.train} {segment.plain} {len(text)};".encode() + text)
    return Header(_first_broken(example, config), key.digest())


def _first_broken(example: Example, config: CleaningConfig) -> Broken | None:
    """The first rule on sizes and texts that an example breaks."""
    for image in example.images:
        if min(image.height, image.width) < config.min_image_side:
            reason = (
                f"image {_name(image, example)}: {image.height}×{image.width} pixels, "
                f"shorter side under {config.min_image_side}"
            )
            return Broken("min_image_side", reason)
    if config.max_aspect_ratio:
        for image in example.images:
            shorter, longer = sorted((image.height, image.width))
            if longer > config.max_aspect_ratio * shorter:
                reason = (
                    f"image {_name(image, example)}: {image.height}×{image.width} pixels, "
                    f"longer side over {config.max_aspect_ratio:g} times the shorter"
                )
                return Broken("max_aspect_ratio", reason)
    chars = sum(len(s.text.strip()) for s in example.segments if isinstance(s, Text))
    if chars < config.min_text_chars:
        reason = f"{chars} characters of text, under {config.min_text_chars}"
        return Broken("min_text_chars", reason)
    if 0 < config.max_text_chars < chars:
        reason = f"{chars} characters of text, over {config.max_text_chars}"
        return Broken("max_text_chars", reason)
    return None


def look_at_pixels(
    source: Source,
    perceptual: Callable[[np.ndarray], int] | None,
    known: dict[bytes, Pixels],
    index: int,
) -> Pixels | Broken:
    """Decodes an example's images; `known` holds images by digest of their encoded bytes."""
    digest = hashlib.blake2b(digest_size=16)
    hashes: tuple[int, ...] = ()
    try:
        example = source[index]
        for image in example.images:
            encoded = image.read()
            key = hashlib.blake2b(encoded, digest_size=16).digest()
            # Two threads may both find it missing: they write the same value.
            if (seen := known.get(key)) is None:
                image = dataclasses.replace(image, encoded=encoded, name=_name(image, example))
                seen = known[key] = _pixels_of(image, perceptual)
            digest.update(seen.digest)
            hashes += seen.hashes
    except BadImageError as error:
        return Broken("unreadable", str(error))
    return Pixels(digest.digest(), hashes)


def _pixels_of(image: Image, perceptual: Callable[[np.ndarray], int] | None) -> Pixels:
    pixels = image.decode()
    # Without the size: that is in the example's key.
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).digest()
    return Pixels(digest, (perceptual(pixels),) if perceptual else ())


def _name(image: Image, example: Example) -> str:
    if image.name or isinstance(image.encoded, bytes):
        return image.name or f"of example {example.id}"
    return str(image.encoded)
