"""A prepared set: what `python -m fuyu_jax.data.prepare` writes."""

import functools
import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fuyu_jax.data.example import Example
from fuyu_jax.data.outline import Outline
from fuyu_jax.data.shards import (
    INFO_FILE,
    VERSION,
    Sidecar,
    decode,
    open_records,
    sidecar_name,
    tokenizer_digest,
)
from fuyu_jax.data.sources import common
from fuyu_jax.errors import UserError
from fuyu_jax.tokenizer import Tokenizer

_OPEN_SHARDS = 128  # in each process


class ArrayRecordSource:
    """Examples of a prepared set, the same as those of the source that it was prepared from.

    Opening reads `info.json` alone, an example one record. Shards are opened when they are needed,
    in each process anew, so a source can be pickled and outlives a fork.

    Args:
      folder: of the set.

    Raises:
      UserError: no such folder, an unfinished set, a shard that is missing or cut short.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.info = _read_info(self.folder)
        self.paths = [self.folder / shard["file"] for shard in self.info["shards"]]
        self._first = [0]  # of each shard, its first record
        for path, shard in zip(self.paths, self.info["shards"], strict=True):
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                reason = "no such file" if size is None else f"{size} bytes, not {shard['bytes']}"
                raise UserError(f"{path}: {reason}; prepare the set again")
            self._first.append(self._first[-1] + shard["records"])
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._readers: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_pid", "_lock", "_readers")
        return {k: v for k, v in self.__dict__.items() if k not in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return self._first[-1]

    def id(self, index: int) -> str:
        shard, at = self._place(index)
        return _ids(self.paths[shard])[at]

    def __getitem__(self, index: int) -> Example:
        shard, at = self._place(index)
        try:
            (record,) = self._reader(shard).read([at])
            return decode(record)
        except Exception as error:  # array_record's own kinds, and what a broken head gives
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.paths[shard]}, record {at}: broken ({reason})") from None

    def texts(self) -> Iterator[str]:
        """All texts, for a tokenizer; reads the images along with them."""
        for index in range(len(self)):
            yield from common.texts_of(self[index].segments)

    def outline(self, tokenizer: Tokenizer) -> Outline | None:
        """Lengths of all examples without reading one; None if counted by another tokenizer."""
        if self.info["settings"]["tokenizer"] != tokenizer_digest(tokenizer):
            return None
        sidecars = [_sidecar(path) for path in self.paths]
        starts = [np.zeros(1, np.int64)]
        for sidecar in sidecars:
            starts.append(sidecar.starts[1:] + starts[-1][-1])

        def joined(name: str) -> Any:
            return np.concatenate([getattr(sidecar, name) for sidecar in sidecars])

        return Outline(
            joined("text_tokens"),
            joined("varies"),
            np.concatenate(starts),
            joined("sizes"),
            joined("difficulty"),
        )

    def _place(self, index: int) -> tuple[int, int]:
        """The shard, and the record in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._first, index) - 1
        return shard, index - self._first[shard]

    def _reader(self, shard: int) -> Any:
        if self._pid != os.getpid():  # the lock may have been held at the fork
            self._begin()
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = open_records(self.paths[shard])
                if len(self._readers) > _OPEN_SHARDS:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard)
            return self._readers[shard]


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_FILE
    try:
        info = json.loads(path.read_bytes())
        if info["version"] != VERSION:
            raise UserError(
                f"{path}: version {info['version']} of prepared sets, not {VERSION}; "
                "prepare the set again"
            )
        if not isinstance(info["shards"], list) or "tokenizer" not in info["settings"]:
            raise KeyError("shards")
        return info
    except OSError:
        what = "not finished, or no prepared set" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: {what}; run python -m fuyu_jax.data.prepare SOURCE {folder}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not that of a prepared set; give its folder") from None


def _sidecar(path: Path) -> Sidecar:
    beside = path.with_name(sidecar_name(path.name))
    try:
        return Sidecar.loads(beside.read_bytes(), beside)
    except OSError as error:
        raise UserError(f"{beside}: {error.strerror or error}; prepare the set again") from None


@functools.lru_cache(maxsize=256)
def _ids(path: Path) -> list[str]:
    return _sidecar(path).ids
