"""Leaves examples out of a source before planning: by size, shape, text, and as duplicates.

Each rule that is on looks at every example, and an example left out counts once, under the first
rule that it breaks, in the order of `RULES`. Duplicates are of examples that broke no rule before,
and the first in the source's order stays.

Memory is O(N), of digests and hashes alone (some hundred bytes an example and a distinct image,
and eight more for each band of the near-duplicate search) and of the reasons for what is left
out. Pixels are held of one image a worker.

    python -m fuyu_jax.data.cleaning --llava=FILE [--image_dir=DIR] [--RULE=VALUE ...] --out=FILE

prints the counts as one JSON object and names what is left out in FILE (JSON Lines).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64, UInt64
from PIL import Image as PilImage
from tqdm import tqdm

from fuyu_jax import cli, errors
from fuyu_jax.data.example import BadImageError, Example, Image, Text
from fuyu_jax.data.sources.base import Source
from fuyu_jax.data.sources.common import largest_side, texts_of
from fuyu_jax.errors import UserError

RULES = (
    "unreadable",
    "min_image_side",
    "max_aspect_ratio",
    "min_text_chars",
    "max_text_chars",
    "exact_duplicate",
    "near_duplicate",
)
# Unrelated images differ in about 32 of 64 bits; past 16 the bands of the search are of three
# bits, so that it compares almost everything with everything.
MAX_DISTANCE = 16

T = TypeVar("T")


@dataclass(frozen=True)
class CleaningConfig:
    """Which examples to leave out. All is off but for images whose header cannot be read."""

    min_image_side: int = 0  # pixels of the shorter side, of every image; 0: off
    max_aspect_ratio: float = 0.0  # longer over shorter side, of every image; 0: off
    min_text_chars: int = 0  # of all texts of an example, without the blanks around each; 0: off
    max_text_chars: int = 0  # of the same; 0: off
    # "header": what cannot be opened. "decode": also what breaks later, so every image is decoded.
    drop_unreadable: Literal["header", "decode"] = "header"
    drop_exact_duplicates: bool = False  # the same texts and the same decoded pixels
    # Bits of 64 in which perceptual hashes may differ; -1: off. Texts may differ: of several
    # questions about one image, in records of their own, the first alone stays.
    near_duplicate_distance: int = -1

    def check(self) -> None:
        """Looks for values that mean nothing.

        Raises:
          UserError: names the field, its value and what it may be.
        """
        for name in ("min_image_side", "min_text_chars", "max_text_chars"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: give 1 or more, or 0 for off")
        ratio = self.max_aspect_ratio
        if ratio != 0 and not (math.isfinite(ratio) and ratio >= 1):
            raise UserError(
                f"max_aspect_ratio={ratio}: longer over shorter side is 1 or more; 0 for off"
            )
        if 0 < self.max_text_chars < self.min_text_chars:
            raise UserError(
                f"max_text_chars={self.max_text_chars} is less than "
                f"min_text_chars={self.min_text_chars}: no text would stay"
            )
        if self.drop_unreadable not in ("header", "decode"):
            raise UserError(f'drop_unreadable={self.drop_unreadable!r}: give "header" or "decode"')
        if not -1 <= self.near_duplicate_distance <= MAX_DISTANCE:
            raise UserError(
                f"near_duplicate_distance={self.near_duplicate_distance}: give 0 to "
                f"{MAX_DISTANCE} bits, or -1 for off"
            )


@dataclass(frozen=True)
class CleaningReport:
    """What stays, and what is left out and why.

    kept: indices into the source, rising. examples: by rule (all of `RULES`), id and reason of
    each example left out, in the source's order.
    """

    kept: Int64[np.ndarray, "K"]
    examples: dict[str, list[tuple[str, str]]]

    @property
    def counts(self) -> dict[str, int]:
        """Examples left out by each rule; with `kept` they sum to the source's length."""
        return {rule: len(named) for rule, named in self.examples.items()}

    def write(self, path: str | Path) -> None:
        """Writes `{"id", "rule", "reason"}` lines, rule by rule; an older file stays until done.

        Raises:
          UserError: the file cannot be written.
        """
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.partial{os.getpid()}")
        try:
            with unfinished.open("w", encoding="utf-8") as sink:
                for rule, named in self.examples.items():
                    for id, reason in named:
                        sink.write(json.dumps({"id": id, "rule": rule, "reason": reason}) + "\n")
            unfinished.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)


