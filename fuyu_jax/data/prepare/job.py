"""What is to be prepared, and the work on one shard: the same on one machine and in a pipeline."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fuyu_jax.config import SourceConfig, digest
from fuyu_jax.data import shards
from fuyu_jax.data.example import BadImageError, Image, Span
from fuyu_jax.data.opening import open_source
from fuyu_jax.data.prepare.folder import open_folder, write
from fuyu_jax.data.sources import LlavaSource, Source, TfdsSource
from fuyu_jax.data.sources.array_record import ArrayRecordSource
from fuyu_jax.data.sources.common import counted
from fuyu_jax.errors import UserError
from fuyu_jax.tokenizer import Tokenizer

# Fields of a source that say how to train on it, not what its examples are.
_OF_TRAINING = {
    "name",
    "train",
    "validation",
    "test",
    "weight",
    "resolution",
    "max_image_height",
    "max_image_width",
    "max_image_patches",
    "min_image_side",
    "max_image_side",
    "token_drop",
    "cleaning",
}
_SAMPLE = 256  # examples whose images are weighed to choose the number of shards
_SMALL = 1000  # a set of this many examples is cut, up to ...
_FEW = 16  # ... so many shards, so that cores have work

File = tuple[str, int, int]  # path, size, time


@dataclass(frozen=True)
class Settings:
    """What decides which bytes are written."""

    part: SourceConfig
    split: str
    tokenizer: str = ""  # a sentencepiece model, to count tokens
    check: str = "header"
    shard_size_mb: int = 256
    examples_per_shard: int = 0

    @property
    def source(self) -> str:
        return getattr(self.part, self.split)


@dataclass(frozen=True)
class Job:
    """A source cut into shards: shard k has the examples k·N/shards to (k + 1)·N/shards."""

    settings: Settings
    out: str
    files: tuple[File, ...]  # of the source, to know it again
    examples: int
    shards: int
    tokenizer: str  # digest
    counts: dict[str, int]  # what the source left out, split or renamed

    @property
    def names(self) -> list[str]:
        return shards.shard_names(self.settings.split, self.shards)

    def indices(self, shard: int) -> range:
        first, last = (self.examples * k // self.shards for k in (shard, shard + 1))
        return range(first, last)

    @functools.cached_property
    def told(self) -> dict[str, Any]:
        """What must be the same to go on, by the names of the flags."""
        fields = dataclasses.asdict(self.settings.part)
        told: dict[str, Any] = {
            "version": shards.VERSION,
            "source": self.settings.source,
            "split": self.settings.split,
            **{k: v for k, v in fields.items() if k not in _OF_TRAINING},
            "tokenizer": self.tokenizer,
            "check": self.settings.check,
            "shard_size_mb": self.settings.shard_size_mb,
            "examples_per_shard": self.settings.examples_per_shard,
            "files": [list(f) for f in self.files],
            "examples": self.examples,
        }
        return told

    @functools.cached_property
    def plan(self) -> str:
        """A hash of all that; each shard keeps it."""
        return digest([self.told, self.shards])


def make_job(settings: Settings, out: str, shard_count: int = 0) -> Job:
    """Opens the source and plans its shards (so many, where they were planned before).

    Raises:
      UserError: the source or the tokenizer cannot be opened, or a size is not positive.
    """
    for name in ("shard_size_mb", "examples_per_shard"):
        least = 1 if name == "shard_size_mb" else 0
        if getattr(settings, name) < least:
            raise UserError(f"--{name}={getattr(settings, name)}: must be {least} or more")
    tokenizer = _tokenizer(settings.tokenizer)
    source = _open(settings)
    if not len(source):
        raise UserError(f"{settings.source}: no examples in it")
    files = _files(source)
    return Job(
        settings,
        out,
        files,
        len(source),
        shard_count or _shard_count(settings, source, files),
        shards.tokenizer_digest(tokenizer) if tokenizer else "",
        {name: getattr(source, name) for name in counted(source)},
    )


@functools.lru_cache(maxsize=1)
def _open(settings: Settings) -> Source:
    return open_source(settings.part, settings.split)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer | None:
    return Tokenizer(path) if path else None


def _files(source: Source) -> tuple[File, ...]:
    """A source's own files; images that lie beside them are not looked at."""
    if isinstance(source, LlavaSource):
        paths = [source.path]
    elif isinstance(source, TfdsSource):
        mark = f"-{source.split.partition('[')[0]}."
        inside = sorted(Path(source.directory).iterdir())
        paths = [p for p in inside if mark in p.name or p.name == "dataset_info.json"]
    else:
        paths = list(source.paths)
        if isinstance(source, ArrayRecordSource):
            paths.insert(0, source.folder / shards.INFO_FILE)
    states = [(path, path.stat()) for path in paths]
    return tuple((str(p), s.st_size, s.st_mtime_ns) for p, s in states)


def _shard_count(settings: Settings, source: Source, files: tuple[File, ...]) -> int:
    count = len(source)
    if settings.examples_per_shard:
        return math.ceil(count / settings.examples_per_shard)
    total = sum(size for _, size, _ in files)
    if settings.part.kind in ("llava", "interleaved"):  # images lie beside
        total += _images_weigh(source) * count
    by_size = math.ceil(total / (settings.shard_size_mb << 20))
    return max(1, min(count, max(by_size, min(_FEW, count // _SMALL))))


def _images_weigh(source: Source) -> float:
    """Bytes of an example's images, from a few examples throughout the source."""
    sizes = []
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int)):
        try:
            sizes.append(sum(_weigh(image) for image in source[int(index)].images))
        except (BadImageError, OSError):
            continue
    return sum(sizes) / max(len(sizes), 1)


def _weigh(image: Image) -> int:
    if isinstance(image.encoded, Path):
        return image.encoded.stat().st_size
    return image.encoded.length if isinstance(image.encoded, Span) else len(image.read())


# --- One shard ---


@dataclass(frozen=True)
class Done:
    """A finished shard, in figures."""

    shard: int
    records: int
    images: int
    bytes: int
    empty: int
    bad: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, shard: int, sidecar: shards.Sidecar) -> "Done":
        about = sidecar.about
        bad = tuple((id, reason) for id, reason in sidecar.bad)
        return cls(shard, about["records"], len(sidecar.sizes), about["bytes"], about["empty"], bad)


def finished(job: Job, shard: int) -> Done | None:
    """The shard's figures if it is there, whole, and of this very job."""
    folder, name = open_folder(job.out), job.names[shard]
    beside = shards.sidecar_name(name)
    if (data := folder.read(beside)) is None:
        return None
    try:
        sidecar = shards.Sidecar.loads(data, beside)
    except UserError:
        return None
    about = sidecar.about
    if about["plan"] != job.plan or not folder.holds(name, about["bytes"], about["records"]):
        return None
    return Done.of(shard, sidecar)


def write_shard(job: Job, shard: int) -> Done:
    """Writes a shard and its sidecar, unless they are there.

    Raises:
      UserError: the source has changed since the job was made, or a record of it is malformed.
    """
    if (done := finished(job, shard)) is not None:
        return done
    source = _open(job.settings)
    if _files(source) != job.files or len(source) != job.examples:
        raise UserError(f"{job.settings.source}: changed while it was prepared; begin anew")
    folder, name = open_folder(job.out), job.names[shard]
    tokenizer = _tokenizer(job.settings.tokenizer)
    with folder.writing(name) as path:
        sidecar = shards.write_records(
            path, source, job.indices(shard), job.plan, tokenizer, job.settings.check
        )
    write(folder, shards.sidecar_name(name), sidecar.dumps())
    return Done.of(shard, sidecar)
