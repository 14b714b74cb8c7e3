"""A work folder's checkpoint as a Hugging Face folder, in transformers' newest names."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fuyu_jax.checkpoint import read_config
from fuyu_jax.config import ModelConfig, TrainConfig
from fuyu_jax.errors import UserError
from fuyu_jax.interop import fuyu
from fuyu_jax.interop.files import (
    KEPT,
    TOKENIZER_FILES,
    Origin,
    kept_files,
    read_origin,
    whole_or_nothing,
)
from fuyu_jax.interop.images import PROCESSOR_FILES, update_image_files
from fuyu_jax.interop.mapping import FileTensor
from fuyu_jax.interop.store import SLAB, StoredParams, find_step
from fuyu_jax.interop.tensors import DTYPES, SHARD_BYTES, Tensor, write_tensors
from fuyu_jax.interop.tokenizer_file import takes_images, write_tokenizer_json
from fuyu_jax.tokenizer import Tokenizer
from fuyu_jax.vocabulary import JSON_FILE, MODEL_FILE

# Of the original config.json: what the model here has no setting for, and goes back as it was.
_CARRIED = (
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_dropout",
    "hidden_dropout",
)
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SCRATCH = "layers.partial"
_TRAINING_ONLY = "patch_head/"  # the auxiliary loss's
_NO_IMAGES = (
    "transformers' processor opens and takes texts, but no images: of the placeholders it cuts off "
    "the first token, a space that Fuyu's own vocabulary puts there and this one does not; feed "
    "its model with fuyu_jax's Processor"
)


class WriteReport(NamedTuple):
    """What was written: tensors, their bytes, the model type, and what a user must know."""

    tensors: int
    bytes: int
    model_type: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        told = f"wrote {self.tensors} tensors, {self.bytes / 1e9:.2f} GB, as {self.model_type}"
        return "; ".join([told, *self.notes])


def to_hugging_face(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    text_only: bool = False,
    limit: int = SHARD_BYTES,
) -> WriteReport:
    """Writes a folder that transformers opens: `fuyu`, over the text model's own type.

    Args:
      source: a work folder, or one of its checkpoints.
      target: a folder that is not there yet.
      dtype: of all tensors; by default each tensor's own from before, else as stored.
      text_only: the text model alone, under its own model type; the patch projection is left out.
      limit: bytes of a file at most.

    Raises:
      UserError: a model with settings that no model of transformers has; a broken checkpoint.
    """
    workdir, step = find_step(source)
    run = read_config(workdir)
    origin = read_origin(workdir)
    stored = StoredParams(workdir / "checkpoints" / str(step))
    if "embedding" not in stored.paths:
        raise UserError(f"checkpoint {stored.folder}: it has no parameter embedding")
    model = dataclasses.replace(run.model, vocab_size=stored.shape("embedding")[0])
    fuyu.check_exportable(model)
    text = fuyu.text_fields(model, origin.text_type if origin else None)
    found = fuyu.file_tensors(model, text["model_type"], not text_only)
    notes = _left_out(stored, found, model, text_only)
    dtypes = _dtypes(stored, origin, dtype)
    tensors = [
        Tensor(name, kind := dtypes(t, name), t.shape, _slabs(stored, t, layer, kind))
        for t, layer, name in _in_order(found, model.num_layers)
    ]
    names = [t.dtype.name for t in tensors]
    common = max(sorted(set(names)), key=names.count)
    config = _config(model, text, origin, common, text_only, workdir)
    with whole_or_nothing(target) as folder:
        layered = (part.path for t in found if t.layered for part in t.parts)
        stored.cut_into_layers(layered, folder / _SCRATCH)
        write_tensors(folder, tensors, limit)
        shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
        notes += _other_files(folder, workdir, run, origin, text_only)
        (folder / fuyu.CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    kind = config["model_type"] + ("" if text_only else f" over {text['model_type']}")
    return WriteReport(len(tensors), sum(t.bytes for t in tensors), kind, tuple(notes))


def _in_order(found: list[FileTensor], layers: int) -> Iterator[tuple[FileTensor, int | None, str]]:
    """Tensors as a model has them: what comes before the layers, layer by layer, the rest."""
    layered = [t for t in found if t.layered]
    first = found.index(layered[0]) if layered else len(found)
    yield from ((t, None, t.name) for t in found[:first])
    for layer in range(layers):
        yield from ((t, layer, t.name.format(layer)) for t in layered)
    yield from ((t, None, t.name) for t in found[first:] if not t.layered)


def _left_out(
    stored: StoredParams, found: list[FileTensor], model: ModelConfig, text_only: bool
) -> list[str]:
    """Checks that every parameter goes somewhere; tells of those that do not."""
    wanted: dict[str, tuple[int, ...]] = {}
    for tensor in found:
        layers = (model.num_layers,) if tensor.layered else ()
        wanted |= {part.path: layers + part.shape(tensor.factored) for part in tensor.parts}
    for path, shape in wanted.items():
        theirs = stored.shape(path) if path in stored.paths else "missing"
        if theirs != shape:
            raise UserError(
                f"{stored.folder}: parameter {path} is {theirs} there and {shape} in the config"
            )
    notes = []
    for path in stored.paths:
        if path in wanted:
            continue
        if path.startswith(_TRAINING_ONLY):
            notes.append(f"{path} left out (of the training loss alone)")
        elif text_only and path.startswith("patch_projection/"):
            notes.append(f"{path} left out (a text model has no place for it)")
        else:
            raise UserError(f"{stored.folder}: parameter {path} has no place in transformers' Fuyu")
    return notes


def _dtypes(
    stored: StoredParams, origin: Origin | None, dtype: str | None
) -> Callable[[FileTensor, str], np.dtype]:
    given = {name: DTYPES[short] for short, name in _DTYPE_NAMES.items()}

    def choose(tensor: FileTensor, name: str) -> np.dtype:
        if dtype is not None:
            return given[dtype]
        if origin is not None:
            return origin.dtype_of(name)
        return stored.dtype(tensor.parts[0].path)

    return choose


def _slabs(
    stored: StoredParams, tensor: FileTensor, layer: int | None, dtype: np.dtype
) -> Callable[[], Iterator[np.ndarray]]:
    """Rows of a file tensor, as many at a time as fit a slab (whole chunks of the checkpoint)."""

    def slabs() -> Iterator[np.ndarray]:
        rows = tensor.factored[0]
        row_bytes = max(int(np.prod(tensor.factored[1:])) * 4, 1)
        lead = () if layer is None else (layer,)
        extent = max(stored.chunk(p.path)[len(lead) + p.row_axis] for p in tensor.parts)
        step = extent * max(SLAB // (row_bytes * extent), 1)
        for at in range(0, rows, step):
            out = np.empty((min(step, rows - at), *tensor.factored[1:]), dtype)
            for part in tensor.parts:
                index = [slice(None)] * len(part.order)
                index[part.row_axis] = slice(at, at + len(out))
                part.view(out)[...] = stored.read(part.path, (*lead, *index))
            yield out

    return slabs


def _config(
    model: ModelConfig,
    text: dict[str, Any],
    origin: Origin | None,
    dtype: str,
    text_only: bool,
    workdir: Path,
) -> dict[str, Any]:
    before = origin.config if origin else {}
    before = {**before, **(before.get("text_config") or {})}
    text = {"max_position_embeddings": 16_384, "use_cache": True, **text}
    text |= {name: before[name] for name in _CARRIED if name in before}
    text["dtype"] = dtype
    if text_only:
        kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
        name = kind.get(text["model_type"], "Persimmon")
        return {"architectures": [f"{name}ForCausalLM"], **text}
    return {
        "architectures": ["FuyuForCausalLM"],
        "model_type": "fuyu",
        "dtype": dtype,
        "image_token_id": _image_token_id(origin, workdir),
        "patch_size": model.patch_size,
        "num_channels": 3,
        "tie_word_embeddings": model.tie_embeddings,
        **{n: text[n] for n in ("bos_token_id", "eos_token_id", "pad_token_id") if n in text},
        "text_config": text,
    }


def _image_token_id(origin: Origin | None, workdir: Path) -> int:
    known = origin is not None and origin.image_token_id is not None
    if known and (origin.extended or not _own_tokenizer(origin, workdir)):
        return origin.image_token_id
    return Tokenizer(workdir).image_id


def _own_tokenizer(origin: Origin | None, workdir: Path) -> bool:
    """Whether the run's tokenizer is another than the one that came with the weights."""
    if origin is None or origin.extended:
        return True
    for name in (JSON_FILE, MODEL_FILE):
        if (workdir / name).is_file():
            kept = workdir / KEPT / name
            return not kept.is_file() or kept.read_bytes() != (workdir / name).read_bytes()
    return False


