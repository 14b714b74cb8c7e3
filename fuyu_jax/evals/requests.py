"""What is asked: questions made of records, and the request that their answers belong to.

A request is what an answer depends on: data, pictures, demonstrations, checkpoint, and settings of
generation. Batch size and mesh are not among them. No JAX.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuyu_jax.data.example import BadImageError, open_image
from fuyu_jax.errors import UserError
from fuyu_jax.evals.records import Record
from fuyu_jax.evals.tasks import Task

# Files are hashed whole up to this size; of larger ones pieces that lie evenly, and the size.
_WHOLE = 64 * 2**20
_PIECE, _PIECES = 2**20, 64
# What a Hugging Face folder's answers depend on.
_HUB_FILES = ("*.safetensors", "config.json", "*_config.json", "*.index.json", "token*", "*.model")
_MORE_HUB_FILES = ("vocab*", "merges*", "added_tokens.json", "special_tokens_map.json")
_STEPS = "checkpoints"


@dataclass(frozen=True)
class Given:
    """A demonstration's answer, which enters the prompt as one that was given."""

    text: str


Part = str | Path | Given


@dataclass(frozen=True)
class Question:
    """One thing to ask a model.

    parts: texts, images and given answers in order. continuations: texts whose likelihood is
    wanted; a document. shots: ids of the demonstrations. size: about how many tokens it has, for
    batches of one size.
    """

    id: str
    parts: tuple[Part, ...]
    continuations: tuple[str, ...] = ()
    shots: tuple[str, ...] = ()
    size: int = 0


def digest(text: str | bytes) -> str:
    """Short and the same everywhere."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:16]


class Pictures:
    """Image files by their contents, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[str, int]] = {}

    def check(self, record: Record) -> str:
        """Why a record's images cannot be used; "" if they can be."""
        try:
            for path in record.images:
                self._look(path)
        except BadImageError as error:
            return str(error)
        return ""

    def digest(self, path: Path) -> str:
        """Of the file's contents."""
        return self._look(path)[0]

    def size(self, path: Path) -> int:
        """Pixels."""
        return self._look(path)[1]

    def _look(self, path: Path) -> tuple[str, int]:
        if path not in self._known:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise BadImageError(f"image {path}: {error.strerror or error}") from None
            image = open_image(data, str(path))
            self._known[path] = digest(data), image.height * image.width
        return self._known[path]


def make_question(
    task: Task, record: Record, shots: Sequence[tuple[Record, str]], pictures: Pictures
) -> Question:
    """A record as a task asks it, behind its demonstrations.

    Args:
      task: how to ask.
      record: what.
      shots: demonstrations with the answer each shows, in order.
      pictures: for the images' sizes.
    """
    parts: list[Part] = []
    for shot, answer in shots:
        parts += [*task.segments(shot), Given(answer)]
    parts += task.segments(record)
    continuations = () if task.ask == "generate" else tuple(task.continuations(record))
    texts = (p if isinstance(p, str) else p.text for p in parts if not isinstance(p, Path))
    letters = sum(map(len, texts)) + max(map(len, continuations), default=0)
    pixels = sum(pictures.size(p) for p in parts if isinstance(p, Path))
    ids = tuple(shot.id for shot, _ in shots)
    return Question(record.id, tuple(parts), continuations, ids, letters // 4 + pixels // 900)


def prompt_text(parts: Iterable[Part]) -> str:
    """For people to read: `<image>` where one stands, given answers on lines behind `> `."""
    texts = []
    for part in parts:
        if isinstance(part, Path):
            texts.append("<image>")
        else:
            texts.append(part if isinstance(part, str) else f"\n> {part.text}\n")
    return "".join(texts)


def asked_hash(questions: Sequence[Question], pictures: Pictures) -> str:
    """Of all questions as they are put, images by their contents."""
    found = hashlib.sha256()
    for q in questions:
        parts = [
            ["image", pictures.digest(p)]
            if isinstance(p, Path)
            else (["text", p] if isinstance(p, str) else ["given", p.text])
            for p in q.parts
        ]
        found.update(json.dumps([q.id, parts, q.continuations, q.shots]).encode())
    return found.hexdigest()[:16]


# --- What is compared on resume ---


def request_hash(request: Mapping[str, Any]) -> str:
    """Of a whole request."""
    return digest(json.dumps(request, sort_keys=True))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What changed between two requests, in words."""
    told = []
    for name in dict.fromkeys([*here, *there]):
        a, b = there.get(name), here.get(name)
        if a != b:
            told.append(f"{name} is {_shown(a)} there, {_shown(b)} here")
    return told


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


# --- The checkpoint ---


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies and what of it an answer depends on.

    path: a Hugging Face folder or `WORKDIR/checkpoints/STEP`. home: the folder for what is made of
    it. step: of training; None for a Hugging Face folder.
    """

    path: Path
    home: Path
    step: int | None
    hash: str


def find_checkpoint(path: Path) -> Checkpoint:
    """A Hugging Face folder, a work folder (its latest checkpoint), or one checkpoint of it.

    Raises:
      UserError: no such folder; no checkpoint or model in it.
    """
    path = path.expanduser()
    if not path.is_dir():
        raise UserError(f"checkpoint {path}: no such folder")
    steps = path if path.name == _STEPS else path / _STEPS
    step: Path | None = path if path.name.isdigit() and path.parent.name == _STEPS else None
    if step is None and steps.is_dir():
        found = [d for d in steps.iterdir() if d.name.isdigit() and d.is_dir()]
        if not found:
            raise UserError(f"{steps.parent}: no checkpoint in it yet")
        step = max(found, key=lambda d: int(d.name))
    if step is not None:
        home = step.parent.parent
        files = [p for p in (step / "params").rglob("*") if p.is_file()]
        files += [p for p in home.iterdir() if p.name.startswith(("tokenizer", "config.json"))]
        return Checkpoint(step, home, int(step.name), _hash_files(home, files))
    files = [p for pattern in (*_HUB_FILES, *_MORE_HUB_FILES) for p in path.glob(pattern)]
    if not files:
        raise UserError(
            f"checkpoint {path}: neither a work folder of train.py nor a Hugging Face folder"
        )
    return Checkpoint(path, path, None, _hash_files(path, files))


def _hash_files(base: Path, files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in sorted(set(files)):
        if file.is_file():
            found.update(f"{file.relative_to(base)} {_hash_file(file)}\n".encode())
    return found.hexdigest()[:16]


def _hash_file(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for at in range(_PIECES):
            file.seek((size - _PIECE) * at // (_PIECES - 1))
            found.update(file.read(_PIECE))
    return found.hexdigest()


def hash_file(path: Path) -> str:
    """Of a whole file, short."""
    with path.expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
