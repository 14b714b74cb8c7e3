"""From a configuration to its tokenizer and sources."""

import bisect
import dataclasses
import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuyu_jax.config import ColumnsConfig, DataConfig, ModelConfig, SourceConfig
from fuyu_jax.data import demo
from fuyu_jax.data.cleaned import Cleaned, Uncleaned, as_line, clean_all, keep_cleaned
from fuyu_jax.data.cleaning import CleanedSource
from fuyu_jax.data.example import Example
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.mixture import Mixture, Part
from fuyu_jax.data.sources import (
    DemoSource,
    InterleavedSource,
    JsonlTextSource,
    LlavaSource,
    ParquetSource,
    Source,
    TfdsSource,
    WebDatasetSource,
)
from fuyu_jax.data.sources.array_record import ArrayRecordSource
from fuyu_jax.data.sources.common import largest_side
from fuyu_jax.errors import UserError, nearest
from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece
from fuyu_jax.vocabulary import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    JsonVocabulary,
    open_vocabulary,
)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sources:
    """Splits by name, opened when asked for.

    cleaned: what the rules of `data.cleaning` found in each source of the training split.
    """

    config: DataConfig
    demo_dir: Path | None = None
    cleaned: tuple[Cleaned, ...] = ()

    @property
    def _parts(self) -> tuple[SourceConfig, ...]:
        """Of all that is not the demo set; a LLaVA file alone is a mixture of one."""
        c = self.config
        if c.source == "mixture":
            return c.mixture
        only = SourceConfig(
            "llava", "llava", c.train_json, c.validation_json, c.test_json, image_dir=c.image_dir
        )
        return (only,)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that there are."""
        if self.config.source == "demo":
            return ("train", "validation", "test", "compositional")
        given = {split for part in self._parts for split in SPLITS if _path(part, split)}
        return tuple(split for split in SPLITS if split in given)

    def _open_raw(self, split: str) -> list[tuple[SourceConfig | None, Source]]:
        if split not in self.splits:
            raise UserError(f'split "{split}" is not there{nearest(split, self.splits)}')
        if self.demo_dir is not None:
            return [(None, DemoSource(self.demo_dir, split))]
        parts = [p for p in self._parts if _path(p, split)]
        if split == "train" and len(parts) < len(self._parts):
            missing = next(p.name for p in self._parts if not p.train)
            raise UserError(f'source "{missing}" has no "train"')
        return [(part, open_source(part, split)) for part in parts]

    def _open(self, split: str) -> list[tuple[SourceConfig | None, Source]]:
        opened = self._open_raw(split)
        if split != "train" or not self.cleaned:
            return opened
        return [
            (part, CleanedSource(source, found.report.kept, found.report))
            if found.report
            else (part, source)
            for (part, source), found in zip(opened, self.cleaned, strict=True)
        ]

    def clean(self, folder: Path, *, progress: bool = True) -> "Sources":
        """These sources, of whose training split the rules of `data.cleaning` have left out some.

        Where all rules are off nothing is opened. What `folder` remembers of the same rules and
        sources (`keep_cleaning`) is not looked for again.

        Raises:
          UserError, TrainingStoppedError: as `open`; as `clean_all`.
        """
        parts = self._parts if self.demo_dir is None else (None,)
        if not any(_own(self.config, part).cleaning.on for part in parts):
            return self
        uncleaned = [
            Uncleaned(
                part.name if part else self.config.source,
                source,
                _own(self.config, part).cleaning,
                _content(part) if part else str(self.demo_dir),
            )
            for part, source in self._open_raw("train")
        ]
        found = clean_all(uncleaned, self.config, folder, progress=progress)
        return dataclasses.replace(self, cleaned=found)

    def keep_cleaning(self, folder: Path) -> None:
        """Writes what `clean` left out, and what it needs to remember, into a folder."""
        keep_cleaned(self.cleaned, folder)

    def cleaning_line(self) -> str:
        """How many examples each rule left out; "" where all rules are off."""
        return as_line(self.cleaned)

    def open(self, split: str) -> Source:
        """The source of a split; of several sources, one after the other.

        Raises:
          UserError: no such split, or a file that cannot be read as what it is said to be.
        """
        opened = self._open(split)
        if len(opened) == 1:
            return opened[0][1]
        return Chained({part.name: source for part, source in opened if part is not None})

    def open_mixture(self, split: str, model: ModelConfig, seed: int) -> Mixture:
        """The sources of a split in their proportions, each with its own resolution policy.

        Raises:
          UserError: as `open`; two sources of one name, a weight of 0.
        """
        parts = []
        for part, source in self._open(split):
            policy = LayoutPolicy.of(model, _own(self.config, part))
            name, weight = (part.name, part.weight) if part else (self.config.source, 1.0)
            parts.append(Part(name, source, weight, policy))
        return Mixture(parts, seed)


def _path(part: SourceConfig, split: str) -> str:
    """Of a split; a test split that is not given is the validation split."""
    return (part.test or part.validation) if split == "test" else getattr(part, split)


def _own(config: DataConfig, part: SourceConfig | None) -> DataConfig:
    """The data configuration with a source's own fields in the place of the common ones."""
    if part is None:
        return config
    shared = {f.name for f in dataclasses.fields(config)} - {"mixture", "image_dir"}
    mine = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name in shared}
    return dataclasses.replace(config, **{k: v for k, v in mine.items() if v is not None})


