"""Parquet files as Hugging Face's `datasets` writes them, with the images' bytes in a column.

* An image column holds `{bytes, path}`, bytes, or a path; or a list of these. A path counts where
  there are no bytes, from the parquet file's folder.
* Texts: LLaVA's `conversations` of `{from, value}`; `texts` of `{user, assistant}`; `question` with
  `answer` or `answers`; `caption` or `text`. Of several answers or captions the first counts.

A caption is an answer; without any image the text is learnt as plain text.
"""

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuyu_jax.data.example import BadImageError, Example, Image, open_image
from fuyu_jax.data.sources import common
from fuyu_jax.errors import UserError, nearest

_IMAGES = ("image", "images")
_TALKS = ("conversations", "texts")
_ANSWERS = ("answer", "answers")
_CAPTIONS = ("caption", "text")
_FAMILIES = ("family", "subset")


class ParquetSource:
    """Rows of parquet files, by random access to row groups.

    A row group is read whole. Those last used are kept, up to `cache_bytes` in each process (and
    never fewer than one): an order that jumps about is slow where that holds few of them. Files
    with small row groups (`ParquetWriter(row_group_size=100)`) serve best. No file stays open.

    A row's id is its `id`, made unique by `#2`, `#3`, ... (`repeated_ids` of them), or else
    `FILE:ROW`. A row without text gives an example without segments, which no row of a batch takes.

    Args:
      files: path, `train-{00000..00012}.parquet`, glob, or a list of these.
      image, conversations, texts, question, answer, caption, id: columns; found by name where
        empty. Naming a column of texts leaves the others out.
      prompt: asked before captions.
      cache_bytes: memory for row groups.

    Raises:
      UserError: pyarrow is not there; a missing or broken file; a column that is not in each file.
    """

    def __init__(
        self,
        files: common.Patterns,
        *,
        image: str = "",
        conversations: str = "",
        texts: str = "",
        question: str = "",
        answer: str = "",
        caption: str = "",
        id: str = "",
        prompt: str = "",
        cache_bytes: int = 1 << 30,
    ):
        self.paths = common.expand(files, "parquet files")
        self.prompt, self.cache_bytes = prompt, cache_bytes
        if bool(question) != bool(answer):
            raise UserError('give "question" and "answer" columns together')
        given = {
            "image": image,
            "conversations": conversations,
            "texts": texts,
            "question": question,
            "answer": answer,
            "caption": caption,
            "id": id,
        }
        self._columns: dict[str, str] = {}
        self._groups: list[tuple[int, int]] = []  # file and row group
        self._first = [0]  # row of each group
        self._file_first = [0]
        for at, path in enumerate(self.paths):
            with _opened(path) as file:
                names = file.schema_arrow.names
                if not at:
                    self._columns = _choose(names, given, path)
                if missing := set(self._columns.values()) - set(names):
                    raise UserError(
                        f"{path}: no column {min(missing)!r}, which {self.paths[0]} has; "
                        "give files of one kind"
                    )
                for group in range(file.metadata.num_row_groups):
                    self._groups.append((at, group))
                    rows = file.metadata.row_group(group).num_rows
                    self._first.append(self._first[-1] + rows)
            self._file_first.append(self._first[-1])
        self._stems, _ = common.unique(path.stem for path in self.paths)
        self._ids, self.repeated_ids = self._read_ids()
        self._cache = _RowGroups(cache_bytes)

    def __len__(self) -> int:
        return self._first[-1]

    def id(self, index: int) -> str:
        if self._ids:
            return self._ids[index]
        file, row = self._file_row(index)
        return f"{self._stems[file]}:{row}"

    def __getitem__(self, index: int) -> Example:
        record, where = self._record(index, True)
        images = self._images(record.get("image"), index)
        info: dict[str, Any] = {"family": common.family(record)}
        if isinstance(answers := record.get("answer"), list):
            info["answers"] = [str(a) for a in answers]
        if turns := record.get("conversations"):
            common.check_turns(turns, len(images), where)
            segments = common.conversation(turns, images)
        else:
            segments = common.asked(images, _turns(record, where), self.prompt)
        return Example(self.id(index), segments, info)

    def texts(self) -> Iterator[str]:
        """All texts, for a tokenizer; reads no image."""
        for index in range(len(self)):
            record, where = self._record(index, False)
            if "conversations" not in record:
                for turn in _turns(record, where):
                    yield from (text for text in turn if text)
                continue
            for turn in record["conversations"] or []:
                if isinstance(turn, dict) and isinstance(turn.get("value"), str):
                    yield common.IMAGE_MARK.sub("", turn["value"])
        if self.prompt:
            yield self.prompt

    def _file_row(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect_right(self._file_first, index) - 1
        return file, index - self._file_first[file]

    def _record(self, index: int, with_images: bool) -> tuple[dict[str, Any], str]:
        """A row by our names of its columns, and where it is."""
        file, row = self._file_row(index)
        group = bisect_right(self._first, index) - 1
        columns = {
            role: name for role, name in self._columns.items() if with_images or role != "image"
        }
        number = self._groups[group][1]
        table = self._cache.get(self.paths[file], number, tuple(dict.fromkeys(columns.values())))
        cells = table.slice(index - self._first[group], 1).to_pylist()[0]
        record = {role: cells[name] for role, name in columns.items()}
        if isinstance(record.get("conversations"), str):  # some sets hold JSON in a text
            record = {**record, **_json_turns(record["conversations"], self.paths[file], row)}
        return record, f"{self.paths[file]}, row {row}"

    def _images(self, cell: Any, index: int) -> list[Image]:
        file, row = self._file_row(index)
        path, column = self.paths[file], self._columns.get("image")
        images = []
        for at, value in enumerate(cell if isinstance(cell, list) else [cell]):
            if value is None:
                continue
            where = f"{path}, row {row}, {column!r}" + (f" {at}" if isinstance(cell, list) else "")
            encoded, name = value, ""
            if isinstance(value, dict):
                encoded, name = value.get("bytes"), value.get("path") or ""
                encoded = name if encoded is None else encoded
            if isinstance(encoded, str) and encoded:
                encoded, name = path.parent / encoded, encoded
            if not isinstance(encoded, bytes | Path):
                raise BadImageError(f"image {where}: neither bytes nor a path")
            images.append(open_image(encoded, f"{where} ({name})" if name else where))
        return images

    def _read_ids(self) -> tuple[list[str], int]:
        if (column := self._columns.get("id")) is None:
            return [], 0
        ids = []
        for path in self.paths:
            with _opened(path) as file:
                for cell in file.read([column], use_threads=False).column(0).to_pylist():
                    ids.append(str(len(ids) if cell is None else cell))
        return common.unique(ids)


class _RowGroups:
    """Row groups last used, in at most so many bytes; every process begins with none."""

    def __init__(self, limit: int):
        self.limit = limit
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, int]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["limit"])

    def get(self, path: Path, group: int, columns: tuple[str, ...]) -> Any:
        if self._pid != os.getpid():  # the lock may have been held at the fork
            self._begin()
        key = (path, group, columns)
        with self._lock:  # threads that want one row group read it once
            if key not in self._kept:
                with _opened(path) as file:
                    try:
                        table = file.read_row_group(group, list(columns), use_threads=False)
                    except (OSError, ValueError) as error:
                        reason = " ".join(str(error).split())
                        raise UserError(f"{path}, row group {group}: broken ({reason})") from None
                self._kept[key] = table
                while len(self._kept) > 1 and self.nbytes > self.limit:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._kept.values())


