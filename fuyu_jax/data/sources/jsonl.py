"""Documents in JSON Lines: what plain text and interleaved documents have in common."""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fuyu_jax.data.example import Example, Text
from fuyu_jax.data.sources import common
from fuyu_jax.errors import UserError

Piece = str | Path  # a text, or an image's file


class DocumentSource:
    """Documents of JSON Lines files, one a line; texts are trained on as plain running text.

    Only where the lines begin is kept in memory (16 bytes a line); a line is read and checked when
    it is asked for. With a limit every line is read once at the start, to know into how many
    examples it goes. No file stays open, so a source can be pickled and outlives a fork.

    An id is `FILE:LINE`, which no other has, then `:ID` where the record has one and `/PART` where
    the document is split; FILE is the file's name without its ending, `#2` where that comes again.

    Args:
      files: path, `part-{00..12}.jsonl`, glob, or a list of these.
      max_images: a document with more is split into examples that follow one another; 0: never.
      max_chars: the same for characters of text. Texts are cut at spaces (within a word only where
        a word is longer), and nothing is lost. `split_documents` of them were split.

    Raises:
      UserError: a file is missing or holds no line; a limit below 0; with a limit also what
        `__getitem__` finds.
    """

    def __init__(self, files: common.Patterns, max_images: int = 0, max_chars: int = 0):
        self.paths = common.expand(files, "JSON Lines files")
        for name, limit in (("max_images", max_images), ("max_chars", max_chars)):
            if limit < 0:
                raise UserError(f"{name}={limit}: give 1 or more, or 0 for no limit")
        self.max_images, self.max_chars = max_images, max_chars
        self._names, _ = common.unique(path.stem for path in self.paths)
        self._first = [0]  # of each file, its first line's place in the arrays
        self._offsets, self._numbers = array("q"), array("q")
        for path in self.paths:
            self._scan(path)
            self._first.append(len(self._offsets))
        if not self._offsets:
            raise UserError(f"{self.paths[0]}: no line in it; give JSON Lines")
        self.split_documents = 0
        self._parts: array | None = None
        if max_images or max_chars:
            self._count_parts()

    def __len__(self) -> int:
        return len(self._offsets) if self._parts is None else len(self._parts) // 2

    def id(self, index: int) -> str:
        line, part = self._place(index)
        record, _ = self._record(line)
        return self._id(record, line, part)

    def __getitem__(self, index: int) -> Example:
        line, part = self._place(index)
        record, where = self._record(line)
        parts = split(self.pieces(record, where), self.max_images, self.max_chars)
        if part >= len(parts):
            raise UserError(f"{where}: changed since the start; begin anew")
        segments = tuple(
            common.opened(p) if isinstance(p, Path) else Text(p, train=True, plain=True)
            for p in parts[part]
        )
        info: dict[str, Any] = {"family": common.family(record)}
        if len(parts) > 1:
            info |= {"part": part, "parts": len(parts)}
        return Example(self._id(record, line, part), segments, info)

    def texts(self) -> Iterator[str]:
        """All texts, for a tokenizer."""
        for line in range(len(self._offsets)):
            pieces = self.pieces(*self._record(line))
            yield from (piece for piece in pieces if isinstance(piece, str))

    def pieces(self, record: dict[str, Any], where: str) -> list[Piece]:
        """A record's texts and image files in order.

        Raises:
          UserError: malformed, with `where` in front.
        """
        raise NotImplementedError

    def _scan(self, path: Path) -> None:
        at = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(at)
                    self._numbers.append(number)
                at += len(line)

    def _count_parts(self) -> None:
        self._parts = array("q")
        for line in range(len(self._offsets)):
            pieces = self.pieces(*self._record(line))
            count = len(split(pieces, self.max_images, self.max_chars))
            self.split_documents += count > 1
            for part in range(count):
                self._parts.extend((line, part))

    def _place(self, index: int) -> tuple[int, int]:
        """Which line, and which part of it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._parts is None:
            return index, 0
        return self._parts[2 * index], self._parts[2 * index + 1]

    def _file(self, line: int) -> int:
        return bisect_right(self._first, line) - 1

    def _record(self, line: int) -> tuple[dict[str, Any], str]:
        path = self.paths[self._file(line)]
        where = f"{path}, line {self._numbers[line]}"
        try:
            with path.open("rb") as file:
                file.seek(self._offsets[line])
                data = file.readline()
        except OSError as error:
            raise UserError(f"{where}: {error.strerror or error}") from None
        return common.read_json(data, where), where

    def _id(self, record: dict[str, Any], line: int, part: int) -> str:
        id = f"{self._names[self._file(line)]}:{self._numbers[line]}"
        if record.get("id") is not None:
            id += f":{record['id']}"
        return f"{id}/{part}" if part else id


def split(pieces: Sequence[Piece], max_images: int, max_chars: int) -> list[list[Piece]]:
    """Cuts a document into parts within both limits (0: none); their sum is the document.

    Images that stand right before a text go with it into the next part. A document without any
    piece is one part.
    """
    parts: list[list[Piece]] = [[]]
    images = chars = 0
    for piece in pieces:
        if isinstance(piece, Path):
            if max_images and images == max_images:
                parts.append([])
                images = chars = 0
            parts[-1].append(piece)
            images += 1
            continue
        while piece:
            room = max_chars - chars if max_chars else len(piece)
            cut = len(piece) if len(piece) <= room else _last_space(piece, room)
            if not cut and chars:  # not one word more: a new part
                carried = _take_images(parts[-1])
                parts.append(carried)
                images, chars = len(carried), 0
                continue
            cut = cut or room  # a word longer than a part
            parts[-1].append(piece[:cut])
            chars += cut
            piece = piece[cut:]
    return parts


def _last_space(text: str, room: int) -> int:
    """Where to cut so that at most `room` characters stay: before a space; 0 for nowhere."""
    return next((at for at in range(room, 0, -1) if text[at].isspace()), 0)


def _take_images(part: list[Piece]) -> list[Piece]:
    at = len(part)  # a text is in front of them
    while isinstance(part[at - 1], Path):
        at -= 1
    taken = part[at:]
    del part[at:]
    return taken
