"""What several sources share: file patterns, ids, and how a record's fields become segments."""

import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from fuyu_jax.data.example import BadImageError, Image, Text, open_image
from fuyu_jax.errors import UserError

ASKS = {"human", "user", "system"}
ANSWERS = {"gpt", "assistant", "model"}
IMAGE_MARK = re.compile(r"[ \t]*<image>\n?")
_BRACES = re.compile(r"\{([^{}]*)\}")

Patterns = str | Path | Sequence[str | Path]


# --- Files ---


def expand(patterns: Patterns, what: str) -> list[Path]:
    """The files of a path, a `{000..012}` or `{a,b}` pattern, a glob, or a list of these.

    Those of a glob come in order of name, the others as written.

    Args:
      patterns: what the user gave.
      what: kind of file, for messages.

    Raises:
      UserError: one that matches no file, or one file twice.
    """
    given = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    files: list[Path] = []
    for pattern in given:
        # A file may be called like a pattern.
        plain = Path(pattern).expanduser()
        for name in [str(plain)] if plain.is_file() else _braces(str(plain)):
            found = [Path(name)] if Path(name).is_file() else sorted(map(Path, glob.glob(name)))
            found = [path for path in found if path.is_file()]
            if not found:
                raise UserError(f"{name}: no such file; give {what} (a path, glob or {{00..99}})")
            files += found
    if not files:
        raise UserError(f"no files given; give {what} (a path, glob or {{00..99}})")
    seen: set[Path] = set()
    for path in files:
        if path in seen:
            raise UserError(f"{path}: given twice; leave one out")
        seen.add(path)
    return files


def _braces(pattern: str) -> Iterator[str]:
    pieces = _BRACES.split(pattern)  # outside, inside, outside, ...
    choices = [[p] if at % 2 == 0 else _choices(p) for at, p in enumerate(pieces)]
    for chosen in product(*choices):
        yield "".join(chosen)


def _choices(inside: str) -> list[str]:
    if run := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = run.groups()
        step = 1 if int(first) <= int(last) else -1
        width = len(first) if first.startswith("0") else 0
        return [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def read_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: it is none, with `where` in front.
    """
    try:
        record = json.loads(data)
    except ValueError as error:  # bad UTF-8 is one too
        reason = getattr(error, "msg", None) or str(error)
        raise UserError(f"{where}: not JSON ({reason}); mend or remove it") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: JSON, but no object {{...}}; give one object for each record")
    return record


# --- Ids ---


def unique(ids: Iterable[str]) -> tuple[list[str], int]:
    """Ids made unique, a repeated one by `#2`, `#3`, ...; and how many had to be changed."""
    seen: dict[str, int] = {}
    result, changed = [], 0
    for id in ids:
        new, count = id, seen.get(id, 0) + 1
        while count > 1 and (new := f"{id}#{count}") in seen:
            count += 1
        seen[id] = count
        if new != id:
            changed += 1
            seen[new] = 1
        result.append(new)
    return result, changed


# --- Segments ---


@lru_cache(maxsize=4096)  # many records may share an image
def opened(path: Path) -> Image:
    """The image at a path, remembered.

    Raises:
      BadImageError: missing, or not an image.
    """
    return open_image(path)


def family(record: dict[str, Any]) -> str:
    return str(record.get("family", record.get("subset", "all")))


def check_turns(turns: Any, images: int, where: str) -> None:
    """Checks LLaVA's `conversations` against a number of images.

    Raises:
      UserError: with `where` in front.
    """
    if not isinstance(turns, list):
        raise UserError(f'{where}: no list "conversations"')
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise UserError(f'{where}: a turn has no text "value"')
        if turn.get("from") not in ASKS | ANSWERS:
            raise UserError(f'{where}: a turn is from {turn.get("from")!r}, not "human" or "gpt"')
    asked = [t["value"] for t in turns if t["from"] in ASKS]
    marks = sum(len(IMAGE_MARK.findall(text)) for text in asked)
    if marks not in (0, images):
        raise UserError(f"{where}: {marks} <image> marks for {images} images")
    if marks == 0 and not asked and not images:
        raise UserError(f"{where}: nothing is asked")


def conversation(
    turns: Sequence[dict[str, str]], images: Sequence[Image]
) -> tuple[Text | Image, ...]:
    """Checked turns with their images: where `<image>` stands, or else before all text."""
    unused = list(images)
    segments: list[Text | Image] = []
    for turn in turns:
        if turn["from"] in ANSWERS:
            segments.append(Text(turn["value"], train=True))
            continue
        for at, piece in enumerate(IMAGE_MARK.split(turn["value"])):
            if at:
                segments.append(unused.pop(0))
            if piece:
                segments.append(Text(piece))
    return (*unused, *segments)


def asked(
    images: Sequence[Image], turns: Iterable[tuple[str, str]], prompt: str = ""
) -> tuple[Text | Image, ...]:
    """Images, then (question, answer) turns; those with an empty answer are left out.

    Nothing at all where no turn is left. With images, `prompt` is asked where no question is;
    without images and question an answer is plain text.
    """
    segments: list[Text | Image] = []
    for question, answer in turns:
        if not answer:
            continue
        if question := question or (prompt if images else ""):
            segments.append(Text(question))
        segments.append(Text(answer, train=True, plain=not (images or question)))
    return (*images, *segments) if segments else ()


def record_turns(record: dict[str, Any], where: str) -> list[tuple[str, str]] | None:
    """(question, answer) turns from `question` with `answer` or `answers`, or `caption` or `text`.

    Lists of questions and of answers go together one by one; of several answers to one question,
    or several captions, the first counts. A caption's question is "". None: no such field.

    Raises:
      UserError: a field of another kind.
    """
    question = record.get("question")
    for name in ("answer", "answers") if question is not None else ("caption", "text"):
        if name not in record:
            continue
        value = record[name]
        if not isinstance(question, list):
            question = first_text(question, f'{where}: "question"')
            return [(question, first_text(value, f'{where}: "{name}"'))]
        if not isinstance(value, list) or len(value) != len(question):
            raise UserError(f'{where}: "question" is a list, "{name}" none of that length')
        pairs = zip(question, value, strict=True)
        return [
            (first_text(q, f'{where}: "question"'), first_text(a, f'{where}: "{name}"'))
            for q, a in pairs
        ]
    if question is not None:
        raise UserError(f'{where}: a "question" without "answer" or "answers"')
    return None


def first_text(value: Any, where: str) -> str:
    """A text, or the first of a list of texts; "" for nothing.

    Raises:
      UserError: anything else.
    """
    if isinstance(value, list):
        value = value[0] if value else None
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where} is neither a text nor a list of texts")
    return "" if value is None else str(value)


def texts_of(segments: Iterable[Text | Image]) -> Iterator[str]:
    return (s.text for s in segments if isinstance(s, Text))


def largest_side(source: Any) -> int:
    """Of all images of a source that can be read, in pixels; reads every header."""
    side = 1
    for index in range(len(source)):
        try:
            images = source[index].images
        except BadImageError:
            continue  # told when its example is met
        side = max([side, *(max(i.height, i.width) for i in images)])
    return side


_COUNTS = {
    "without_text": "{} images have no text and are left out",
    "without_image": "{} examples have no image",
    "repeated_ids": "{} ids come again and got #2, #3, ...",
    "split_documents": "{} documents were split",
}


def counted(source: Any) -> dict[str, str]:
    """What a source did with its records, in words; nothing where there is nothing to tell."""
    return {k: t.format(n) for k, t in _COUNTS.items() if (n := getattr(source, k, 0))}