def _opened(path: Path) -> Any:
    """The file, for a `with`.

    Raises:
      UserError: no pyarrow, or not a parquet file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs pyarrow; pip install 'fuyu-jax[parquet]'"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a parquet file, or broken ({reason})") from None


def _choose(names: list[str], given: dict[str, str], path: Path) -> dict[str, str]:
    """Our names of the columns to theirs; of texts only the first kind that is there."""
    for role, name in given.items():
        if name and name not in names:
            raise UserError(f'{path}: no column "{name}" to take as {role}{nearest(name, names)}')

    def find(role: str, *candidates: str) -> dict[str, str]:
        name = given[role] or next((c for c in candidates if c in names), "")
        return {role: name} if name else {}

    columns = find("image", *_IMAGES) | find("id", "id")
    columns |= {name: name for name in _FAMILIES if name in names}
    kinds = ({"conversations"}, {"texts"}, {"question", "answer"}, {"caption"})
    named = [kind for kind in kinds if any(given[role] for role in kind)]
    known = {"conversations": _TALKS[:1], "texts": _TALKS[1:], "question": ("question",)}
    known |= {"answer": _ANSWERS, "caption": _CAPTIONS}
    for kind in named or kinds:
        found = {}
        for role in sorted(kind):
            found |= find(role, *known[role])
        if found.keys() == kind:
            return columns | found
    raise UserError(
        f"{path}: no column of texts ({', '.join(names)}); name one, as question and answer or "
        "caption"
    )


def _json_turns(text: str, path: Path, row: int) -> dict[str, Any]:
    wrapped = b'{"conversations":' + text.encode() + b"}"
    return common.read_json(wrapped, f'{path}, row {row}, "conversations"')


def _turns(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    if "texts" not in record:
        return common.record_turns(record, where) or []
    turns = record["texts"] or []
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and isinstance(t.get("user"), str | None) and "assistant" in t
        for t in turns
    ):
        raise UserError(f'{where}: "texts" is not a list of {{user, assistant}}')
    return [(t.get("user") or "", common.first_text(t["assistant"], where)) for t in turns]
