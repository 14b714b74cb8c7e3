"""Cleaning in a run: the training split of every source, done once and remembered.

What the rules find is a function of the sources and of the rules, so every host comes to the same,
and a work folder keeps it: a run that is taken up again decodes nothing.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fuyu_jax.config import CleaningConfig, DataConfig, digest
from fuyu_jax.data.cleaning import RULES, CleaningReport, clean
from fuyu_jax.data.cleaning.apply import write_whole
from fuyu_jax.data.lengths import BadExamples
from fuyu_jax.data.sources.base import Source
from fuyu_jax.errors import UserError

CACHE_FILE = "cleaning.npz"
EXAMPLES_FILE = "cleaned_examples.jsonl"
_VERSION = 1  # of what the rules mean


@dataclass(frozen=True)
class Uncleaned:
    """A source and its rules; `about`: what else decides its examples, as JSON can hold it."""

    name: str
    source: Source
    rules: CleaningConfig
    about: Any

    def key(self) -> str:
        """Of rules, ids, and size and time of the source's own files (not of its images)."""
        ids = hashlib.sha256()
        for index in range(len(self.source)):
            id = self.source.id(index)
            ids.update(f"{len(id)} {id};".encode("utf-8", "surrogatepass"))
        paths = getattr(self.source, "paths", None) or [getattr(self.source, "path", None)]
        files = [p.stat() for p in paths if isinstance(p, Path) and p.is_file()]
        return digest(
            {
                "version": _VERSION,
                "rules": dataclasses.asdict(self.rules),
                "about": self.about,
                "examples": len(self.source),
                "ids": ids.hexdigest(),
                "files": [(f.st_size, f.st_mtime_ns) for f in files],
            }
        )


@dataclass(frozen=True)
class Cleaned:
    """What the rules found in one source; no report where all its rules are off."""

    name: str
    key: str = ""
    report: CleaningReport | None = None


def clean_all(
    sources: Sequence[Uncleaned], config: DataConfig, folder: Path, *, progress: bool = True
) -> tuple[Cleaned, ...]:
    """Applies every source's own rules, or takes what `folder` remembers of the same.

    Raises:
      UserError: a rule's value that means nothing, a source of which nothing stays.
      TrainingStoppedError: more examples are unreadable than the run allows, as when a disk is
        not there; nothing is remembered then.
    """
    for one in sources:
        shared = one.rules == config.cleaning
        one.rules.check("data.cleaning." if shared else f'source "{one.name}": cleaning.')
    known = _remembered(folder / CACHE_FILE)
    bad = BadExamples.under(config, sum(len(one.source) for one in sources), quiet=True)
    several = len(sources) > 1
    found = []
    for one in sources:
        if not one.rules.on:
            found.append(Cleaned(one.name))
            continue
        key = one.key()
        if (report := known.get(key)) is None:
            label = f"{one.name}/" if several else ""
            report = clean(
                one.source,
                one.rules,
                progress=progress,
                unreadable=lambda id, reason, label=label: bad.add(label + id, reason),
            )
        if not len(report.kept):
            raise UserError(
                f'source "{one.name}": cleaning leaves none of its {len(one.source)} examples '
                f"({_counts(report.counts)}); loosen data.cleaning"
            )
        found.append(Cleaned(one.name, key, report))
    return tuple(found)


def keep_cleaned(found: Sequence[Cleaned], folder: Path) -> None:
    """Names every example left out in `cleaned_examples.jsonl`, and remembers what was found.

    Raises:
      UserError: the folder cannot be written.
    """
    reports = {one.name: (one.key, one.report) for one in found if one.report is not None}
    if not reports:
        return
    lines = (
        line
        for name, (_, report) in reports.items()
        for line in report.lines(f"{name}/" if len(found) > 1 else "")
    )
    write_whole(folder / EXAMPLES_FILE, lines)
    about = [
        {"key": key, "rules": dataclasses.asdict(report.config), "examples": report.examples}
        for key, report in reports.values()
    ]
    arrays = {f"kept{at}": report.kept for at, (_, report) in enumerate(reports.values())}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_whole(folder / CACHE_FILE, [file.getvalue()])


def _remembered(path: Path) -> dict[str, CleaningReport]:
    """Reports by key; none where there is no file, or not a whole one of ours."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            return {
                one["key"]: CleaningReport(
                    file[f"kept{at}"].astype(np.int64),
                    {rule: [(i, r) for i, r in one["examples"][rule]] for rule in RULES},
                    CleaningConfig(**one["rules"]),
                )
                for at, one in enumerate(about)
            }
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}


def as_line(found: Sequence[Cleaned]) -> str:
    """How many examples each rule left out; "" where all rules are off."""
    reports = {one.name: one.report for one in found if one.report is not None}
    if not reports:
        return ""
    counts = {rule: sum(r.counts[rule] for r in reports.values()) for rule in RULES}
    sizes = {k: (sum(r.counts.values()), len(r.kept)) for k, r in reports.items()}
    out, kept = (sum(column) for column in zip(*sizes.values(), strict=True))
    line = f"cleaning: {out} of {out + kept} training examples are left out ({_counts(counts)})"
    if len(found) > 1:
        line += "; " + ", ".join(f"{k} {o} of {o + n}" for k, (o, n) in sizes.items())
    return line


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{rule} {count}" for rule, count in counts.items())