class CleanedSource:
    """A view of a source that holds the kept examples alone, in their order.

    Args:
      source: any source.
      kept: indices into it, as in `CleaningReport.kept`.
    """

    def __init__(self, source: Source, kept: Int64[np.ndarray, "K"]):
        self.source = source
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.kept[index])]

    def id(self, index: int) -> str:
        return self.source.id(int(self.kept[index]))

    def _examples(self) -> Iterator[Example]:
        for index in range(len(self)):
            try:
                yield self[index]
            except BadImageError:
                continue  # broken since it was cleaned; told when its example is met

    def texts(self) -> Iterator[str]:
        """All texts of the kept examples, for a tokenizer; opens the images' headers again."""
        for example in self._examples():
            yield from texts_of(example.segments)

    def largest_side(self) -> int:
        """Of all images of the kept examples, in pixels."""
        return largest_side(self)


class _Broken(NamedTuple):
    """A rule that an example breaks, and how."""

    rule: str
    reason: str


class _Header(NamedTuple):
    """What is known of an example without its pixels.

    key: digest of its texts and image sizes in order: equal for exact duplicates.
    """

    broken: _Broken | None
    key: bytes


class _Pixels(NamedTuple):
    """Of an image, or joined of an example's: digest of the decoded pixels, perceptual hashes."""

    digest: bytes
    hashes: tuple[int, ...]


def clean(
    source: Source, config: CleaningConfig, *, workers: int = 0, progress: bool = True
) -> CleaningReport:
    """Applies the rules to every example of a source.

    Headers and texts are looked at first. Pixels are decoded only where a rule needs them: all for
    `drop_unreadable="decode"`, all that broke no earlier rule for near duplicates, and for exact
    duplicates those that share texts and image sizes with another. Files of the same bytes are
    decoded once. Exact duplicates share a 128-bit digest of texts and decoded pixels, so that PNG
    and BMP of one picture are the same. Near duplicates: `near_matches` of imagehash's phash,
    which sees brightness alone, at 32×32 pixels: a change of colour, or a small one, escapes it.

    An image that proves broken while duplicates are looked for is unreadable as well.

    Args:
      source: read from several threads at once.
      config: the rules.
      workers: threads (decoders let go of Python's lock); 0: one a core. Changes no result.
      progress: show bars on standard error.

    Raises:
      UserError: a value that means nothing, or near duplicates without imagehash.
    """
    config.check()
    if workers < 0:
        raise UserError(f"workers={workers}: give 1 or more, or 0 for one a core")
    workers = workers or _cores()
    near = config.near_duplicate_distance >= 0
    perceptual = _perceptual_hash() if near else None

    total = len(source)
    keys: list[bytes] = [b""] * total
    broken: dict[int, _Broken] = {}
    look = partial(_look_at_header, source, config)
    for index, header in enumerate(
        _in_order(look, range(total), workers, "reading headers", progress)
    ):
        keys[index] = header.key
        if header.broken:
            broken[index] = header.broken

    alike = Counter(keys[i] for i in range(total) if i not in broken)
    if config.drop_unreadable == "decode":
        decode = [i for i in range(total) if i not in broken or broken[i].rule != "unreadable"]
    elif near:
        decode = [i for i in range(total) if i not in broken]
    elif config.drop_exact_duplicates:
        decode = [i for i in range(total) if i not in broken and alike[keys[i]] > 1]
    else:
        decode = []
    pixels: dict[int, _Pixels] = {}
    known: dict[bytes, _Pixels] = {}
    look = partial(_look_at_pixels, source, perceptual, known)
    found = _in_order(look, decode, workers, "decoding images", progress and bool(decode))
    for index, seen in zip(decode, found, strict=True):
        if isinstance(seen, _Broken):
            broken[index] = seen
        else:
            pixels[index] = seen
    known.clear()

    if config.drop_exact_duplicates:
        first: dict[bytes, int] = {}
        for index in pixels:
            if index in broken:
                continue
            earlier = first.setdefault(keys[index] + pixels[index].digest, index)
            if earlier != index:
                reason = f"same texts and pixels as example {source.id(earlier)}"
                broken[index] = _Broken("exact_duplicate", reason)
    if near:
        left = [i for i in pixels if i not in broken]
        hashes = [pixels[i].hashes for i in left]
        matches = near_matches(hashes, config.near_duplicate_distance, progress=progress)
        for at in np.flatnonzero(matches >= 0):
            earlier = matches[at]
            bits = max(
                (a ^ b).bit_count() for a, b in zip(hashes[at], hashes[earlier], strict=True)
            )
            reason = f"looks like example {source.id(left[earlier])}: {bits} of 64 bits differ"
            broken[left[at]] = _Broken("near_duplicate", reason)

    examples: dict[str, list[tuple[str, str]]] = {rule: [] for rule in RULES}
    for index in sorted(broken):
        examples[broken[index].rule].append((source.id(index), broken[index].reason))
    kept = np.asarray([i for i in range(total) if i not in broken], np.int64)
    return CleaningReport(kept, examples)


