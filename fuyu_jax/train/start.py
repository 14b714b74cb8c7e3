"""Where a run's parameters come from, if they are not drawn: `init_from`."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fuyu_jax.checkpoint import CHECKPOINTS
from fuyu_jax.config import TrainConfig
from fuyu_jax.errors import UserError
from fuyu_jax.generate.loading import find_checkpoint, read_checkpoint_params
from fuyu_jax.interop import Weights, describe, read_params
from fuyu_jax.interop.files import KEPT, copy_origin, is_work_folder, keep_files
from fuyu_jax.interop.importing import origin_of
from fuyu_jax.parallel.mesh import make_mesh
from fuyu_jax.tokenizer import Tokenizer
from fuyu_jax.tokenizer_extend import Extended, extend_tokenizer


@runtime_checkable
class Start(Protocol):
    """A model to begin from.

    tokenizer: its file. sees: its patch projection is trained.
    """

    tokenizer: Path
    sees: bool

    def read_params(self, shapes: Any) -> Any:
        """Parameters on the run's mesh."""

    def finish(self, workdir: Path) -> str:
        """Keeps in the work folder what it takes to hand the model back; says what was read."""


def open_start(config: TrainConfig, workdir: Path, scratch: Path) -> Start | None:
    """The model that a run begins from; None where it begins afresh, or has a checkpoint.

    Args:
      config: the run; `init_from` is a Hugging Face folder, a work folder or a checkpoint in one.
      workdir: of the run.
      scratch: for a language model's extended tokenizer.

    Raises:
      UserError: it is no such folder, or of another model than the config's.
    """
    folder = Path(config.init_from).expanduser()
    if not config.init_from or any((workdir / CHECKPOINTS).glob("[0-9]*")):
        return None
    if not folder.is_dir():
        raise UserError(f"init_from={config.init_from}: no such folder")
    opened = FromCheckpoint if is_work_folder(folder) else FromHuggingFace
    return opened(config, folder, scratch)


class FromCheckpoint:
    """A checkpoint of ours, and its run's tokenizer."""

    sees = True

    def __init__(self, config: TrainConfig, folder: Path, scratch: Path):
        del scratch
        self.workdir, self.step = find_checkpoint(folder)
        opened = Tokenizer(self.workdir)
        self.tokenizer = opened.path
        _check_vocabulary(config, opened.vocab_size)
        self._mesh = make_mesh(config.mesh)

    def read_params(self, shapes: Any) -> Any:
        return read_checkpoint_params(self.workdir, self.step, shapes, self._mesh)

    def finish(self, workdir: Path) -> str:
        copy_origin(self.workdir, workdir)
        return f"begun from step {self.step} of {self.workdir}"


class FromHuggingFace:
    """A folder as transformers saves it: Fuyu, or a language model that is to learn to see."""

    def __init__(self, config: TrainConfig, folder: Path, scratch: Path):
        described = describe(folder)
        self.sees = described.fuyu
        self._extended: Extended | None = None
        if described.fuyu or config.data.tokenizer:
            opened = Tokenizer(config.data.tokenizer or folder)
        else:
            self._extended = extend_tokenizer(folder, scratch / "extended")
            opened = self._extended.tokenizer
        self.tokenizer = opened.path
        _check_vocabulary(config, max(described.config.vocab_size, opened.vocab_size))
        self._arguments: dict[str, Any] = {
            "seed": config.seed,
            "first_new": self._extended.old_size if self._extended else None,
        }
        self._folder, self._model = folder, config.model
        self._mesh = make_mesh(config.mesh)
        self._weights = Weights(folder, config.model, **self._arguments)

    def read_params(self, shapes: Any) -> Any:
        del shapes  # the config has been checked against the folder
        return read_params(self._folder, self._model, self._mesh, **self._arguments)[0]

    def finish(self, workdir: Path) -> str:
        if not (workdir / KEPT).exists():
            keep_files(self._folder, workdir, origin_of(self._weights, self._extended))
        return f"begun from {self._folder}: {self._weights.report}"


def _check_vocabulary(config: TrainConfig, needed: int) -> None:
    if config.model.vocab_size < needed:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}: init_from={config.init_from} and its "
            f"tokenizer need {needed} or more; set it"
        )
