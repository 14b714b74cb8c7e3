"""LLaVA-style JSON: `id, image, conversations[{from, value}]` with an image folder.

`<image>` stands anywhere in a text; `image` is a path or a list of paths (`images` is read too);
records without one are text-only. A file is a JSON list, or JSON Lines.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from fuyu_jax.data.example import Example, Image, Text, open_image
from fuyu_jax.errors import UserError

_ASKS = {"human", "user", "system"}
_ANSWERS = {"gpt", "assistant", "model"}
_IMAGE = re.compile(r"[ \t]*<image>\n?")


class LlavaSource:
    """Records of a LLaVA-style file.

    Args:
      path: the JSON or JSONL file.
      image_dir: where relative image paths begin; the file's own folder if empty.

    Raises:
      UserError: a missing or malformed file, or a record without its fields (named).
    """

    def __init__(self, path: str | Path, image_dir: str | Path = ""):
        self.path = Path(path).expanduser()
        self.image_dir = Path(image_dir).expanduser() if image_dir else self.path.parent
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; give a LLaVA-style JSON or JSONL file")
        if not self.image_dir.is_dir():
            raise UserError(f"image folder {self.image_dir}: no such folder")
        self.records = _read_records(self.path)
        for at, record in enumerate(self.records):
            _check(record, f"{self.path}, record {at}")
        seen: dict[str, int] = {}
        for at in range(len(self.records)):
            if (first := seen.setdefault(self.id(at), at)) != at:
                raise UserError(
                    f"{self.path}: records {first} and {at} have one id, {self.id(at)!r}"
                )

        @lru_cache(maxsize=4096)
        def opened(path: Path) -> Image:  # many records may share an image
            return open_image(path)

        self._open = opened

    def __len__(self) -> int:
        return len(self.records)

    def id(self, index: int) -> str:
        return str(self.records[index].get("id", index))

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        images = [self._open(self.image_dir / p) for p in _image_paths(record)]
        unused = list(images)
        segments: list[Text | Image] = []
        for turn in record["conversations"]:
            text = turn["value"]
            if turn["from"] in _ANSWERS:
                segments.append(Text(text, train=True))
                continue
            pieces = _IMAGE.split(text)
            for at, piece in enumerate(pieces):
                if at:
                    segments.append(unused.pop(0))
                if piece:
                    segments.append(Text(piece))
        # A record whose text never says `<image>` shows its images first.
        return Example(self.id(index), (*unused, *segments), {"family": _family(record)})

    def texts(self):
        """All texts, for a tokenizer."""
        for record in self.records:
            for turn in record["conversations"]:
                yield _IMAGE.sub("", turn["value"])

    def largest_side(self) -> int:
        """Of all images that can be read, in pixels."""
        sides = [1]
        for path in {p for r in self.records for p in _image_paths(r)}:
            try:
                image = self._open(self.image_dir / path)
            except ValueError:
                continue  # told when its example is met
            sides.append(max(image.height, image.width))
        return max(sides)


def _read_records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON or JSON Lines (line {error.lineno}: {error.msg})"
        ) from None


def _image_paths(record: dict[str, Any]) -> list[Any]:
    paths = record.get("image", record.get("images")) or []
    return list(paths) if isinstance(paths, list) else [paths]


def _family(record: dict[str, Any]) -> str:
    return str(record.get("family", record.get("subset", "all")))


def _check(record: Any, where: str) -> None:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise UserError(f'{where}: no list "conversations"')
    where = f"{where} (id {record.get('id')!r})"
    for turn in record["conversations"]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise UserError(f'{where}: a turn has no text "value"')
        if turn.get("from") not in _ASKS | _ANSWERS:
            raise UserError(f'{where}: a turn is from {turn.get("from")!r}, not "human" or "gpt"')
    paths = _image_paths(record)
    if not all(isinstance(p, str) for p in paths):
        raise UserError(f'{where}: "image" is not a path or a list of paths')
    asked = [t["value"] for t in record["conversations"] if t["from"] in _ASKS]
    marks = sum(len(_IMAGE.findall(text)) for text in asked)
    if marks not in (0, len(paths)):
        raise UserError(f"{where}: {marks} <image> marks for {len(paths)} images")
    if marks == 0 and not asked and not paths:
        raise UserError(f"{where}: nothing is asked")
