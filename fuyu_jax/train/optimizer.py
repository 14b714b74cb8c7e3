"""optax optimizers from a configuration: AdamW or Muon, warm-up and cosine, clipping, groups."""

import re

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from fuyu_jax.config import OptimConfig
from fuyu_jax.errors import UserError
from fuyu_jax.parallel.mesh import paths

# Muon is for matrices between hidden states. (reduction axes, output axes) of the stacked kernels.
_MUON: tuple[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]], ...] = (
    (r"layers/attention/[qkv]/kernel$", ((1,), (2, 3))),
    (r"layers/attention/out/kernel$", ((1, 2), (3,))),
    (r"layers/mlp/(up|gate|down)/kernel$", ((1,), (2,))),
)


def _map_paths(function, tree):
    """`function(path)` for every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    named = [function(path) for path in paths(tree)]
    assert len(named) == len(leaves)
    return jax.tree.unflatten(treedef, named)


def decay_mask(params):
    """True where weight decay applies: kernels, not norms, biases and embeddings."""
    return _map_paths(lambda path: path.endswith("kernel"), params)


def schedule(config: OptimConfig, peak: float, num_steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine down to `peak · end_lr_ratio` at the last step."""
    warmup = min(config.warmup_steps, max(num_steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(num_steps, warmup + 1),
        end_value=peak * config.end_lr_ratio,
    )


def _multiply(config: OptimConfig, params) -> optax.GradientTransformation:
    """Scales the updates of parameter groups; the first pattern that matches a path counts."""
    known = paths(params)
    for pattern, _ in config.lr_multipliers:
        try:
            if not any(re.search(pattern, path) for path in known):
                raise UserError(f'optim.lr_multipliers: no parameter matches "{pattern}"')
        except re.error as error:
            raise UserError(f'optim.lr_multipliers: "{pattern}": {error}') from None

    def factor(path: str) -> float:
        for pattern, value in config.lr_multipliers:
            if re.search(pattern, path):
                return value
        return 1.0

    def update(updates, state, params=None):
        del params
        factors = _map_paths(factor, updates)
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _muon_dimensions(params):
    def dimensions(path: str):
        for pattern, axes in _MUON:
            if re.search(pattern, path):
                return MuonDimensionNumbers(*axes)
        return None

    return _map_paths(dimensions, params)


def make_optimizer(config: OptimConfig, params, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run.

    Args:
      config: settings.
      params: parameters or their shapes, for the patterns of `lr_multipliers`.
      num_steps: length of the schedule.

    Raises:
      UserError: a pattern that matches no parameter.
    """
    rate = schedule(config, config.peak_lr, num_steps)
    if config.name == "muon":
        core = optax.contrib.muon(
            learning_rate=schedule(config, config.muon_lr, num_steps),
            weight_decay=config.weight_decay,
            weight_decay_mask=decay_mask,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            adam_weight_decay=0.0,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    else:
        core = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    chain.append(core)
    if config.lr_multipliers:
        chain.append(_multiply(config, params))
    return optax.chain(*chain)
