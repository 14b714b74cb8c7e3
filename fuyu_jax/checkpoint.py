"""orbax checkpoints: asynchronous, atomic, items `params`, `opt_state`, `data`, `config` apart, so
that evaluation reads `params` alone; restorable on any mesh."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Mesh

from fuyu_jax import config as config_lib
from fuyu_jax.config import TrainConfig
from fuyu_jax.errors import UserError
from fuyu_jax.parallel.mesh import paths, state_shardings

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"
# Parameters are laid down in pieces of at most so many bytes, so that a reader on another mesh, or
# one that wants a layer alone, need not hold a whole device's part.
PIECE_BYTES = 64 * 2**20

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every save in ten lines


def to_tree(tree: Any) -> dict[str, Any]:
    """Any pytree as nested dictionaries of its paths: a layout that does not change with flax."""
    flat = {tuple(p.split("/")): x for p, x in zip(paths(tree), jax.tree.leaves(tree), strict=True)}
    return traverse_util.unflatten_dict(flat)


def from_tree(nested: dict[str, Any], like: Any) -> Any:
    """The inverse of `to_tree`, in the structure of `like`."""
    flat = {"/".join(k): x for k, x in traverse_util.flatten_dict(nested).items()}
    return jax.tree.unflatten(jax.tree.structure(like), [flat[p] for p in paths(like)])


class Restored(NamedTuple):
    """What a checkpoint gives back."""

    step: int
    params: Any
    opt_state: Any
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of a work folder.

    Args:
      workdir: they lie in its folder `checkpoints/`.
      keep: how many of the latest stay; all, if None.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        self.directory = (workdir / CHECKPOINTS).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            # Named here, so that an item's metadata can be read before anything is restored.
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, params: Any, opt_state: Any, data: dict[str, Any], config: TrainConfig
    ) -> None:
        """Begins to save; returns when the arrays are copied. A step already there stays."""
        if step in self._manager.all_steps():
            return
        tree = to_tree(params)
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE_BYTES), tree)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(tree, save_args=pieces),
                opt_state=ocp.args.StandardSave(to_tree(opt_state)),
                data=ocp.args.JsonSave(data),
                config=ocp.args.JsonSave(config_lib.flatten(config)),
            ),
        )

    def restore(self, step: int, params: Any, opt_state: Any) -> Restored:
        """Restores into the shardings of `params` and `opt_state` (arrays or shapes)."""
        self._check_shapes(step, params)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(to_tree(params)),
                opt_state=ocp.args.StandardRestore(to_tree(opt_state)),
                data=ocp.args.JsonRestore(),
            ),
        )
        return Restored(
            step,
            from_tree(found["params"], params),
            from_tree(found["opt_state"], opt_state),
            found["data"],
        )

    def restore_params(self, step: int, shapes: Any, mesh: Mesh) -> Any:
        """Parameters alone, sharded over a mesh.

        Raises:
          UserError: the checkpoint is of another model; names the parameter and both shapes.
        """
        self._check_shapes(step, shapes)
        targets = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            state_shardings(shapes, mesh),
        )
        found = self._manager.restore(
            step, args=ocp.args.Composite(params=ocp.args.StandardRestore(to_tree(targets)))
        )
        return from_tree(found["params"], shapes)

    def _check_shapes(self, step: int, shapes: Any) -> None:
        where = f"checkpoint {self.directory / str(step)}"
        try:
            metadata = self._manager.item_metadata(step)["params"]
        except Exception as error:
            raise UserError(f"{where}: unreadable ({error})") from None
        if metadata is None:
            raise UserError(f"{where}: it has no params")
        tree = getattr(metadata, "tree", metadata)
        flat = traverse_util.flatten_dict(tree)
        saved = {"/".join(k): tuple(m.shape) for k, m in flat.items()}
        wanted = {
            p: tuple(x.shape) for p, x in zip(paths(shapes), jax.tree.leaves(shapes), strict=True)
        }
        for path in sorted(wanted.keys() | saved.keys()):
            ours, theirs = wanted.get(path), saved.get(path)
            if ours != theirs:
                raise UserError(
                    f"{where} is of another model: parameter {path} is "
                    f"{_shape(theirs)} there and {_shape(ours)} in the config"
                )

    def wait(self) -> None:
        """Until what was begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "a scalar"


def check_workdir(workdir: Path, config: TrainConfig) -> bool:
    """Whether a run of this config was begun in the work folder before; writes nothing.

    Raises:
      UserError: it belongs to another config (the fields that differ are named), or it holds
        files and no config.
    """
    file = workdir / CONFIG_FILE
    if file.is_file():
        changed = config_lib.differences(config, read_config(workdir))
        changed = {k: v for k, v in changed.items() if k not in config_lib.RESUMABLE_CHANGES}
        if changed:
            told = "; ".join(f"{k} is {b!r} there, {a!r} here" for k, (a, b) in changed.items())
            raise UserError(
                f"work folder {workdir} belongs to another config: {told}. Give another --workdir "
                f"(and --config.init_from={workdir} to begin with its parameters)"
            )
        return True
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"work folder {workdir}: it is a file")
    if workdir.is_dir() and any(workdir.iterdir()):
        raise UserError(
            f"work folder {workdir} holds files but no {CONFIG_FILE}, so it is not of a run of "
            "this program; give another --workdir"
        )
    return False


def claim_workdir(workdir: Path, config: TrainConfig) -> None:
    """Makes the work folder this config's."""
    file = workdir / CONFIG_FILE
    if file.is_file():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(config_lib.to_json(config))
    partial.replace(file)


def read_config(workdir: Path) -> TrainConfig:
    """The config that a work folder belongs to.

    Raises:
      UserError: no such folder or config.
    """
    file = workdir / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{workdir}: not a work folder of train.py (it has no {CONFIG_FILE})")
    try:
        return config_lib.from_json(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
