"""Weights of a Hugging Face folder as our parameters, slice by slice, straight into shards.

An encoder-free model may begin from a text model: what its file lacks (patch projection, new rows
of the vocabulary) is made fresh and told.
"""

import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fuyu_jax.config import ModelConfig
from fuyu_jax.errors import UserError
from fuyu_jax.interop import fuyu
from fuyu_jax.interop.mapping import FileTensor, Place, places
from fuyu_jax.interop.tensors import DTYPES, TensorFolder
from fuyu_jax.model.decoder import make_decoder
from fuyu_jax.parallel.mesh import paths, state_shardings

Index = tuple[slice, ...]
_BLOCK = 4096  # rows at a time where a whole table is looked through
NOISE = 0.1  # of a new row around the mean row, as a part of the table's standard deviation


class ReadReport(NamedTuple):
    """What became of a folder's tensors.

    loaded: tensors read. new: parameters that the folder lacks, and how they were made. ignored:
    tensors that are no weights, or a tied head's copy.
    """

    loaded: int
    new: dict[str, str]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        told = f"loaded {self.loaded} tensors"
        if self.new:
            each = "; ".join(f"{path}: {how}" for path, how in self.new.items())
            told += f", {len(self.new)} parameters new ({each})"
        return told + (f", {len(self.ignored)} not needed" if self.ignored else "")


def model_shapes(config: ModelConfig) -> Any:
    """Parameters of a model as shapes."""
    return jax.eval_shape(_maker(config, 0))


def _maker(config: ModelConfig, seed: int) -> Callable[[], Any]:
    return lambda: nnx.split(make_decoder(config, image_id=0, newline_id=0, seed=seed))[1]