def near_matches(
    hashes: Sequence[tuple[int, ...]], distance: int, *, progress: bool = False
) -> Int64[np.ndarray, "N"]:
    """The earliest kept example that each one looks like, or -1 where it is kept itself.

    Two examples look alike when they have as many images and the hashes of each pair of images, in
    order, differ in at most `distance` bits. An example is compared with kept ones before it only,
    so no two kept ones look alike, and a chain of small changes does not pull in its far end.

    Multi-index hashing (Norouzi et al., 2012): 64 bits are cut into `distance` + 1 bands; of two
    hashes that differ in fewer bits than there are bands, one band is equal. So it is enough, and
    exact, to compare with kept hashes that share a band.

    Args:
      hashes: 64-bit hashes of the images of each example; an example without any is kept.
      distance: bits, 0 to 63.
      progress: show a bar on standard error.
    """
    edges = [64 * band // (distance + 1) for band in range(distance + 2)]
    bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
    matches = np.full(len(hashes), -1, np.int64)
    groups: dict[int, list[int]] = defaultdict(list)
    for at, own in enumerate(hashes):
        if own:
            groups[len(own)].append(at)
    with tqdm(
        total=sum(map(len, groups.values())),
        desc="comparing images",
        unit="example",
        disable=not progress,
    ) as bar:
        for group in groups.values():
            table = np.asarray([hashes[at] for at in group], np.uint64)
            # Of the first image: where that differs too much, the others need no look.
            buckets: list[dict[int, array]] = [defaultdict(partial(array, "q")) for _ in bands]
            for row, at in enumerate(group):
                parts = [(hashes[at][0] >> low) & mask for low, mask in bands]
                shared = [b[part] for b, part in zip(buckets, parts, strict=True) if part in b]
                earlier = min(
                    (_first_near(table, row, rows, distance) for rows in shared), default=row
                )
                if earlier < row:
                    matches[at] = group[earlier]
                else:
                    for bucket, part in zip(buckets, parts, strict=True):
                        bucket[part].append(row)
                bar.update()
    return matches


def _first_near(table: UInt64[np.ndarray, "G images"], row: int, rows: array, distance: int) -> int:
    """The first of `rows` (rising) that is near `row` in every image; `row` if none is."""
    candidates = np.frombuffer(rows, np.int64)
    differ = np.bitwise_count(table[candidates] ^ table[row])
    near = np.flatnonzero((differ <= distance).all(1))
    return int(candidates[near[0]]) if len(near) else row


def _look_at_header(source: Source, config: CleaningConfig, index: int) -> _Header:
    try:
        example = source[index]
    except BadImageError as error:
        return _Header(_Broken("unreadable", str(error)), b"")
    key = hashlib.blake2b(digest_size=16)
    for segment in example.segments:
        if isinstance(segment, Image):
            key.update(f"image {segment.height} {segment.width};".encode())
        else:
            # A text may come from JSON with half a surrogate pair.
            text = segment.text.encode("utf-8", "surrogatepass")
            key.update(f"text {segment.train} {segment.plain} {len(text)};".encode() + text)
    return _Header(_first_broken(example, config), key.digest())


def _first_broken(example: Example, config: CleaningConfig) -> _Broken | None:
    """The first rule on sizes and texts that an example breaks."""
    for image in example.images:
        if min(image.height, image.width) < config.min_image_side:
            reason = (
                f"image {_name(image, example)}: {image.height}×{image.width} pixels, "
                f"shorter side under {config.min_image_side}"
            )
            return _Broken("min_image_side", reason)
    if config.max_aspect_ratio:
        for image in example.images:
            shorter, longer = sorted((image.height, image.width))
            if longer > config.max_aspect_ratio * shorter:
                reason = (
                    f"image {_name(image, example)}: {image.height}×{image.width} pixels, "
                    f"longer side over {config.max_aspect_ratio:g} times the shorter"
                )
                return _Broken("max_aspect_ratio", reason)
    chars = sum(len(s.text.strip()) for s in example.segments if isinstance(s, Text))
    if chars < config.min_text_chars:
        reason = f"{chars} characters of text, under {config.min_text_chars}"
        return _Broken("min_text_chars", reason)
    if 0 < config.max_text_chars < chars:
        reason = f"{chars} characters of text, over {config.max_text_chars}"
        return _Broken("max_text_chars", reason)
    return None


def _look_at_pixels(
    source: Source,
    perceptual: Callable[[np.ndarray], int] | None,
    known: dict[bytes, _Pixels],
    index: int,
) -> _Pixels | _Broken:
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
        return _Broken("unreadable", str(error))
    return _Pixels(digest.digest(), hashes)


def _pixels_of(image: Image, perceptual: Callable[[np.ndarray], int] | None) -> _Pixels:
    pixels = image.decode()
    # Without the size: that is in the example's key.
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).digest()
    return _Pixels(digest, (perceptual(pixels),) if perceptual else ())


