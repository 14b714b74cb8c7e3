"""Makes the demo set and its tokenizer on disk, once."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from fuyu_jax.data.demo.builder import DEFAULT_SIZES, ShapesAndWords
from fuyu_jax.data.demo.scenes import COLOURS, SHAPES

TOKENIZER_FILE = "tokenizer.model"
_SETTINGS_FILE = "settings.json"
_TOKENIZER_RECORDS = 8_000  # more text than this changes no piece


def prepare(
    data_dir: str | os.PathLike[str],
    *,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    vocab_size: int = 512,
) -> Path:
    """The directory of the demo set with these settings, made first where it is not there.

    It is built beside its place and moved there whole, so a directory that exists is complete.
    """
    settings = {
        "version": str(ShapesAndWords.VERSION),
        "sizes": dict(DEFAULT_SIZES if sizes is None else sizes),
        "seed": seed,
        "vocab_size": vocab_size,
    }
    text = json.dumps(settings, indent=2, sort_keys=True)
    final = Path(data_dir) / f"demo-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        _build(partial, settings["sizes"], seed, vocab_size)
        (partial / _SETTINGS_FILE).write_text(text + "\n")
        partial.chmod(0o755)  # mkdtemp's directory is for its owner alone
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():  # otherwise another process was faster with the same set
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def load(directory: str | os.PathLike[str], split: str) -> Sequence[dict[str, Any]]:
    """A split of a prepared set for random access; images stay encoded PNG bytes."""
    builder = tfds.builder_from_directory(_records_dir(Path(directory)))
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def turns(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Family, question and answer of each turn of a record."""
    columns = (record["turns"][name] for name in ("family", "question", "answer"))
    for cells in zip(*columns, strict=True):
        yield tuple(_text(cell) for cell in cells)


def _build(directory: Path, sizes: Mapping[str, int], seed: int, vocab_size: int) -> None:
    from fuyu_jax.tokenizer import train_sentencepiece  # only here: reading the set needs none

    with tqdm(total=sum(sizes.values()), desc="drawing the demo set", unit="image") as bar:
        builder = ShapesAndWords(sizes=sizes, seed=seed, progress=bar.update, data_dir=directory)
        tfds.disable_progress_bar()
        try:
            # TFDS announces a download and names the directory that is about to be moved.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
        finally:
            tfds.enable_progress_bar()
    shutil.rmtree(directory / "downloads", ignore_errors=True)  # TFDS makes it, empty
    # Questions come from templates: a template's words in one piece halve a row's text, while
    # what is asked for stays a word of its own.
    train_sentencepiece(
        _training_text(directory),
        directory / TOKENIZER_FILE,
        vocab_size,
        phrases=True,
        words=(*COLOURS, *SHAPES),
    )


def _training_text(directory: Path) -> Iterator[str]:
    source = load(directory, "train")
    for index in range(min(len(source), _TOKENIZER_RECORDS)):
        for _, question, answer in turns(source[index]):
            yield question
            yield answer


def _records_dir(directory: Path) -> Path:
    return directory / ShapesAndWords.name / str(ShapesAndWords.VERSION)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
