"""WebDataset: tar files whose members belong together by name, as `dog.jpg` and `dog.json` do.

A key is a member's name up to the first dot of its last part; what follows says what it is:

* an image: jpg, jpeg, png, webp, ...; several of a key (`a.0.jpg`, `a.1.jpg`) in order of number;
* `json`: LLaVA's `conversations`, or `question` with `answer(s)`, or `caption` or `text`;
* `txt`: a caption, read where there is no json or it holds none of these.

A caption is an answer; without any image the text is learnt as plain text. All else is passed over.
"""

import hashlib
import json
import os
import re
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from fuyu_jax.data.example import Example, Span, open_image
from fuyu_jax.data.sources import common
from fuyu_jax.errors import UserError

IMAGE_SUFFIXES = frozenset(
    ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm"]
)
_TEXT_FIELDS = ("conversations", "question", "caption", "text")
_VERSION = 1
INDEX_DIR = "FUYU_JAX_INDEX_DIR"  # an environment variable

Member = tuple[str, int, int]  # what follows the key, offset and length of the contents
Samples = list[tuple[str, list[Member]]]


class WebDatasetSource:
    """Samples of WebDataset tars, by random access.

    Tars are indexed once: the index is kept beside each as `<tar>.index.json` where the folder can
    be written (or in `index_dir`), and made anew when the tar's size or time has changed. It takes
    about half a kilobyte of memory a sample. No file stays open, so a source can be pickled and
    outlives a fork.

    A key that comes again in another tar gets `#2`, `#3`, ... as its id (`repeated_ids` of them).
    Samples without any text are left out (`without_text` of them), those without image are kept
    (`without_image` of them).

    Args:
      shards: path, `shard-{000..012}.tar`, glob, or a list of these.
      prompt: asked before captions.
      index_dir: a folder for indices, made where it is not there; if empty, that of the
        environment's FUYU_JAX_INDEX_DIR, or else each tar's own. One beside its tar is used still.

    Raises:
      UserError: missing, compressed or broken tar; a member given twice; nothing to read.
    """

    def __init__(self, shards: common.Patterns, prompt: str = "", index_dir: str | Path = ""):
        self.paths = common.expand(shards, "WebDataset tars")
        self.prompt = prompt
        folder = index_dir or os.environ.get(INDEX_DIR, "")
        self._samples: list[tuple[int, list[Member]]] = []
        self.without_text = self.without_image = 0
        keys = []
        for shard, path in enumerate(self.paths):
            for key, members in _index(path, folder):
                if not any(_kind(name) in ("json", "txt") for name, *_ in members):
                    self.without_text += any(_kind(name) == "image" for name, *_ in members)
                    continue
                self.without_image += not any(_kind(name) == "image" for name, *_ in members)
                self._samples.append((shard, members))
                keys.append(key)
        self._keys = keys
        self._ids, self.repeated_ids = common.unique(keys)
        if not keys:
            raise UserError(
                f"{self.paths[0]}: no sample with a .json or .txt member in "
                f"{len(self.paths)} tar(s); name members KEY.jpg and KEY.json"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def id(self, index: int) -> str:
        return self._ids[index]

    def __getitem__(self, index: int) -> Example:
        shard, members = self._samples[index]
        path, key = self.paths[shard], self._keys[index]
        images = [
            open_image(Span(path, offset, length), f"{path}, member {key}.{name}")
            for name, offset, length in sorted(members, key=lambda m: _natural(m[0]))
            if _kind(name) == "image"
        ]
        record, where = self._text(index)
        info = {"family": common.family(record)}
        if "conversations" in record:
            common.check_turns(record["conversations"], len(images), where)
            return Example(
                self.id(index), common.conversation(record["conversations"], images), info
            )
        turns = common.record_turns(record, where)
        if turns is None:
            raise UserError(
                f'{where}: no "conversations", "question", "caption" or "text", and no .txt beside '
                "it; add one of them"
            )
        return Example(self.id(index), common.asked(images, turns, self.prompt), info)

    def texts(self):
        """All texts, for a tokenizer; reads no image."""
        for index in range(len(self)):
            record, where = self._text(index)
            if "conversations" in record:
                images = sum(_kind(name) == "image" for name, *_ in self._samples[index][1])
                common.check_turns(record["conversations"], images, where)
                for turn in record["conversations"]:
                    yield common.IMAGE_MARK.sub("", turn["value"])
            else:
                for turn in common.record_turns(record, where) or ():
                    yield from (text for text in turn if text)
        if self.prompt:
            yield self.prompt

    def _text(self, index: int) -> tuple[dict[str, Any], str]:
        """The sample's record (a txt member is one with a caption), and where it comes from."""
        shard, members = self._samples[index]
        path = self.paths[shard]
        record: dict[str, Any] = {}
        where = ""
        # "json" before "a.json": the shortest name is the sample's own.
        for name, offset, length in sorted(members, key=lambda m: (_kind(m[0]), len(m[0]))):
            kind = _kind(name)
            if kind not in ("json", "txt") or (where and kind == "json"):
                continue
            if kind == "txt" and any(map(record.get, _TEXT_FIELDS)):
                break
            member = f"{path}, member {self._keys[index]}.{name}"
            try:
                data = Span(path, offset, length).read()
            except OSError as error:
                raise UserError(f"{member}: {error.strerror or error}") from None
            if kind == "json":
                record = common.read_json(data, member)
            else:
                try:
                    record = {**record, "caption": data.decode("utf-8").strip()}
                except UnicodeDecodeError as error:
                    raise UserError(f"{member}: not UTF-8 ({error.reason})") from None
            where = member
            if kind == "txt":
                break
        return record, where


def _kind(name: str) -> str:
    """ "image", "json" or "txt"; "" for what is passed over."""
    last = name.rsplit(".", 1)[-1].lower()
    return "image" if last in IMAGE_SUFFIXES else last if last in ("json", "txt") else ""


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `2.jpg` before `10.jpg`."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"([0-9]+)", name)]


# --- The index of a tar ---


def _index(path: Path, folder: str | Path = "") -> Samples:
    """Keys of a tar with their members, from an index in `folder` or beside it, or from itself."""
    state = path.stat()
    beside = kept = path.with_name(path.name + ".index.json")
    if folder:  # tars of one name in several folders are told apart
        where = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]
        kept = Path(folder).expanduser() / f"{path.name}.{where}.index.json"
    stamp = {"version": _VERSION, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    for place in dict.fromkeys((kept, beside)):
        try:
            found = json.loads(place.read_bytes())
            if {name: found[name] for name in stamp} == stamp:
                return [(k, [(n, o, c) for n, o, c in members]) for k, members in found["samples"]]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or not ours
    samples = _read_tar(path, state.st_size)
    _keep(kept, json.dumps({**stamp, "samples": samples}, separators=(",", ":")))
    return samples


def _read_tar(path: Path, size: int) -> Samples:
    if _compressed(path):
        raise UserError(f"{path}: compressed; unpack it to a plain tar (gunzip, zstd -d, xz -d)")
    samples: dict[str, list[Member]] = {}
    try:
        if size % 512:
            raise tarfile.ReadError("its size is no multiple of 512")
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, dot, rest = name.partition(".")
                if not (member.isreg() and key and dot) or not _kind(rest):
                    continue  # folders, links, hidden files and what no sample needs
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                key = f"{folder}/{key}" if folder else key
                members = samples.setdefault(key.removeprefix("./"), [])
                if any(rest == other for other, *_ in members):
                    raise UserError(f"{path}: member {member.name} is there twice; remove one")
                members.append((rest, member.offset_data, member.size))
                tar.members = []  # or it would remember every header
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: not a tar, or cut short ({error}); make or fetch it anew"
        ) from None
    return list(samples.items())


def _compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh"))


def _keep(path: Path, text: str) -> None:
    """Writes an index whole or not at all; where it cannot be written, it is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
