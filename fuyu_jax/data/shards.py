"""Prepared sets on disk: ArrayRecord shards of whole examples, each with a sidecar of lengths.

A folder holds `NAME-00000-of-00008.array_record` (records: `encode`), a `.lengths.npz` beside each
(`Sidecar`), and, written last, `info.json`: without it a set is unfinished.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Bool, Float32, Int32, Int64

from fuyu_jax.data.example import BadImageError, Example, Image, Text
from fuyu_jax.data.outline import Outliner
from fuyu_jax.data.sources.base import Source
from fuyu_jax.errors import UserError
from fuyu_jax.tokenizer import Tokenizer

VERSION = 1
INFO_FILE = "info.json"
# Images are compressed already; a group of one is what random access needs.
_WRITER = "group_size:1,uncompressed"
_READER = "readahead_buffer_size:0,max_parallelism:0"
_HEAD = struct.Struct("<I")


# --- Records ---


def encode(example: Example) -> tuple[bytes, list[int]]:
    """An example as one record (the length of a JSON head, the head, the images as they were), and
    the lengths of its images.

    Raises:
      BadImageError: one of its images cannot be read.
      UserError: its info holds what JSON cannot.
    """
    segments: list[list[Any]] = []
    images = []
    for segment in example.segments:
        if isinstance(segment, Text):
            segments.append([segment.text, int(segment.train), int(segment.plain)])
        elif isinstance(segment, Image):
            images.append(segment.read())
            size = segment.height, segment.width
            segments.append([segment.name, *size, len(images[-1])])
        else:
            kind = type(segment).__name__
            raise UserError(f"example {example.id}: {kind} cannot be kept in a prepared set")
    head = {"id": example.id, "segments": segments}
    if example.info:
        head["info"] = _plain(example)
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":"))
    data = text.encode("utf-8", "surrogatepass")
    return b"".join([_HEAD.pack(len(data)), data, *images]), [len(i) for i in images]


def _plain(example: Example) -> dict[str, Any]:
    try:
        text = json.dumps(example.info, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"example {example.id}: its info is not plain JSON ({error})") from None
    if json.loads(text) != example.info:
        raise UserError(f"example {example.id}: its info changes when it is kept as JSON")
    return example.info


def decode(record: bytes) -> Example:
    """The example that `encode` made a record of."""
    (length,) = _HEAD.unpack_from(record)
    at = _HEAD.size + length
    head = json.loads(record[_HEAD.size : at].decode("utf-8", "surrogatepass"))
    segments: list[Text | Image] = []
    for segment in head["segments"]:
        if len(segment) == 3:
            text, train, plain = segment
            segments.append(Text(text, bool(train), bool(plain)))
        else:
            name, height, width, size = segment
            segments.append(Image(record[at : at + size], height, width, name))
            at += size
    return Example(head["id"], tuple(segments), head.get("info", {}))


# --- Sidecars ---


@dataclass(frozen=True)
class Sidecar:
    """What a shard's n records with m images hold, without opening them.

    index: of each record in the source it came from. starts: images of record i are
    `starts[i]..starts[i + 1]`. sizes: height and width. image_bytes, text_bytes, record_bytes:
    lengths. difficulty: what the source says; not a number where it says nothing. text_tokens,
    varies: as in `Outline`; both None without a tokenizer. ids, bad, about: see `read`.
    """

    index: Int64[np.ndarray, "n"]
    starts: Int64[np.ndarray, "n1"]
    sizes: Int32[np.ndarray, "m 2"]
    image_bytes: Int64[np.ndarray, "m"]
    text_bytes: Int64[np.ndarray, "n"]
    record_bytes: Int64[np.ndarray, "n"]
    difficulty: Float32[np.ndarray, "n"]
    text_tokens: Int32[np.ndarray, "n"] | None
    varies: Bool[np.ndarray, "n"] | None
    ids: list[str]
    bad: list[list[str]]  # id and reason of each that could not be read
    about: dict[str, Any]  # version, plan, records, bytes, empty

    def dumps(self) -> bytes:
        """An .npz file, the same bytes for the same contents."""
        arrays = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | dict):
                text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
                value = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
            if value is not None:
                arrays[field.name] = value
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def loads(cls, data: bytes, where: str | Path) -> "Sidecar":
        """What `dumps` wrote.

        Raises:
          UserError: broken, or of another version.
        """
        try:
            with np.load(io.BytesIO(data)) as found:
                fields = {f.name: found.get(f.name) for f in dataclasses.fields(cls)}
            for name in ("ids", "bad", "about"):
                fields[name] = json.loads(fields[name].tobytes().decode("utf-8", "surrogatepass"))
            if fields["about"]["version"] != VERSION:
                raise ValueError(f"version {fields['about']['version']}, not {VERSION}")
            return cls(**fields)
        except Exception as error:  # a file can be broken in many ways
            raise UserError(
                f"{where}: no lengths of a prepared set ({type(error).__name__}: {error}); "
                "remove it and prepare again"
            ) from None


def shard_names(name: str, shards: int) -> list[str]:
    """Of the record files; `sidecar_name` gives the file beside each."""
    return [f"{name}-{k:05d}-of-{shards:05d}.array_record" for k in range(shards)]


def sidecar_name(shard: str) -> str:
    return shard.removesuffix(".array_record") + ".lengths.npz"


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of its file: another one counts other tokens."""
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