def _other_files(
    folder: Path,
    workdir: Path,
    run: TrainConfig,
    origin: Origin | None,
    text_only: bool,
) -> list[str]:
    """Tokenizer, processor and generation files; returns what is lacking."""
    own = _own_tokenizer(origin, workdir)
    for file in kept_files(workdir, tokenizer=not own):
        shutil.copyfile(file, folder / file.name)
    notes = []
    if own:
        for name in TOKENIZER_FILES:
            if (workdir / name).is_file():
                shutil.copyfile(workdir / name, folder / name)
    if not (folder / JSON_FILE).is_file():
        lacking = "no tokenizer in the work folder"
        if (folder / MODEL_FILE).is_file():
            lacking = write_tokenizer_json(folder / MODEL_FILE, folder)
        if lacking:
            notes.append(f"{lacking}, so transformers' processor does not open")
    if not text_only and (folder / JSON_FILE).is_file() and not takes_images(folder / JSON_FILE):
        notes.append(_NO_IMAGES)
    file = folder / "generation_config.json"
    if not file.is_file() and (folder / JSON_FILE).is_file():
        with contextlib.suppress(UserError):  # a text model's, without image tokens
            tokenizer = Tokenizer(folder)
            ids = {
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id,
            }
            file.write_text(json.dumps(ids, indent=2) + "\n")
    if not text_only and any((folder / name).is_file() for name in PROCESSOR_FILES):
        update_image_files(folder, run)
    elif not text_only:
        (folder / "preprocessor_config.json").write_text(
            json.dumps(_preprocessor(run), indent=2) + "\n"
        )
    return notes


def _preprocessor(run: TrainConfig) -> dict[str, Any]:
    """What FuyuImageProcessor does, as this run's data does it."""
    size = {"height": run.data.max_image_height, "width": run.data.max_image_width}
    patch = {"height": run.model.patch_size, "width": run.model.patch_size}
    return {
        "processor_class": "FuyuProcessor",
        "image_processor_type": "FuyuImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": 2,
        "do_pad": True,
        "padding_value": float(run.data.pad_value),
        "padding_mode": "constant",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": 0.5,
        "image_std": 0.5,
        "patch_size": patch,
    }
