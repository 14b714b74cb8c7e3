"""A Hugging Face folder as a work folder: parameters, config, tokenizer, and what goes back."""

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from fuyu_jax import config as config_lib
from fuyu_jax.checkpoint import CONFIG_FILE
from fuyu_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from fuyu_jax.errors import UserError
from fuyu_jax.interop import fuyu
from fuyu_jax.interop.files import (
    TOKENIZER_FILES,
    Origin,
    keep_files,
    origin_dtypes,
    whole_or_nothing,
)
from fuyu_jax.interop.images import image_policy
from fuyu_jax.interop.store import Stored, write_params
from fuyu_jax.interop.weights import ReadReport, Weights
from fuyu_jax.parallel.mesh import AXES, state_shardings
from fuyu_jax.tokenizer_extend import Extended, extend_tokenizer


def to_work_folder(
    source: Path,
    target: Path,
    *,
    image_tokens: bool = True,
    patch_size: int = 30,
    seed: int = 0,
    mesh: MeshConfig | None = None,
) -> ReadReport:
    """Writes a work folder that `generate.loading.load_checkpoint` opens, of checkpoint 0.

    Parameters keep the type of the files, and are cast when they are read for training.

    Args:
      source: a folder as transformers saves it.
      target: a folder that is not there yet.
      image_tokens: of a text model: extend its vocabulary with the pieces that Fuyu needs.
      patch_size: of a text model's new patch projection.
      seed: of what is new.
      mesh: of the run to come: files are cut so that each of its devices reads its own alone.

    Raises:
      UserError: see `Weights`; the target is there.
    """
    described = fuyu.describe(source)
    with whole_or_nothing(target) as folder:
        extended = None
        if image_tokens and not described.fuyu:
            extended = extend_tokenizer(source, folder)
        weights = Weights(
            source,
            _model_config(described, extended, patch_size),
            seed=seed,
            first_new=extended.old_size if extended else None,
        )
        origin = origin_of(weights, extended)
        config = TrainConfig(
            name=target.name,
            workdir=str(target),
            model=dataclasses.replace(
                weights.config, dtype="float32" if origin.dtype == "F32" else "bfloat16"
            ),
            data=_data_config(source, described),
            mesh=mesh or MeshConfig(),
        )
        kept = keep_files(source, folder, origin)
        if extended is None:
            for name in set(kept) & set(TOKENIZER_FILES):
                shutil.copyfile(source / name, folder / name)
        write_params(folder, config, _stored(weights, mesh or MeshConfig(1)), weights.read)
        (folder / CONFIG_FILE).write_text(config_lib.to_json(config))
    return weights.report


def origin_of(weights: Weights, extended: Extended | None) -> Origin:
    """What a work folder has to remember of a folder, to hand its weights back."""
    d = weights.described
    dtype, others = origin_dtypes(weights.file_dtypes)
    image_token_id = extended.tokenizer.image_id if extended else d.image_token_id
    return Origin(d.text_type, d.fuyu, extended is not None, image_token_id, dtype, others, d.raw)


def _model_config(
    described: fuyu.Described, extended: Extended | None, patch_size: int
) -> ModelConfig:
    config = described.config
    if not described.fuyu:
        config = dataclasses.replace(config, patch_size=patch_size)
    if extended is not None:
        size = max(config.vocab_size, extended.vocab_size)
        config = dataclasses.replace(config, vocab_size=size)
    return config


def _data_config(source: Path, described: fuyu.Described) -> DataConfig:
    """Images as the folder's processor makes them, so that both folders say the same."""
    if not described.fuyu:
        return DataConfig()
    policy = image_policy(source, described.config.patch_size)
    return DataConfig(
        max_image_height=policy.max_height,
        max_image_width=policy.max_width,
        pad_value=policy.pad_value,
        jpeg_draft=policy.draft,
    )


def _stored(weights: Weights, mesh: MeshConfig) -> Iterator[Stored]:
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if min(sizes) < 1:
        told = ",".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh {told}: for a file every axis needs its number")
    shardings = state_shardings(weights.shapes, AbstractMesh(sizes, AXES))
    for path, sharding in zip(weights.paths, jax.tree.leaves(shardings), strict=True):
        shape = weights.shape(path)
        place = weights.place(path)
        layered = place is not None and place.tensor.layered
        # What is new has no rows of a file's; any axis serves.
        row = place.part.row_axis + layered if place else len(shape) - 1
        shard = sharding.shard_shape(shape) if math.prod(shape) else shape
        yield Stored(path, shape, weights.dtype(path), row, layered, shard)
