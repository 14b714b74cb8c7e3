"""Files of an evaluation: answers as they come, what they answer, and how they are merged.

`samples_TASK.jsonl` is appended answer by answer; several hosts write
`samples_TASK.K-of-N.jsonl`. A last line that a kill cut off is dropped. `request_TASK.json` says
what was asked.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuyu_jax.errors import UserError
from fuyu_jax.evals.requests import differences

METRICS_FILE = "metrics.json"
PAGE_FILE = "report.html"
Line = dict[str, Any]


def to_json(value: Any) -> str:
    """One line of JSON; refuses what JSON cannot say."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="surrogatepass")
    partial.replace(path)


class TaskFiles:
    """The files of one task in a folder, and, of several hosts, one host's part.

    Args:
      folder: of the evaluation.
      task: its name.
      host, hosts: which of how many writes here.
    """

    def __init__(self, folder: Path, task: str, host: int = 0, hosts: int = 1):
        self.folder = folder
        self.task = task
        self.final = folder / f"samples_{task}.jsonl"
        self.request = folder / f"request_{task}.json"
        part = f"samples_{task}.{host}-of-{hosts}.jsonl"
        self.own = self.final if hosts == 1 else folder / part
        self._file: Any = None

    @property
    def parts(self) -> list[Path]:
        """All files with answers: the merged one and every host's."""
        name = re.compile(rf"samples_{re.escape(self.task)}(\.\d+-of-\d+)?\.jsonl")
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in there if name.fullmatch(path.name))

    def claim(self, request: Mapping[str, Any], resume: bool) -> None:
        """Makes the folder's answers to this task this request's; see `check`."""
        self.check(request, resume)
        write_whole(self.request, json.dumps(request, indent=2, ensure_ascii=False) + "\n")

    def check(self, request: Mapping[str, Any], resume: bool) -> None:
        """Whether answers that are there may be gone on with.

        Raises:
          UserError: there are some, and `resume` was not said; they are of another request, whose
            differences are named.
        """
        if not self.request.exists() and not self.parts:
            return
        if not resume:
            raise UserError(
                f'{self.folder} holds answers to task "{self.task}"; --resume goes on with them, '
                "or give another --out"
            )
        there = self.read_request()
        if changed := differences(there, request):
            raise UserError(
                f'{self.folder}: the answers to task "{self.task}" are of another request: '
                f"{'; '.join(changed)}. Give another --out, or what was given there"
            )

    def read_request(self) -> dict[str, Any]:
        """What was asked.

        Raises:
          UserError: it does not say.
        """
        try:
            found = json.loads(self.request.read_text(encoding="utf-8"))
        except OSError:
            found = None
        except ValueError as error:
            raise UserError(f"{self.request}: not JSON ({error}); give another --out") from None
        if not isinstance(found, dict):
            raise UserError(
                f'{self.folder} holds answers to task "{self.task}" and no {self.request.name} '
                "that says what was asked; give another --out"
            )
        return found

    def done(self) -> dict[str, Line]:
        """All answers that are there, by id."""
        return merge(self.parts)

    def append(self, lines: Iterable[Line]) -> None:
        """Writes lines behind what is whole, and hands them to the system at once."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            cut_to_whole_lines(self.own)
            self._file = self.own.open("ab")
        text = "".join(to_json(line) + "\n" for line in lines)
        self._file.write(text.encode("utf-8", "surrogatepass"))
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, lines: Sequence[Line]) -> None:
        """Replaces all parts by the one file."""
        self.close()
        write_whole(self.final, "".join(to_json(line) + "\n" for line in lines))
        for path in self.parts:
            if path != self.final:
                path.unlink(missing_ok=True)


def cut_to_whole_lines(path: Path) -> None:
    """Takes away a last line without its end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, 2)
        while end:
            begin = max(end - 65536, 0)
            file.seek(begin)
            at = file.read(end - begin).rfind(b"\n")
            if at >= 0:
                end = begin + at + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


def read_lines(path: Path) -> list[Line]:
    """Whole lines of a file of answers.

    Raises:
      UserError: one is not an answer; a kill cuts only the last line.
    """
    lines = []
    *whole, _ = path.read_bytes().split(b"\n")  # behind the last line's end is nothing, or a cut
    for number, data in enumerate(whole, start=1):
        try:
            line = json.loads(data.decode("utf-8", "surrogatepass"))
            if not isinstance(line["id"], str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}:{number}: no answer; take the line out to have it asked again"
            ) from None
        lines.append(line)
    return lines


def merge(paths: Iterable[Path]) -> dict[str, Line]:
    """Answers of several files by id; of an id that is in several, the first."""
    found: dict[str, Line] = {}
    for path in paths:
        for line in read_lines(path):
            found.setdefault(line["id"], line)
    return found