def _content(part: SourceConfig) -> dict[str, Any]:
    """What decides a source's training examples, and neither their sizes nor their share."""
    other = {f.name for f in dataclasses.fields(DataConfig)} - {"image_dir"}
    other |= {"name", "weight", "validation", "test"}
    return {k: v for k, v in dataclasses.asdict(part).items() if k not in other}


def open_source(part: SourceConfig, split: str) -> Source:
    """One source of a mixture.

    Raises:
      UserError: a file that is missing or not what it is said to be.
    """
    path = _path(part, split)
    if part.kind != "parquet" and part.columns != ColumnsConfig():
        raise UserError(f'source "{part.name}": columns are of parquet, not of {part.kind}')
    if part.kind != "text" and part.text_field != "text":
        raise UserError(f'source "{part.name}": text_field is of text, not of {part.kind}')
    if part.kind == "llava":
        return LlavaSource(path, part.image_dir)
    if part.kind == "webdataset":
        return WebDatasetSource(path, part.prompt)
    if part.kind == "parquet":
        return ParquetSource(path, prompt=part.prompt, **dataclasses.asdict(part.columns))
    if part.kind == "interleaved":
        return InterleavedSource(path, part.image_dir, part.max_images, part.max_chars)
    if part.kind == "array_record":
        return ArrayRecordSource(path)
    if part.kind == "text":
        return JsonlTextSource(path, part.max_chars, part.text_field)
    # A split may have colons of its own: train[:10%].
    found = re.fullmatch(r"(.+?):(\w+(?:\[.*\])?)", path)
    if not found:
        raise UserError(f'source "{part.name}": {path}: give DIRECTORY:SPLIT of a prepared set')
    # In evaluation each question stands alone, or the answers before it would give it away.
    return TfdsSource(*found.groups(), turns="all" if split == "train" else "each")


class Chained:
    """Sources one after the other, for evaluation; ids say which one an example is of."""

    def __init__(self, sources: dict[str, Source]):
        self.sources = sources
        self._ends = list(itertools.accumulate(len(s) for s in sources.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[str, Source, int]:
        at = bisect.bisect_right(self._ends, index)
        name = list(self.sources)[at]
        return name, self.sources[name], index - (self._ends[at - 1] if at else 0)

    def id(self, index: int) -> str:
        name, source, at = self._find(index)
        return f"{name}/{source.id(at)}"

    def __getitem__(self, index: int) -> Example:
        name, source, at = self._find(index)
        example = source[at]
        return dataclasses.replace(example, id=f"{name}/{example.id}")

    def texts(self) -> Iterator[str]:
        """All texts, for a tokenizer."""
        for source in self.sources.values():
            yield from source.texts()


def open_sources(config: DataConfig) -> Sources:
    """Opens (for the demo set: prepares, where it is not there yet) what a configuration names.

    Raises:
      UserError: a needed path is not given.
    """
    if config.source == "demo":
        sizes = None
        if config.demo_train_images:
            sizes = {**demo.DEFAULT_SIZES, "train": config.demo_train_images}
        return Sources(config, demo.prepare(Path(config.data_dir).expanduser(), sizes=sizes))
    if config.source == "mixture":
        if not config.mixture:
            raise UserError("no data: give --config.data.mixture='[{\"name\": ..., ...}]'")
    elif not (config.train_json or config.validation_json or config.test_json):
        raise UserError("no data: give --config.data.train_json=FILE (LLaVA-style JSON or JSONL)")
    return Sources(config)


def open_tokenizer(sources: Sources, workdir: Path, given: Path | None = None) -> Tokenizer:
    """The run's tokenizer, kept in its work folder so that a checkpoint is never without.

    Taken from `data.tokenizer` if given, else the one of the model that the run begins from, else
    the demo set's, else trained on the training split's text.
    """
    if not any((workdir / name).is_file() for name in (JSON_FILE, MODEL_FILE)):
        config = sources.config
        if config.tokenizer:
            given = Tokenizer(Path(config.tokenizer).expanduser()).path  # checked before it is kept
        elif given is None and sources.demo_dir is not None:
            given = sources.demo_dir / demo.TOKENIZER_FILE
        if given is not None:
            keep_tokenizer(given, workdir)
        else:
            train = sources.open("train")
            cap = max(config.max_image_height, config.max_image_width)
            side = min(largest_side(train), cap)
            train_sentencepiece(
                train.texts(),
                workdir / MODEL_FILE,
                config.tokenizer_vocab,
                max_coordinate=-(-side // 2),
            )
    return Tokenizer(workdir)


def keep_tokenizer(given: Path, workdir: Path) -> Path:
    """Copies a tokenizer's file into a folder, with what beside it says what ends a text."""
    is_json = isinstance(open_vocabulary(given), JsonVocabulary)
    beside = given.with_name(CONFIG_FILE)
    if beside.is_file():
        _copy(beside, workdir / CONFIG_FILE)
    kept = workdir / (JSON_FILE if is_json else MODEL_FILE)
    _copy(given, kept)
    return kept


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    partial.replace(target)
