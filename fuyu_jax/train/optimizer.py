"""optax optimizers from a configuration: AdamW, Adafactor or Muon; schedule, clipping, groups,
freezing."""

import re
from collections.abc import Sequence

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

# Adafactor factors a parameter over its two largest axes where both have so many places. Heads of
# 64 times 64 channels are to be factored; the axis of stacked layers is not.
_FACTOR_FROM = 64


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


def _check_patterns(field: str, patterns: Sequence[str], known: list[str]) -> None:
    for pattern in patterns:
        try:
            if not any(re.search(pattern, path) for path in known):
                raise UserError(f'optim.{field}: no parameter matches "{pattern}"')
        except re.error as error:
            raise UserError(f'optim.{field}: "{pattern}": {error}') from None


def is_frozen(config: OptimConfig, path: str) -> bool:
    """Whether the parameter at a path does not learn."""
    return any(re.search(pattern, path) for pattern in config.freeze)


def count_frozen(config: OptimConfig, params) -> int:
    """How many numbers of the parameters do not learn."""
    leaves = zip(paths(params), jax.tree.leaves(params), strict=True)
    return sum(x.size for path, x in leaves if is_frozen(config, path))


def _multiply(config: OptimConfig, params) -> optax.GradientTransformation:
    """Scales the updates of parameter groups; the first pattern that matches a path counts."""
    _check_patterns("lr_multipliers", [p for p, _ in config.lr_multipliers], paths(params))

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


def _adafactor(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """optax's, with rates that mean what AdamW's do: not scaled by the parameters' size, and weight
    decay times the rate."""
    if config.moment_dtype != "float32":
        raise UserError(
            f"optim.moment_dtype={config.moment_dtype}: Adafactor keeps no first moment, and its "
            "factored second ones are small; leave it float32"
        )
    core = optax.adafactor(
        min_dim_size_to_factor=_FACTOR_FROM, multiply_by_parameter_scale=False, momentum=None
    )
    # The sign is turned twice: by optax's own last step, and with the rate.
    return optax.chain(
        core,
        optax.add_decayed_weights(-config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(rate, flip_sign=False),
    )


def _core(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    rate = schedule(config, config.peak_lr, num_steps)
    if config.name == "adafactor":
        return _adafactor(config, rate)
    if config.name == "muon":
        return optax.contrib.muon(
            learning_rate=schedule(config, config.muon_lr, num_steps),
            weight_decay=config.weight_decay,
            weight_decay_mask=decay_mask,
            mu_dtype=config.moment_dtype,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            adam_weight_decay=0.0,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    return optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        mu_dtype=config.moment_dtype,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def make_optimizer(config: OptimConfig, params, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run.

    Frozen parameters have no part in it: no state, no update, no share in the clipped norm.

    Args:
      config: settings.
      params: parameters or their shapes, for the patterns of `lr_multipliers` and `freeze`.
      num_steps: length of the schedule.

    Raises:
      UserError: a pattern that matches no parameter; nothing is left to learn.
    """
    chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    chain.append(_core(config, num_steps))
    if config.lr_multipliers:
        chain.append(_multiply(config, params))
    learning = optax.chain(*chain)
    if not config.freeze:
        return learning
    known = paths(params)
    _check_patterns("freeze", config.freeze, known)
    if all(is_frozen(config, path) for path in known):
        raise UserError(f"optim.freeze: nothing is left to learn of {len(known)} parameters")
    return optax.partition(
        {"learning": learning, "frozen": optax.set_to_zero()},
        lambda tree: _map_paths(
            lambda path: "frozen" if is_frozen(config, path) else "learning", tree
        ),
    )
