"""Parameters of an orbax checkpoint on disk, a slab at a time.

orbax saves arrays that are in memory. Here it saves one number an array, in the layout that
`fuyu_jax.checkpoint` reads, and each array's real shape and contents are then written in its place
through tensorstore. Reading goes to tensorstore too, whatever orbax has written (OCDBT or zarr).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from fuyu_jax import config as config_lib
from fuyu_jax.checkpoint import CHECKPOINTS
from fuyu_jax.config import TrainConfig
from fuyu_jax.errors import UserError

SLAB = 4 * 2**20  # bytes; some of them are in flight at a time
Index = tuple[slice, ...]


class Stored(NamedTuple):
    """A parameter to be written.

    row_axis: along which it is cut, the first axis of the tensor it comes from. layered: its first
    axis is L. shard: the part of it that a device will read.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    row_axis: int
    layered: bool
    shard: tuple[int, ...]

    @property
    def chunk(self) -> tuple[int, ...]:
        """Of one layer and one shard, so many rows as fit a slab."""
        chunk = list(self.shard)
        if self.layered:
            chunk[0] = 1
        rows = max(chunk[self.row_axis], 1)
        row_bytes = max(int(np.prod(chunk)) * self.dtype.itemsize // rows, 1)
        chunk[self.row_axis] = min(rows, max(SLAB // row_bytes, 1))
        return tuple(chunk)


def slabs(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
    """Indices of an array's chunks, which together are the whole."""
    starts = [range(0, n, c) for n, c in zip(shape, chunk, strict=True)]
    for at in np.ndindex(*(len(s) for s in starts)):
        begun = [s[i] for s, i in zip(starts, at, strict=True)]
        limits = zip(begun, chunk, shape, strict=True)
        yield tuple(slice(b, min(b + c, n)) for b, c, n in limits)


def write_params(
    workdir: Path,
    config: TrainConfig,
    params: Iterable[Stored],
    read: Callable[[str, Index, np.dtype], np.ndarray],
) -> None:
    """Writes checkpoint 0 of a work folder: parameters and config, no optimizer state.

    Not atomic: the caller writes into a folder under another name and renames it.

    Args:
      workdir: the folder; it must have no checkpoint 0.
      config: kept beside the parameters.
      params: all parameters.
      read: gives a slab of a parameter in its type.
    """
    params = list(params)
    skeleton: dict[str, Any] = {}
    for p in params:
        *inner, last = p.path.split("/")
        node = skeleton
        for key in inner:
            node = node.setdefault(key, {})
        node[last] = np.zeros((1,) * len(p.shape), p.dtype)
    manager = ocp.CheckpointManager(
        (workdir / CHECKPOINTS).resolve(),
        options=ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False),
        item_handlers={
            "params": ocp.StandardCheckpointHandler(use_ocdbt=False),
            "config": ocp.JsonCheckpointHandler(),
        },
    )
    saved = ocp.args.Composite(
        params=ocp.args.StandardSave(skeleton),
        config=ocp.args.JsonSave(config_lib.flatten(config)),
    )
    manager.save(0, args=saved)
    manager.wait_until_finished()
    manager.close()
    for p in params:
        folder = _array_folder(workdir / CHECKPOINTS / "0" / "params", p.path)
        array = _create(folder, p.shape, p.chunk, p.dtype)
        for index in slabs(p.shape, p.chunk):
            array[index].write(read(p.path, index, p.dtype)).result()


def _create(
    folder: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype
) -> ts.TensorStore:
    """An array in the place of what is there, as orbax lays them out."""
    spec = {
        "driver": "zarr",
        "kvstore": _files(folder),
        "metadata": {
            "shape": shape,
            "chunks": chunk,
            "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
            "compressor": None,  # random bits gain nothing
        },
    }
    return ts.open(spec, create=True, delete_existing=True).result()


def _array_folder(params: Path, path: str) -> Path:
    folder = params / path.replace("/", ".")
    assert folder.is_dir(), folder  # orbax has made it
    return folder


def _files(folder: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{folder.resolve()}/"}


def find_step(path: Path) -> tuple[Path, int]:
    """The work folder and step that a path means: the latest, or `WORKDIR/checkpoints/STEP`.

    Raises:
      UserError: no checkpoint there.
    """
    if path.name.isdigit() and path.parent.name == CHECKPOINTS:
        return path.parent.parent, int(path.name)
    workdir = path.parent if path.name == CHECKPOINTS else path
    folder = workdir / CHECKPOINTS
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise UserError(f"{path}: neither a Hugging Face folder nor a work folder with checkpoints")
    return workdir, max(steps)


class StoredParams:
    """Parameters of a checkpoint, to be read in slices.

    Args:
      step: the folder `WORKDIR/checkpoints/STEP`.

    Raises:
      UserError: it has no parameters, or they cannot be read.
    """

    def __init__(self, step: Path):
        self.folder = step / "params"
        try:
            metadata = json.loads((self.folder / "_METADATA").read_text())
            trees = metadata["tree_metadata"].values()
            names = [tuple(k["key"] for k in t["key_metadata"]) for t in trees]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"checkpoint {step}: unreadable ({error})") from None
        self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        self._ocdbt = metadata.get("use_ocdbt", True)
        self._arrays = {"/".join(n): self._open(".".join(n)) for n in names}

    def _open(self, name: str) -> ts.TensorStore:
        kvstore: dict[str, Any] = _files(self.folder / name)
        if self._ocdbt:
            kvstore = {"driver": "ocdbt", "base": _files(self.folder), "path": f"{name}/"}
        try:
            spec = {"driver": self._driver, "kvstore": kvstore}
            return ts.open(spec, read=True, open=True).result()
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{self.folder}: parameter {name} is unreadable ({reason})") from None

    def cut_into_layers(self, paths: Iterable[str], scratch: Path) -> None:
        """Lays parameters out layer by layer in another folder, to be read from there.

        Training saves pieces with all layers in them; whoever wants one layer would read and unpack
        all of them, for every layer again.
        """
        for path in paths:
            chunk = self.chunk(path)
            if chunk[0] == 1:
                continue
            shape, dtype = self.shape(path), self.dtype(path)
            layers = _create(scratch / path.replace("/", "."), shape, (1, *chunk[1:]), dtype)
            for index in slabs(shape, chunk):
                block = self.read(path, index)
                for at, layer in enumerate(range(shape[0])[index[0]]):
                    layers[(layer, *index[1:])].write(block[at]).result()
            self._arrays[path] = layers

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def shape(self, path: str) -> tuple[int, ...]:
        return tuple(self._arrays[path].shape)

    def dtype(self, path: str) -> np.dtype:
        return self._arrays[path].dtype.numpy_dtype

    def chunk(self, path: str) -> tuple[int, ...]:
        array = self._arrays[path]
        return tuple(array.chunk_layout.read_chunk.shape or array.shape)

    def read(self, path: str, index: Any) -> np.ndarray:
        try:
            return self._arrays[path][index].read().result()
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{self.folder}: {path} is unreadable ({reason})") from None
