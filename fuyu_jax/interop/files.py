"""What goes with weights: the files of a folder, what is remembered of them, and writing a folder
that is whole or not there."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fuyu_jax.checkpoint import CHECKPOINTS
from fuyu_jax.errors import UserError
from fuyu_jax.interop.tensors import DTYPES, NAMES
from fuyu_jax.vocabulary import JSON_FILE, MODEL_FILE

KEPT = "hf"  # of a work folder: what came with the weights
ORIGIN_FILE = "origin.json"
TOKENIZER_FILES = (JSON_FILE, "tokenizer_config.json", MODEL_FILE)
_TOKENIZER_PARTS = (
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
_OTHERS = ("preprocessor_config.json", "processor_config.json", "generation_config.json")


class Origin(NamedTuple):
    """What a work folder remembers of the folder that its weights came from.

    text_type: model type of the text model. fuyu: it had a patch projection. extended: image
    tokens were added to its vocabulary. dtype: of most tensors, as files name it; others: of the
    rest, by newest names. config: its config.json.
    """

    text_type: str
    fuyu: bool
    extended: bool
    image_token_id: int | None
    dtype: str
    others: dict[str, str]
    config: dict[str, Any]

    def dtype_of(self, name: str) -> np.dtype:
        """The type that a tensor had, under its Fuyu or its text model's name."""
        text = name.replace("model.language_model.", "model.")
        return DTYPES[self.others.get(name, self.others.get(text, self.dtype))]


def keep_files(source: Path, workdir: Path, origin: Origin) -> list[str]:
    """Copies tokenizer, processor and config files into `workdir/hf`; returns their names."""
    kept = workdir / KEPT
    kept.mkdir(parents=True)
    names = [n for n in (*_TOKENIZER_PARTS, *_OTHERS) if (source / n).is_file()]
    for name in names:
        shutil.copyfile(source / name, kept / name)
    (kept / ORIGIN_FILE).write_text(json.dumps(origin._asdict(), indent=2) + "\n")
    return names


def kept_files(workdir: Path, *, tokenizer: bool) -> list[Path]:
    """Files of `workdir/hf` that go back, with or without those of the tokenizer."""
    names = (*_TOKENIZER_PARTS, *_OTHERS) if tokenizer else _OTHERS
    return [workdir / KEPT / n for n in names if (workdir / KEPT / n).is_file()]


def read_origin(workdir: Path) -> Origin | None:
    """What a work folder remembers; None for a model that began here."""
    file = workdir / KEPT / ORIGIN_FILE
    if not file.is_file():
        return None
    try:
        return Origin(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def copy_origin(source: Path, workdir: Path) -> None:
    """Hands what a work folder remembers of its weights on to a run that begins from it."""
    if (source / KEPT).is_dir() and not (workdir / KEPT).exists():
        shutil.copytree(source / KEPT, workdir / KEPT)


def origin_dtypes(dtypes: dict[str, np.dtype]) -> tuple[str, dict[str, str]]:
    """The commonest type, and the tensors that have another."""
    names = [NAMES[d] for d in dtypes.values()]
    common = max(sorted(set(names)), key=names.count)
    return common, {n: NAMES[d] for n, d in dtypes.items() if NAMES[d] != common}


def is_work_folder(path: Path) -> bool:
    """Whether a path is of train.py: a work folder, or a checkpoint in it."""
    if path.name == CHECKPOINTS or path.parent.name == CHECKPOINTS:
        return True
    return (path / CHECKPOINTS).is_dir()


@contextlib.contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end, or vanishes on an error.

    What a killed program leaves is named `TARGET.partialPID`, and no reader takes it.

    Raises:
      UserError: the target is there.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already there; give a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, target)  # an empty folder may stand there
    finally:
        shutil.rmtree(partial, ignore_errors=True)