def _name(image: Image, example: Example) -> str:
    if image.name or isinstance(image.encoded, bytes):
        return image.name or f"of example {example.id}"
    return str(image.encoded)


def _perceptual_hash() -> Callable[[np.ndarray], int]:
    """RGB pixels → 64 bits."""
    try:
        import imagehash
    except ImportError:
        raise UserError(
            "near_duplicate_distance needs imagehash: pip install 'fuyu-jax[cleaning]'"
        ) from None

    def phash(pixels: np.ndarray) -> int:
        bits = imagehash.phash(PilImage.fromarray(pixels)).hash
        return int.from_bytes(np.packbits(bits).tobytes(), "big")

    return phash


def _in_order(
    look: Callable[[int], T], indices: Sequence[int], workers: int, what: str, progress: bool
) -> Iterator[T]:
    """`look` of each index, in order, from threads: a source need not be picklable."""
    bar = partial(tqdm, total=len(indices), desc=what, unit="example", disable=not progress)
    if workers == 1:
        yield from bar(map(look, indices))
        return
    with ThreadPool(workers) as pool:
        yield from bar(pool.imap(look, indices, chunksize=16))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _switch(value: str) -> bool:
    if value.lower() not in ("true", "1", "false", "0"):
        raise ValueError
    return value.lower() in ("true", "1")


def _flags() -> Any:
    flags = cli.parser(__doc__.partition("\n")[0])
    flags.add_argument("--llava", required=True, help="a LLaVA-style JSON or JSONL file")
    flags.add_argument("--image_dir", default="", help="default: the JSON file's folder")
    flags.add_argument("--out", required=True, help="where to name what is left out (JSON Lines)")
    flags.add_argument("--workers", type=int, default=0, help="threads; 0: one a core")
    for f in dataclasses.fields(CleaningConfig):
        options: dict[str, Any] = {"type": type(f.default)}
        if f.name == "drop_unreadable":
            options = {"choices": ("header", "decode")}
        elif isinstance(f.default, bool):
            options = {"type": _switch, "nargs": "?", "const": True, "metavar": "true|false"}
        flags.add_argument(
            f"--{f.name}", default=f.default, help=f"default: {f.default}", **options
        )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """The program; prints `{"examples", "kept", "counts", "out"}`.

    Raises:
      UserError: a wrong flag or value, no such file or folder.
    """
    args, overrides = cli.parse(_flags(), argv)
    if overrides:
        raise UserError(f'unknown flag "--config.{overrides[0]}": give rules as --RULE=VALUE')
    config = CleaningConfig(
        **{f.name: getattr(args, f.name) for f in dataclasses.fields(CleaningConfig)}
    )
    config.check()
    out = Path(args.out).expanduser()
    if not out.parent.is_dir():  # told now, not after hours of decoding
        raise UserError(f"--out={args.out}: no folder {out.parent}")

    from fuyu_jax.data.sources.llava import LlavaSource

    source = LlavaSource(args.llava, args.image_dir)
    report = clean(source, config, workers=args.workers)
    report.write(out)
    told = {"examples": len(source), "kept": len(report.kept), "counts": report.counts}
    print(json.dumps({**told, "out": str(out)}))


if __name__ == "__main__":
    errors.run_main(main)