# --- Writing a shard ---


def write_records(
    path: Path,
    source: Source,
    indices: Iterable[int],
    plan: str,
    tokenizer: Tokenizer | None = None,
    check: str = "header",
) -> Sidecar:
    """Writes a source's examples as one file of records; those that cannot be read are left out.

    Examples without segments are left out and counted. The same input gives the same bytes.

    Args:
      path: the file.
      source, indices: which examples.
      plan: what the shard belongs to, kept in `about`.
      tokenizer: counts the tokens of texts.
      check: "header", or "decode" to leave out images that do not decode too.
    """
    lines: list[tuple[int, int, int, float]] = []  # index, text bytes, record bytes, difficulty
    counts, sizes, image_bytes = [0], [], []
    ids, bad, empty = [], [], 0
    outliner = Outliner(tokenizer) if tokenizer else None
    with _failures_told(path):
        writer = ArrayRecordWriter(str(path), _WRITER)
    try:
        for index in indices:
            try:
                example = source[index]
                record, lengths = encode(example)
                if check == "decode":
                    for image in decode(record).images:
                        image.decode()
            except BadImageError as error:
                bad.append([source.id(index), str(error)])
                continue
            if not example.segments:
                empty += 1
                continue
            with _failures_told(path):
                writer.write(record)
            texts = (s.text for s in example.segments if isinstance(s, Text))
            text_bytes = sum(len(t.encode("utf-8", "surrogatepass")) for t in texts)
            difficulty = example.info.get("difficulty", np.nan)
            lines.append((index, text_bytes, len(record), difficulty))
            ids.append(example.id)
            counts.append(len(example.images))
            sizes += [(i.height, i.width) for i in example.images]
            image_bytes += lengths
            if outliner is not None:
                outliner.add(example)
    finally:
        with _failures_told(path):
            writer.close()
    outline = outliner.done() if outliner is not None else None
    columns = list(zip(*lines, strict=True)) or [()] * 4
    with path.open("rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return Sidecar(
        index=np.asarray(columns[0], np.int64),
        starts=np.cumsum(counts).astype(np.int64),
        sizes=np.asarray(sizes, np.int32).reshape(-1, 2),
        image_bytes=np.asarray(image_bytes, np.int64),
        text_bytes=np.asarray(columns[1], np.int64),
        record_bytes=np.asarray(columns[2], np.int64),
        difficulty=np.asarray(columns[3], np.float32),
        text_tokens=None if outline is None else outline.text_tokens,
        varies=None if outline is None else outline.varies,
        ids=ids,
        bad=bad,
        about={
            "version": VERSION,
            "plan": plan,
            "records": len(ids),
            "bytes": size,
            "empty": empty,
        },
    )


@contextlib.contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    """A full disk, mostly."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition(";")[0].splitlines()[0]
        raise UserError(f"{path.parent}: a shard cannot be written ({reason})") from None


def open_records(path: str | Path) -> Any:
    """A reader of a shard that uses no thread of its own."""
    return ArrayRecordReader(str(path), _READER)