class Weights:
    """A folder's weights under our names.

    Args:
      folder: as transformers saves it, of any generation of names.
      config: of the model to be filled; by default what the folder says. It may have a larger
        vocabulary, another patch size than a text model has (none), and settings of this
        program's own; all else must be the folder's.
      seed: of what is new.
      first_new: ids from here on get new rows, although the file may have (unused) rows for
        them; by default only ids past the file's.

    Raises:
      UserError: a tensor that is missing, unexpected or of another shape, or a config that is not
        the folder's.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig | None = None,
        *,
        seed: int = 0,
        first_new: int | None = None,
    ):
        self.folder = folder
        self.described = fuyu.describe(folder)
        theirs = self.described.config
        self.config = config or theirs
        self.seed = seed
        self._check_config()
        self.first_new = min(theirs.vocab_size, first_new or theirs.vocab_size)
        self._files = TensorFolder(folder)
        d = self.described
        tensors = fuyu.file_tensors(theirs, d.text_type, d.fuyu)
        self._places = places(tensors)
        self._names, ignored = self._match(tensors)
        self.shapes = model_shapes(self.config)
        flat = zip(paths(self.shapes), jax.tree.leaves(self.shapes), strict=True)
        self._shapes = {path: tuple(x.shape) for path, x in flat}
        self._fresh = tuple(p for p in self._shapes if p not in self._places)
        new = {path: f"drawn with seed {seed}" for path in self._fresh}
        if rows := self.config.vocab_size - self.first_new:
            new |= {p: f"{rows} rows around the mean row" for p in self._shapes if _rows(p)}
        self.report = ReadReport(len(self._names), new, ignored)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, path: str) -> tuple[int, ...]:
        return self._shapes[path]

    def place(self, path: str) -> Place | None:
        """Where a parameter lies in the files; None: nowhere."""
        return self._places.get(path)

    def dtype(self, path: str) -> np.dtype:
        """The type that holds a parameter's file tensors (of all layers) exactly."""
        place = self._places.get(path)
        if place is None:
            return np.dtype(np.float32)
        found = {self.file_dtypes[n] for n in self._layer_names(place.tensor)}
        # bfloat16 and float16 hold none of each other.
        return found.pop() if len(found) == 1 else np.dtype(np.float32)

    @cached_property
    def file_dtypes(self) -> dict[str, np.dtype]:
        """Types by newest names."""
        entries = {n: self._files.entries[file].dtype for n, file in self._names.items()}
        for name, dtype in entries.items():
            if dtype not in DTYPES:
                self._files.open(self._names[name])  # raises
        return {n: DTYPES[dtype] for n, dtype in entries.items()}

    def read(self, path: str, index: Index, dtype: Any = None) -> np.ndarray:
        """A slice of one of our parameters, read alone.

        Args:
          path: as in `paths`.
          index: a slice of step 1 for every axis, the axis L of layers included.
          dtype: by default the files'.
        """
        dtype = np.dtype(dtype or self.dtype(path))
        place = self._places.get(path)
        shape = self._shapes[path]
        spans = [range(n)[s] for n, s in zip(shape, index, strict=True)]
        if place is None:
            return self._fresh_values[path][index].astype(dtype)
        if not place.tensor.layered:
            if _rows(path) and self.config.vocab_size > self.first_new:
                return self._with_new_rows(path, place, spans, dtype)
            return self._view(place, None)[index].astype(dtype)
        out = np.empty([len(s) for s in spans], dtype)
        for at, layer in enumerate(spans[0]):
            out[at] = self._view(place, layer)[index[1:]]
        return out

    def _view(self, place: Place, layer: int | None) -> np.ndarray:
        stored = self._files.open(self._names[place.tensor.name.format(layer)])
        return place.part.view(stored.reshape(place.tensor.factored))

    def _with_new_rows(self, path, place, spans, dtype) -> np.ndarray:
        axis = place.part.row_axis
        rows, columns = spans[axis], spans[1 - axis]
        out = np.empty((len(rows), len(columns)), dtype)
        known = range(rows.start, min(rows.stop, self.first_new))
        cut = slice(columns.start, columns.stop)
        if known:
            view = np.moveaxis(self._view(place, None), axis, 0)
            out[: len(known)] = view[known.start : known.stop, cut]
        mean, spread = self._statistics(path) if len(known) < len(rows) else (None, 0)
        for row in range(max(rows.start, self.first_new), rows.stop):
            rng = np.random.default_rng((self.seed, zlib.crc32(path.encode()), row))
            drawn = mean + NOISE * spread * rng.normal(size=mean.shape)
            out[row - rows.start] = drawn[cut]
        return np.moveaxis(out, 0, axis)

    def _statistics(self, path: str) -> tuple[np.ndarray, float]:
        """The mean row of a table, and the standard deviation around it."""
        if path not in self._tables:
            place = self._places[path]
            view = np.moveaxis(self._view(place, None), place.part.row_axis, 0)[: self.first_new]
            total, squares = np.zeros(view.shape[1]), 0.0
            for at in range(0, len(view), _BLOCK):
                block = view[at : at + _BLOCK].astype(np.float32)
                total += block.sum(axis=0, dtype=np.float64)
                squares += float(np.square(block).sum(dtype=np.float64))
            mean = total / len(view)
            variance = squares / view.size - float(np.square(mean).mean())
            self._tables[path] = mean, max(variance, 0.0) ** 0.5
        return self._tables[path]

    @cached_property
    def _tables(self) -> dict[str, tuple[np.ndarray, float]]:
        return {}

    @cached_property
    def _fresh_values(self) -> dict[str, np.ndarray]:
        """What no file has, as `Decoder` draws it; the compiler drops all the rest."""
        make, wanted = _maker(self.config, self.seed), set(self._fresh)

        def fresh():
            state = make()
            flat = zip(paths(state), jax.tree.leaves(state), strict=True)
            return {p: x for p, x in flat if p in wanted}

        return {p: np.asarray(x) for p, x in jax.jit(fresh)().items()} if wanted else {}

    def _check_config(self) -> None:
        text, ours = self.described.config, self.config
        if ours.vocab_size < text.vocab_size and ours.vocab_size:
            raise UserError(
                f"{self.folder} has a vocabulary of {text.vocab_size}, the config's "
                f"vocab_size={ours.vocab_size} is less"
            )
        if not ours.vocab_size:
            raise UserError("model.vocab_size must be set to read weights")
        own = {*fuyu.OWN, "vocab_size", "image_attention", "image_positions"}
        own -= {"patch_size"} if self.described.fuyu else set()
        differ = fuyu.differences(ours, text, own)
        if differ:
            told = "; ".join(
                f"model.{k} is {b!r} there, {a!r} here" for k, (a, b) in differ.items()
            )
            raise UserError(f"{self.folder} is another model than the config's: {told}")

    def _layer_names(self, tensor: FileTensor) -> list[str]:
        layers = range(self.described.config.num_layers) if tensor.layered else (None,)
        return [tensor.name.format(i) for i in layers]

    def _match(self, tensors: list[FileTensor]) -> tuple[dict[str, str], tuple[str, ...]]:
        """Newest names to the file's, and what is ignored."""
        d = self.described
        names: dict[str, str] = {}
        ignored: list[str] = []
        for name in self._files.entries:
            newest = fuyu.newest_name(name, d.text_type, d.fuyu)
            if newest is None:
                ignored.append(name)
            elif newest in names:
                raise UserError(f"{self.folder}: {name} and {names[newest]} are the same tensor")
            else:
                names[newest] = name
        if d.config.tie_embeddings and "lm_head.weight" in names:
            ignored.append(self._tied_head(names.pop("lm_head.weight"), names))
        wanted = {n: t.shape for t in tensors for n in self._layer_names(t)}
        if missing := [n for n in wanted if n not in names]:
            also = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(f"{self.folder}: no tensor {missing[0]} {_x(wanted[missing[0]])}{also}")
        for name, file in names.items():
            found = self._files.entries[file].shape
            if name not in wanted:
                raise UserError(
                    f"{self.folder}: tensor {file} {_x(found)} has no place in the model that "
                    f"{fuyu.CONFIG_FILE} describes ({d.raw['model_type']})"
                )
            if found != wanted[name]:
                raise UserError(
                    f"{self.folder}: tensor {file} is {_x(found)}, but {fuyu.CONFIG_FILE} makes it "
                    f"{_x(wanted[name])}"
                )
        return names, tuple(ignored)

    def _tied_head(self, head: str, names: dict[str, str]) -> str:
        """The name of a head that repeats the embedding."""
        table = next((names[n] for n in names if n.endswith("embed_tokens.weight")), head)
        a, b = self._files.open(head), self._files.open(table)
        blocks = range(0, len(a), _BLOCK)
        if a.shape != b.shape or not all(
            np.array_equal(a[i : i + _BLOCK], b[i : i + _BLOCK]) for i in blocks
        ):
            raise UserError(
                f"{self.folder}: {head} differs from the embedding, but {fuyu.CONFIG_FILE} ties "
                'them; put "tie_word_embeddings": false there, or take the head out'
            )
        return head


