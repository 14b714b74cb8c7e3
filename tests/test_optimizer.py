"""Optimizers against optax called by hand, and what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fuyu_jax.config import OptimConfig
from fuyu_jax.errors import UserError
from fuyu_jax.model.decoder import make_decoder
from fuyu_jax.parallel.mesh import paths
from fuyu_jax.train.optimizer import count_frozen, decay_mask, make_optimizer, schedule

STEPS = 10
PLAIN = {"warmup_steps": 2, "clip_norm": 0.0, "peak_lr": 0.01}


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(rng.normal(size=(96, 80)), jnp.float32),
        "layers": {
            "mlp": {"up": {"kernel": jnp.asarray(rng.normal(size=(2, 80, 64)), jnp.float32)}},
            "norm": {"scale": jnp.ones((2, 80))},
        },
    }


def walk(tx, steps=4):
    params = tree()
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(tree(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def equal(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 0, "atol": 0} | tolerance))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_is_optax_s(dtype):
    config = OptimConfig(**PLAIN, moment_dtype=dtype)
    params, state = walk(make_optimizer(config, tree(), STEPS))
    rate = schedule(config, 0.01, STEPS)
    theirs = optax.adamw(rate, 0.9, 0.95, mu_dtype=dtype, weight_decay=0.1, mask=decay_mask)
    equal(params, walk(theirs)[0])
    (adam,) = (s for s in jax.tree.leaves(state, is_leaf=_adam) if _adam(s))
    assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}


def _adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def test_adafactor_is_optax_s_and_its_moments_are_factored():
    config = OptimConfig(**PLAIN, name="adafactor", weight_decay=0.0)
    params, state = walk(make_optimizer(config, tree(), STEPS))
    theirs = optax.adafactor(
        schedule(config, 0.01, STEPS),
        min_dim_size_to_factor=64,
        multiply_by_parameter_scale=False,
    )
    equal(params, walk(theirs)[0], rtol=1e-6, atol=1e-7)
    held = sum(x.size for x in jax.tree.leaves(state))
    # Rows and columns instead of all places; the norm's scales are kept whole.
    assert held < (96 + 80) + 2 * (80 + 64) + 2 * 80 + 16


def test_adafactor_decays_matrices_by_the_rate():
    config = OptimConfig(**PLAIN, name="adafactor", weight_decay=0.5)
    tx = make_optimizer(config, tree(), STEPS)
    params, nothing = tree(), jax.tree.map(jnp.zeros_like, tree())
    updates, _ = tx.update(nothing, tx.init(params), params)
    rate = schedule(config, 0.01, STEPS)(0)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(
        updates["layers"]["mlp"]["up"]["kernel"], -0.5 * rate * kernel, rtol=1e-5
    )
    assert not np.any(updates["embedding"])


def test_muon_is_optax_s():
    config = OptimConfig(**PLAIN, name="muon", moment_dtype="bfloat16")
    params, _ = walk(make_optimizer(config, tree(), STEPS))
    up = optax.contrib.MuonDimensionNumbers((1,), (2,))
    theirs = optax.contrib.muon(
        schedule(config, 0.02, STEPS),
        weight_decay=0.1,
        weight_decay_mask=decay_mask,
        mu_dtype="bfloat16",
        adam_b2=0.95,
        adam_learning_rate=schedule(config, 0.01, STEPS),
        muon_weight_dimension_numbers={
            "embedding": None,
            "layers": {"mlp": {"up": {"kernel": up}}, "norm": {"scale": None}},
        },
    )
    equal(params, walk(theirs)[0])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_frozen_parameters_stay_and_have_no_state(name):
    config = OptimConfig(**{**PLAIN, "clip_norm": 1.0}, name=name, freeze=("^embedding", "scale$"))
    params, state = walk(make_optimizer(config, tree(), STEPS))
    equal(params["embedding"], tree()["embedding"])
    equal(params["layers"]["norm"], tree()["layers"]["norm"])
    for x, y in zip(*(jax.tree.leaves(t["layers"]["mlp"]) for t in (params, tree())), strict=True):
        assert np.any(x != y)
    assert not [p for p in paths(state) if "embedding" in p or "scale" in p]
    assert count_frozen(config, tree()) == 96 * 80 + 2 * 80
    # What learns does so as if the rest were not there.
    alone = OptimConfig(**{**PLAIN, "clip_norm": 1.0}, name=name)
    only = {"layers": {"mlp": tree()["layers"]["mlp"]}}
    tx = make_optimizer(alone, only, STEPS)
    opt = tx.init(only)
    for step in range(4):
        grads = {"layers": {"mlp": tree(step + 1)["layers"]["mlp"]}}
        updates, opt = tx.update(grads, opt, only)
        only = optax.apply_updates(only, updates)
    equal(only["layers"]["mlp"], params["layers"]["mlp"], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_groups_and_freezing_work_on_a_model(name, tiny_model):
    import dataclasses

    model = make_decoder(dataclasses.replace(tiny_model, vocab_size=64), image_id=1, newline_id=2)
    params = nnx.split(model)[1]
    config = OptimConfig(
        **PLAIN, name=name, freeze=("embedding", "head"), lr_multipliers=(("attention", 0.0),)
    )
    tx = make_optimizer(config, params, STEPS)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    moved = {p for p, u in zip(paths(updates), jax.tree.leaves(updates), strict=True) if np.any(u)}
    assert moved and not [p for p in moved if "embedding" in p or "head" in p or "attention" in p]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("nonesuch",)}, r'optim\.freeze: no parameter matches "nonesuch"'),
        ({"freeze": ("(",)}, r'optim\.freeze: "\(":'),
        ({"freeze": ("",)}, "nothing is left to learn of 3 parameters"),
        ({"name": "adafactor", "moment_dtype": "bfloat16"}, "keeps no first moment"),
    ],
)
def test_settings_that_mean_nothing_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimConfig(**changes), tree(), STEPS)
