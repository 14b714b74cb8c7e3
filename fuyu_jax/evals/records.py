"""Questions to evaluate on, read from JSON Lines and checked before any model is loaded.

A line is `{id, images: [path], prompt | segments, answers: […], choices?, boxes?, box_format?,
group?, subset?}`, and, to score answers that are there already, `prediction`, or `logprobs` (one a
choice), or for a document `logprobs: [sum]` and `tokens`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import TYPE_CHECKING, Any

from fuyu_jax.errors import UserError, nearest
from fuyu_jax.evals.judge import Box
from fuyu_jax.evals.metrics.grounding import BOX_FORMATS, to_tlbr

if TYPE_CHECKING:
    from fuyu_jax.evals.forms import Form

_ASKED = ("id", "images", "prompt", "segments", "answers", "choices")
_MORE = ("boxes", "box_format", "group", "subset")
_ANSWERED = ("prediction", "logprobs", "tokens")
FIELDS = (*_ASKED, *_MORE, *_ANSWERED)
_IMAGE_MARK = re.compile(r"[ \t]*<image>\n?")


@dataclass(frozen=True)
class Record:
    """A question with its right answers, and, where the file has it, what was answered."""

    id: str
    line: int
    segments: tuple[str | Path, ...]  # texts and images, in order
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    target: int = -1  # which choice is right; -1 without choices
    boxes: tuple[Box, ...] = ()  # top, left, bottom, right
    box_format: str = "tlbr"
    group: str = ""
    subset: str = "all"
    prediction: str | tuple[float, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    tokens: int = 0

    @property
    def images(self) -> tuple[Path, ...]:
        return tuple(s for s in self.segments if isinstance(s, Path))


@dataclass(frozen=True)
class Skipped:
    """A line that was left out, and why."""

    line: int
    id: str
    reason: str


class _BadLine(Exception):
    """Why a line cannot be used."""


def read_records(
    path: str | Path,
    forms: Mapping[str, "Form"],
    *,
    predicted: bool = False,
    skip_bad: bool = False,
    image_dir: str | Path | None = None,
    limit: int = 0,
    check: Callable[[Record], str] | None = None,
) -> tuple[list[Record], list[Skipped]]:
    """Reads and checks all lines.

    Args:
      path: the JSON Lines file.
      forms: what each task, by name, needs of a record.
      predicted: the lines hold predictions to score; images are then not asked for.
      skip_bad: leave bad lines out and list them, with all others of their groups.
      image_dir: where image paths begin; the file's own folder if not given.
      limit: records at most; 0: all. The group of the last one is completed.
      check: why else a record cannot be used; "" if it can.

    Raises:
      UserError: `FILE:LINE: …` for the first bad line, or none can be used.
    """
    path = Path(path).expanduser()
    folder = Path(image_dir).expanduser() if image_dir else path.parent
    records: list[Record] = []
    skipped: list[Skipped] = []
    first_line: dict[str, int] = {}

    def bad(line: int, id: str, reason: str) -> None:
        if not skip_bad:
            raise UserError(f"{path}:{line}: {reason}")
        skipped.append(Skipped(line, id, reason))

    for line, data in _lines(path):
        id = ""
        try:
            raw = _object(data)
            id = _id(raw)
            if id in first_line:
                raise _BadLine(f'id "{id}" is that of line {first_line[id]} too; give each its own')
            first_line[id] = line
            record = _record(raw, id, line, folder, missing_ok=predicted)
            _fits(record, raw, forms, predicted)
            if check is not None and (why := check(record)):
                raise _BadLine(why)
        except _BadLine as error:
            bad(line, id, str(error))
        else:
            records.append(record)
    for record, reason in _broken_groups(records, forms):
        bad(record.line, record.id, reason)
    left_out = {s.line for s in skipped}
    records = [r for r in records if r.line not in left_out]
    skipped.sort(key=lambda s: s.line)
    if not records:
        told = f"; the first: line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{path}: no record to evaluate{told}")
    return _limited(records, forms, limit), skipped


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: {reason}; give a JSON Lines file") from None
    with file:
        for number, data in enumerate(file, start=1):
            data = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
            if data.strip():
                yield number, data


def _object(data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except ValueError as error:  # bad UTF-8 is one too
        raise _BadLine(f"not JSON ({getattr(error, 'msg', None) or error})") from None
    if not isinstance(raw, dict):
        raise _BadLine("JSON, but no object {…}")
    return raw


def _fits(
    record: Record, raw: Mapping[str, Any], forms: Mapping[str, "Form"], predicted: bool
) -> None:
    for task, form in forms.items():
        why = form.misfit(record) or (form.misfit_of_prediction(record) if predicted else "")
        if why:
            raise _BadLine(f"{task} {why}{_misspelt(raw)}")
    if (
        not predicted
        and not record.segments
        and not all(f.kind == "document" for f in forms.values())
    ):
        raise _BadLine('nothing is asked: give "prompt", "segments" or "images"')


def _misspelt(raw: Mapping[str, Any]) -> str:
    """A field that is none of ours but nearly, such as "answer"."""
    for name in raw:
        guess = "" if name in FIELDS else nearest(name, FIELDS)
        if "did you mean" in guess:
            return f'; it has "{name}"{guess}'
    return ""


def _broken_groups(
    records: Sequence[Record], forms: Mapping[str, "Form"]
) -> Iterator[tuple[Record, str]]:
    told: set[int] = set()
    for task, form in forms.items():
        for group in form.groups(records).values():
            if why := form.misfit_of_group(group):
                for record in group:
                    if record.line not in told:
                        told.add(record.line)
                        yield record, f"{task}: {why}"


def _limited(records: list[Record], forms: Mapping[str, "Form"], limit: int) -> list[Record]:
    if not limit or limit >= len(records):
        return records
    wanted = {r.line for r in records[:limit]}
    for form in forms.values():
        for group in form.groups(records).values():
            if any(r.line in wanted for r in group):
                wanted |= {r.line for r in group}
    return [r for r in records if r.line in wanted]


# --- Fields ---


def _record(raw: Mapping[str, Any], id: str, line: int, folder: Path, missing_ok: bool) -> Record:
    choices = _texts(raw, "choices")
    if len(choices) == 1:
        raise _BadLine('"choices" is only one; give two or more')
    box_format = raw.get("box_format", "tlbr")
    if box_format not in BOX_FORMATS:
        known = nearest(str(box_format), BOX_FORMATS)
        raise _BadLine(f"unknown box_format {json.dumps(box_format)}{known}")
    return Record(
        id,
        line,
        _segments(raw, folder, missing_ok),
        _texts(raw, "answers"),
        choices,
        _target(raw) if choices else -1,
        _boxes(raw, box_format),
        box_format,
        _name(raw, "group", ""),
        _name(raw, "subset", "all"),
        _prediction(raw.get("prediction")),
        _numbers(raw["logprobs"], '"logprobs"') if "logprobs" in raw else None,
        _count(raw.get("tokens", 0)),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _id(raw: Mapping[str, Any]) -> str:
    id = _name(raw, "id", "")
    if not id:
        raise _BadLine(f'no "id"{_misspelt(raw)}')
    return id


def _name(raw: Mapping[str, Any], field: str, default: str) -> str:
    value = raw.get(field)
    if value is None:
        return default
    if not _is_text(value):
        raise _BadLine(f'"{field}" is neither a text nor a number')
    return str(value)


def _texts(raw: Mapping[str, Any], field: str) -> tuple[str, ...]:
    values = raw.get(field)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(map(_is_text, values)):
        raise _BadLine(f'"{field}" is no list of texts')
    if not any(str(v).strip() for v in values):
        raise _BadLine(f'"{field}" is empty')
    return tuple(map(str, values))


def _target(raw: Mapping[str, Any]) -> int:
    """The one choice that the answer names: by its words, its letter, or, a number, its index."""
    answers, choices = raw.get("answers") or (), raw["choices"]
    if len(answers) != 1:
        more = "" if answers else _misspelt(raw)
        raise _BadLine(f'choices need one answer; "answers" has {len(answers)}{more}')
    (answer,) = answers
    # A number is a choice's words only where the choices are numbers too.
    words = list(map(str, choices)) if isinstance(answer, str) else choices
    meant = {at for at, choice in enumerate(words) if choice == answer}
    if isinstance(answer, int) and 0 <= answer < len(choices):
        meant.add(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS[: len(choices)]:
        meant.add(LETTERS.index(answer))
    if len(meant) != 1:
        told = "may mean several" if meant else "is none"
        hint = ""
        if meant:
            hint = "; give its index, from 0" if isinstance(answer, str) else "; give it as a text"
        raise _BadLine(f"answer {json.dumps(answer)} {told} of the {len(choices)} choices{hint}")
    return meant.pop()


def _segments(raw: Mapping[str, Any], folder: Path, missing_ok: bool) -> tuple[str | Path, ...]:
    def image(name: Any) -> Path:
        if not isinstance(name, str) or not name:
            raise _BadLine("an image is not the path of a file")
        if "://" in name:
            raise _BadLine(f"image {name} is an address; fetch it and give its path")
        if not missing_ok and not (folder / name).is_file():
            raise _BadLine(f"image {folder / name}: no such file")
        return folder / name

    images, prompt, segments = raw.get("images", []), raw.get("prompt"), raw.get("segments")
    if not isinstance(images, list):
        raise _BadLine('"images" is no list of paths')
    found = [image(name) for name in images]
    if segments is None:
        if not isinstance(prompt, str | None):
            raise _BadLine('"prompt" is not a text')
        return _marked(prompt or "", found)
    if prompt is not None or images:
        raise _BadLine('"segments" besides "prompt" or "images"; give one or the other')
    if not isinstance(segments, list) or not segments:
        raise _BadLine('"segments" is no list of texts and {"image": path}')
    parts: list[str | Path] = []
    for segment in segments:
        if isinstance(segment, dict) and len(segment) == 1 and set(segment) <= {"image", "text"}:
            key, segment = next(iter(segment.items()))
            if key == "image":
                parts.append(image(segment))
                continue
        if not isinstance(segment, str):
            raise _BadLine('a segment is neither a text nor {"image": path}')
        parts.append(segment)
    return tuple(parts)


def _marked(prompt: str, images: list[Path]) -> tuple[str | Path, ...]:
    """Images where `<image>` stands in the prompt, or else before it."""
    pieces = _IMAGE_MARK.split(prompt)
    if len(pieces) == 1:
        return (*images, prompt) if prompt else tuple(images)
    if len(pieces) - 1 != len(images):
        raise _BadLine(f"{len(pieces) - 1} <image> marks for {len(images)} images")
    parts: list[str | Path] = [pieces[0]]
    for path, piece in zip(images, pieces[1:], strict=True):
        parts += [path, piece]
    return tuple(p for p in parts if p != "")


def _numbers(values: Any, what: str) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ):
        raise _BadLine(f"{what} is no list of numbers")
    return tuple(map(float, values))


def _boxes(raw: Mapping[str, Any], box_format: str) -> tuple[Box, ...]:
    boxes = raw.get("boxes", [])
    if not isinstance(boxes, list):
        raise _BadLine('"boxes" is no list of boxes')
    found = []
    for box in boxes:
        values = _numbers(box, "a box")
        if len(values) != 4 or not all(map(math.isfinite, values)):
            raise _BadLine("a box is not four numbers")
        top, left, bottom, right = tlbr = to_tlbr(values, box_format)
        if bottom <= top or right <= left:
            shown = ", ".join(f"{v:g}" for v in values)
            told = f'give "box_format" ({", ".join(BOX_FORMATS)})'
            raise _BadLine(f"box [{shown}] has no inside as {box_format}; {told}")
        found.append(tlbr)
    return tuple(found)


def _prediction(value: Any) -> str | tuple[float, ...] | None:
    if value is None or isinstance(value, str):
        return value
    return str(value) if _is_text(value) else _numbers(value, '"prediction"')


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _BadLine('"tokens" is no number of tokens')
    return value
