"""Applies the rules to a source: what stays, what is left out and why, and a view of what stays."""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from fuyu_jax.config import CleaningConfig
from fuyu_jax.data.cleaning.near import near_matches, perceptual_hash
from fuyu_jax.data.cleaning.rules import (
    RULES,
    Broken,
    Pixels,
    look_at_header,
    look_at_pixels,
)
from fuyu_jax.data.example import BadImageError, Example
from fuyu_jax.data.outline import Outline
from fuyu_jax.data.sources.base import Source
from fuyu_jax.data.sources.common import largest_side, texts_of
from fuyu_jax.errors import UserError
from fuyu_jax.tokenizer import Tokenizer

T = TypeVar("T")


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file; an older one stays until all is written.

    Raises:
      UserError: it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.partial{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with unfinished.open("wb") as sink:
            sink.writelines(parts)
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@dataclass(frozen=True)
class CleaningReport:
    """What stays, and what is left out and why.

    kept: indices into the source, rising. examples: by rule (all of `RULES`), id and reason of
    each example left out, in the source's order. config: the rules.
    """

    kept: Int64[np.ndarray, "K"]
    examples: dict[str, list[tuple[str, str]]]
    config: CleaningConfig

    @property
    def counts(self) -> dict[str, int]:
        """Examples left out by each rule; with `kept` they sum to the source's length."""
        return {rule: len(named) for rule, named in self.examples.items()}

    def lines(self, label: str = "") -> Iterator[bytes]:
        """`{"id", "rule", "reason"}` in JSON, rule by rule; `label` goes before the ids."""
        for rule, named in self.examples.items():
            for id, reason in named:
                line = {"id": label + id, "rule": rule, "reason": reason}
                yield json.dumps(line).encode() + b"\n"

    def write(self, path: str | Path) -> None:
        """Writes `lines`; an older file stays until done.

        Raises:
          UserError: the file cannot be written.
        """
        write_whole(Path(path), self.lines())


class CleanedSource:
    """A view of a source that holds the kept examples alone, in their order.

    Args:
      source: any source.
      kept: indices into it, as in `CleaningReport.kept`.
      report: where `kept` is from, if that is to be told.
    """

    def __init__(
        self, source: Source, kept: Int64[np.ndarray, "K"], report: CleaningReport | None = None
    ):
        self.source = source
        self.kept = kept
        self.report = report

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes ask for examples alone; the report may be long.
        return {"source": self.source, "kept": self.kept, "report": None}

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """Id and reason of what was left out as such."""
        return self.report.examples["unreadable"] if self.report else []

    @property
    def settings(self) -> dict[str, Any]:
        """The rules and what they kept, for a plan's hash."""
        rules = dataclasses.asdict(self.report.config) if self.report else {}
        kept = np.ascontiguousarray(self.kept, np.int64)
        return {**rules, "kept": hashlib.sha256(kept).hexdigest()[:16]}

    def outline(self, tokenizer: Tokenizer) -> Outline | None:
        """Of the kept examples, where the source has an outline of its own."""
        own = getattr(self.source, "outline", None)
        found = own(tokenizer) if own is not None else None
        return found and found.take(self.kept)

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


def clean(
    source: Source,
    config: CleaningConfig,
    *,
    workers: int = 0,
    progress: bool = True,
    unreadable: Callable[[str, str], None] | None = None,
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
      unreadable: told id and reason of each such example when it is met; may raise, to stop.

    Raises:
      UserError: a value that means nothing, or near duplicates without imagehash.
    """
    config.check()
    if workers < 0:
        raise UserError(f"workers={workers}: give 1 or more, or 0 for one a core")
    workers = workers or _cores()
    near = config.near_duplicate_distance >= 0
    perceptual = perceptual_hash() if near else None

    total = len(source)
    keys: list[bytes] = [b""] * total
    broken: dict[int, Broken] = {}
    look = partial(look_at_header, source, config)
    for index, header in enumerate(
        _in_order(look, range(total), workers, "reading headers", progress)
    ):
        keys[index] = header.key
        if header.broken:
            broken[index] = header.broken
            if header.broken.rule == "unreadable" and unreadable:
                unreadable(source.id(index), header.broken.reason)

    alike = Counter(keys[i] for i in range(total) if i not in broken)
    if config.drop_unreadable == "decode":
        decode = [i for i in range(total) if i not in broken or broken[i].rule != "unreadable"]
    elif near:
        decode = [i for i in range(total) if i not in broken]
    elif config.drop_exact_duplicates:
        decode = [i for i in range(total) if i not in broken and alike[keys[i]] > 1]
    else:
        decode = []
    pixels: dict[int, Pixels] = {}
    known: dict[bytes, Pixels] = {}
    look = partial(look_at_pixels, source, perceptual, known)
    found = _in_order(look, decode, workers, "decoding images", progress and bool(decode))
    for index, seen in zip(decode, found, strict=True):
        if isinstance(seen, Broken):
            broken[index] = seen
            if unreadable:
                unreadable(source.id(index), seen.reason)
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
                broken[index] = Broken("exact_duplicate", reason)
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
            broken[left[at]] = Broken("near_duplicate", reason)

    examples: dict[str, list[tuple[str, str]]] = {rule: [] for rule in RULES}
    for index in sorted(broken):
        examples[broken[index].rule].append((source.id(index), broken[index].reason))
    kept = np.asarray([i for i in range(total) if i not in broken], np.int64)
    return CleaningReport(kept, examples, config)


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
