"""Folders of safetensors files: read as views of the mapped files, written one tensor at a time.

The format is eight bytes of length, a JSON header, raw little-endian data. The `safetensors`
library's NumPy side knows no bfloat16, slices only into copies and writes whole files from memory;
both directions here never hold more than one slab of one tensor, so they are written out.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from fuyu_jax.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHARD_BYTES = 5_000_000_000
_LONGEST_HEADER = 100_000_000  # as the library's own limit

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies: its file, type as the file names it, shape, and first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file.

    Raises:
      UserError: not a safetensors file, or cut off.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(source.read(length))
        header.pop("__metadata__", None)
        entries, last = {}, 8 + length
        for name, item in header.items():
            first, stop = item["data_offsets"]
            entry = Entry(file, item["dtype"], tuple(item["shape"]), 8 + length + first)
            kind, numbers = DTYPES.get(entry.dtype), math.prod(entry.shape)
            wanted = kind.itemsize * numbers if kind else stop - first
            if not 0 <= first <= stop or stop - first != wanted or min(entry.shape, default=0) < 0:
                raise ValueError(f"{name}: bytes {first} to {stop} are not those of its shape")
            entries[name] = entry
            last = max(last, 8 + length + stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a safetensors file ({error})") from None
    if last > size:
        raise UserError(f"{file}: cut off: {size} bytes of {last}; fetch it again")
    return entries


class TensorFolder:
    """All tensors of a folder by name, over one file or the files of an index.

    Raises:
      UserError: no safetensors there (pickles are named and refused), a file of the index that is
        missing, a tensor that is not where the index has it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        index = folder / INDEX_FILE
        if index.is_file():
            self._read_index(index)
            return
        files = [folder / SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else []
        files = files or sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(_nothing_to_read(folder))
        if len(files) > 1:
            raise UserError(f"{folder}: {len(files)} safetensors files and no {INDEX_FILE}")
        self.entries = read_header(files[0])

    def _read_index(self, index: Path) -> None:
        try:
            where = json.loads(index.read_text())["weight_map"]
            files = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index of safetensors files") from None
        for name in files:
            if Path(name).suffix in PICKLES:
                raise UserError(_nothing_to_read(self.folder))
            if Path(name).name != name or not (self.folder / name).is_file():
                raise UserError(f"{self.folder}: the index names {name}, which is not there")
            for tensor, entry in read_header(self.folder / name).items():
                if where.get(tensor) == name:
                    self.entries[tensor] = entry
        if missing := sorted(where.keys() - self.entries.keys()):
            raise UserError(f"{self.folder}: tensor {missing[0]} is not in {where[missing[0]]}")

    def open(self, name: str) -> np.ndarray:
        """A read-only view of a tensor: pages are read when touched, dropped when it is.

        Raises:
          UserError: a type other than float32, float16 and bfloat16.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.file}: tensor {name} is {entry.dtype}; weights are read as "
                f"{', '.join(DTYPES)}: unquantised files are needed"
            )
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, DTYPES[entry.dtype])
        return np.memmap(entry.file, DTYPES[entry.dtype], "r", entry.offset, entry.shape)


def _nothing_to_read(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        return (
            f"{folder}: its weights are pickles ({pickles[0]}), which run code when they are "
            "loaded, so they are not; save the model with transformers' "
            "save_pretrained(DIR) (safetensors) and give that folder"
        )
    return f"{folder}: no *.safetensors in it"


class Tensor(NamedTuple):
    """A tensor to be written; `slabs` gives its rows in order, some of them at a time."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    slabs: Callable[[], Iterable[np.ndarray]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _shards(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.bytes
    yield shard


def _write_file(file: Path, tensors: list[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        header[t.name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at + t.bytes],
        }
        at += t.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little"))
        sink.write(text)
        for t in tensors:
            begun = sink.tell()
            for slab in t.slabs():
                assert slab.dtype == t.dtype
                sink.write(np.ascontiguousarray(slab).reshape(-1).view(np.uint8).data)
            assert sink.tell() - begun == t.bytes, t.name
        sink.flush()
        os.fsync(sink.fileno())


def write_tensors(folder: Path, tensors: list[Tensor], limit: int = SHARD_BYTES) -> Mapping:
    """Writes tensors in order into files of at most `limit` bytes (or one tensor), the index last.

    Returns:
      The file of each tensor.
    """
    shards = list(_shards(tensors, limit))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        where |= dict.fromkeys((t.name for t in shard), name)
    if len(shards) > 1:
        total = sum(t.bytes for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return where