def _rows(path: str) -> bool:
    """Whether a parameter has a row (or column) for every vocabulary entry."""
    return path in ("embedding", "head/kernel")


def _x(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def read_params(
    folder: Path,
    config: ModelConfig | None = None,
    mesh: Mesh | None = None,
    *,
    dtype: str = "float32",
    seed: int = 0,
    first_new: int | None = None,
) -> tuple[Any, ReadReport]:
    """Parameters of a model from a Hugging Face folder; each shard reads its own slices alone.

    Args:
      folder, config, seed, first_new: see `Weights`.
      mesh: where the parameters go, by the rules of training; without it to one device.
      dtype: of the parameters; training wants float32.

    Returns:
      The parameters as `nnx.split(make_decoder(config, ...))` has them, and what was read.

    Raises:
      UserError: see `Weights`.
    """
    weights = Weights(folder, config, seed=seed, first_new=first_new)
    kind = jnp.dtype(dtype)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = weights.shapes
    shardings = (
        jax.tree.map(lambda _: one, shapes) if mesh is None else state_shardings(shapes, mesh)
    )
    made = [
        jax.make_array_from_callback(
            weights.shape(path), sharding, lambda index, path=path: weights.read(path, index, kind)
        )
        for path, sharding in zip(weights.paths, jax.tree.leaves(shardings), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), made), weights.report
