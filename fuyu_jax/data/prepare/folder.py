"""Where a set is written: files that are there whole or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from fuyu_jax.data.shards import open_records
from fuyu_jax.errors import UserError

_PARTIAL = ".partial"


@runtime_checkable  # so that shape-checking tests can look
class Folder(Protocol):
    """What preparing needs of a folder, here or on another file system."""

    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to write; at the end of the `with` it becomes the file."""
        ...

    def read(self, name: str) -> bytes | None:
        """A file's contents; None: no such file."""
        ...

    def holds(self, name: str, size: int, records: int) -> bool:
        """Whether a shard is there, so long and with so many records."""
        ...

    def remove(self, name: str) -> None: ...

    def names(self) -> list[str]: ...

    def begin(self) -> contextlib.AbstractContextManager[None]:
        """Makes the folder and keeps others from writing into it."""
        ...


class LocalFolder:
    """A folder of this machine's file system."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        # Two processes never write one file, even where one has outlived its parent.
        partial = self.path / f".{name}.{os.getpid()}{_PARTIAL}"
        try:
            yield partial
            partial.replace(self.path / name)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def holds(self, name: str, size: int, records: int) -> bool:
        path = self.path / name
        if not path.is_file() or path.stat().st_size != size:
            return False
        return open_records(path).num_records() == records

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        found = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        return [n for n in found if not n.endswith(_PARTIAL)]

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.path}: another process is preparing into it; wait for it, or give "
                    "another folder"
                ) from None
            except OSError:
                pass  # a file system without locks
            self._clean()
            yield
        finally:
            self._clean()
            os.close(descriptor)

    def _clean(self) -> None:
        """Removes what a killed process has left."""
        for path in self.path.glob(f".*{_PARTIAL}"):
            path.unlink(missing_ok=True)


def write(folder: Folder, name: str, data: bytes) -> None:
    with folder.writing(name) as path:
        path.write_bytes(data)


def open_folder(path: str) -> Folder:
    """A local folder, or with `SCHEME://` one that Apache Beam's file systems know.

    Raises:
      UserError: an address, and no Beam.
    """
    if "://" not in path:
        return LocalFolder(path)
    from fuyu_jax.data.prepare.beam import RemoteFolder

    return RemoteFolder(path)
