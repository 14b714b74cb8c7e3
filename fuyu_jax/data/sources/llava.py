"""LLaVA-style JSON: `id, image, conversations[{from, value}]` with an image folder.

`<image>` stands anywhere in a text; `image` is a path or a list of paths (`images` is read too);
records without one are text-only. A file is a JSON list, or JSON Lines.
"""

import json
from pathlib import Path
from typing import Any

from fuyu_jax.data.example import Example
from fuyu_jax.data.sources.common import (
    IMAGE_MARK,
    check_turns,
    conversation,
    family,
    largest_side,
    opened,
    unique,
)
from fuyu_jax.errors import UserError


class LlavaSource:
    """Records of a LLaVA-style file.

    An id that comes again gets `#2`, `#3`, ... (`repeated_ids` of them).

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
        given = (at if r.get("id") is None else r["id"] for at, r in enumerate(self.records))
        self._ids, self.repeated_ids = unique(map(str, given))

    def __len__(self) -> int:
        return len(self.records)

    def id(self, index: int) -> str:
        return self._ids[index]

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        images = [opened(self.image_dir / p) for p in _image_paths(record)]
        segments = conversation(record["conversations"], images)
        return Example(self.id(index), segments, {"family": family(record)})

    def texts(self):
        """All texts, for a tokenizer."""
        for record in self.records:
            for turn in record["conversations"]:
                yield IMAGE_MARK.sub("", turn["value"])

    def largest_side(self) -> int:
        """Of all images that can be read, in pixels."""
        return largest_side(self)


def _read_records(path: Path) -> list[dict[str, Any]]:
    line = 0  # those before the text that is read
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        records = []
        # Not splitlines(): a text may hold other marks that end a line (U+2028).
        for one in text.split("\n"):
            if one.strip():
                records.append(json.loads(one))
            line += 1
        return records
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON or JSON Lines (line {line + error.lineno}: {error.msg})"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _image_paths(record: dict[str, Any]) -> list[Any]:
    paths = record.get("image", record.get("images")) or []
    return list(paths) if isinstance(paths, list) else [paths]


def _check(record: Any, where: str) -> None:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise UserError(f'{where}: no list "conversations"')
    where = f"{where} (id {record.get('id')!r})"
    paths = _image_paths(record)
    if not all(isinstance(p, str) for p in paths):
        raise UserError(f'{where}: "image" is not a path or a list of paths')
    check_turns(record["conversations"], len(paths), where)
