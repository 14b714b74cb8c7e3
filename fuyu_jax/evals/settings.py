"""What `eval.py` is told, where it asks tasks."""

from dataclasses import dataclass
from pathlib import Path

from fuyu_jax.config import MeshConfig
from fuyu_jax.errors import UserError, nearest

_AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Settings:
    """A run of `eval.py`; each is a flag."""

    data: Path
    tasks: str
    checkpoint: Path | None = None
    out: Path | None = None
    num_shots: int = 0
    shots: Path | None = None
    batch_size: int = 16
    max_new_tokens: int = 64
    mesh: str = ""
    dtype: str = "float32"
    limit: int = 0
    seed: int = 0
    image_dir: Path | None = None
    skip_bad: bool = False
    resume: bool = False
    predict_only: bool = False
    score_only: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def check(self) -> None:
        """Raises UserError: flags that make no sense together."""
        if self.score_only and self.predict_only:
            raise UserError("--score_only and --predict_only: give one or the other")
        if self.score_only and self.checkpoint is not None:
            raise UserError("--score_only loads no model; leave --checkpoint out")
        if not self.score_only and self.checkpoint is None:
            raise UserError("give --checkpoint=FOLDER, or --score_only for answers that are there")
        if self.num_shots and self.shots is None:
            raise UserError(f"--num_shots={self.num_shots}: give --shots=FILE to take them from")
        least = {"num_shots": 0, "limit": 0, "batch_size": 1, "max_new_tokens": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"--{name}={getattr(self, name)}: give {low} or more")
        parse_mesh(self.mesh)
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f'--dtype={self.dtype}: "float32" or "bfloat16"')


def parse_mesh(text: str) -> MeshConfig | None:
    """`data=1,fsdp=-1` as a mesh; None for an empty text.

    Raises:
      UserError: an unknown axis, or no number.
    """
    if not text:
        return None
    axes: dict[str, int] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in _AXES:
            raise UserError(f'--mesh={text}: unknown axis "{name}"{nearest(name, _AXES)}')
        try:
            axes[name] = int(value)
        except ValueError:
            raise UserError(f"--mesh={text}: give {name}=NUMBER, or -1 for what is left") from None
    # What is said is all there is: only without `data` does `data` take what is left.
    return MeshConfig(**({"data": 1} | axes if -1 in axes.values() else axes))
