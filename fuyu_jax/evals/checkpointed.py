"""Evaluation of a checkpoint: what `eval.py` calls."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuyu_jax import config as config_lib
from fuyu_jax.config import MeshConfig, TrainConfig
from fuyu_jax.data.opening import open_sources
from fuyu_jax.errors import UserError, nearest
from fuyu_jax.evals import runner
from fuyu_jax.generate.loading import load_checkpoint


def evaluate_checkpoint(
    checkpoint: Path,
    split: str,
    *,
    out: Path | None = None,
    limit: int = 0,
    batch_size: int = 0,
    max_new_tokens: int = 0,
    blind: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates a split and writes samples, metrics and sheet.

    Args:
      checkpoint: a work folder or one of its checkpoints.
      split: of the run's data.
      out: where to write; `WORKDIR/eval/SPLIT-step_N` if not given.
      limit: examples at most; 0 for all.
      batch_size, max_new_tokens: the config's where 0.
      blind: zero all patches.
      overrides: changes to the run's config, `name=value`.

    Raises:
      UserError: bad input.
    """

    def change(config: TrainConfig) -> TrainConfig:
        # The devices here need not be those of training.
        config = dataclasses.replace(config, mesh=MeshConfig())
        return config_lib.replace(config, dict(o.split("=", 1) for o in overrides))

    loaded = load_checkpoint(checkpoint, change)
    sources = open_sources(loaded.config.data)
    if split not in sources.splits:
        raise UserError(f'split "{split}" is not there{nearest(split, sources.splits)}')
    source = sources.open(split)
    name = f"{split}_blind" if blind else split
    out = out or loaded.workdir / "eval" / f"{name}-step_{loaded.step}"
    about = {"checkpoint": str(checkpoint), "step": loaded.step, "split": split}
    engine = loaded.engine(batch_size, max_new_tokens)
    metrics = runner.run(engine, loaded.params, source, out, limit=limit, blind=blind, about=about)
    print(f"{runner.table(metrics)}\n{out / runner.SHEET_FILE}", flush=True)
    return metrics
