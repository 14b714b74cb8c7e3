"""A trained model from its checkpoint: config, tokenizer, graph and parameters."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh

from fuyu_jax.checkpoint import CHECKPOINTS, Checkpoints, read_config
from fuyu_jax.config import TrainConfig
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.errors import UserError
from fuyu_jax.generate.engine import Engine
from fuyu_jax.interop.files import TOKENIZER_FILES, read_origin
from fuyu_jax.model.checking import backend_here, checked_backend
from fuyu_jax.model.decoder import Decoder, make_decoder
from fuyu_jax.parallel.mesh import make_mesh
from fuyu_jax.text_tokenizer import NoTokenizer, TextTokenizer
from fuyu_jax.tokenizer import Tokenizer


def model_maker(config: TrainConfig, tokenizer: Tokenizer):
    """A function that makes the run's model.

    Raises:
      UserError: a vocabulary smaller than the tokenizer's.
    """
    model = config.model
    if not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size} pieces"
        )

    def make() -> Decoder:
        return make_decoder(
            model, image_id=tokenizer.image_id, newline_id=tokenizer.newline_id, seed=config.seed
        )

    return make


class Loaded(NamedTuple):
    """A model to be asked."""

    config: TrainConfig
    workdir: Path
    step: int
    tokenizer: Tokenizer
    policy: LayoutPolicy
    graph: nnx.GraphDef
    params: Any

    def engine(self, batch_size: int = 0, max_new_tokens: int = 0) -> Engine:
        """An engine with the config's settings where none are given."""
        return Engine(
            self.graph,
            self.tokenizer,
            self.policy,
            batch_size=batch_size or self.config.eval.batch_size,
            max_new_tokens=max_new_tokens or self.config.eval.max_new_tokens,
            mesh=make_mesh(self.config.mesh),
        )

    def model(self) -> Decoder:
        return nnx.merge(self.graph, self.params)


def load_checkpoint(
    path: Path, change: Callable[[TrainConfig], TrainConfig] = lambda config: config
) -> Loaded:
    """Opens a work folder (its latest checkpoint) or `WORKDIR/checkpoints/STEP`; reads parameters
    alone, over the config's mesh.

    Args:
      path: the folder.
      change: applied to the run's config.

    Raises:
      UserError: no checkpoint there, one of another model's shape, or attention that is wrong here.
    """
    workdir, step = find_checkpoint(path)
    saved = read_config(workdir)
    config = change(dataclasses.replace(saved, model=backend_here(saved.model)))
    checked_backend(config.model)
    tokenizer = open_run_tokenizer(workdir, config.model.vocab_size)
    graph, shapes = nnx.split(nnx.eval_shape(model_maker(config, tokenizer)))
    params = read_checkpoint_params(workdir, step, shapes, make_mesh(config.mesh))
    policy = LayoutPolicy.of(config.model, config.data)
    return Loaded(config, workdir, step, tokenizer, policy, graph, params)


def open_run_tokenizer(workdir: Path, vocab_size: int) -> Tokenizer:
    """A run's tokenizer; of a language model that was given no image tokens, its own or none."""
    origin = read_origin(workdir)
    if origin is None or origin.fuyu or origin.extended:
        return Tokenizer(workdir)
    if not any((workdir / name).is_file() for name in TOKENIZER_FILES):
        return NoTokenizer(workdir, vocab_size)
    return TextTokenizer(workdir)


def find_checkpoint(path: Path) -> tuple[Path, int]:
    """The work folder and step of a work folder (its latest) or `WORKDIR/checkpoints/STEP`.

    Raises:
      UserError: no checkpoint there.
    """
    path = path.expanduser()
    if not path.is_dir():
        raise UserError(f"checkpoint {path}: no such folder")
    if path.name.isdigit() and path.parent.name == CHECKPOINTS:
        return path.parent.parent, int(path.name)
    workdir = path.parent if path.name == CHECKPOINTS else path
    read_config(workdir)  # or else it is no work folder
    checkpoints = Checkpoints(workdir)
    try:
        step = checkpoints.latest()
    finally:
        checkpoints.close()
    if step is None:
        raise UserError(f"{workdir}: no checkpoint in it yet")
    return workdir, step


def read_checkpoint_params(workdir: Path, step: int, shapes: Any, mesh: Mesh) -> Any:
    """Parameters of a checkpoint over a mesh.

    Raises:
      UserError: it is not there, or of another model's shape.
    """
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.restore_params(step, shapes, mesh)
    finally:
        checkpoints.close()
