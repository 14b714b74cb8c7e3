"""The comparison that a kernel must pass before it is used."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from fuyu_jax.config import ModelConfig
from fuyu_jax.errors import UserError
from fuyu_jax.model import checking
from fuyu_jax.model.attention import attend

CONFIG = ModelConfig(num_heads=4, num_kv_heads=2, head_dim=16, dim=64)


@pytest.fixture(autouse=True)
def fresh():
    checking.compare.cache_clear()


def replaced(monkeypatch, wrong=lambda out, q, k, v: out, start=lambda start: start):
    """The kernel is blockwise attention, with something wrong about it."""

    def kernel(q, k, v, keys, *, window, backend):
        keys = keys._replace(start=start(keys.start))
        return wrong(attend(q, k, v, keys, window=window, backend="blockwise"), q, k, v)

    monkeypatch.setattr(checking, "attend", kernel)
    monkeypatch.setattr(checking, "choose_backend", lambda name, image_attention: "pallas")


@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize("images", ["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_kernel_passes_and_is_told_once(monkeypatch, capsys, dtype, images, window):
    replaced(monkeypatch)
    config = dataclasses.replace(CONFIG, dtype=dtype, image_attention=images, window=window)
    assert checking.checked_backend(config) == checking.checked_backend(config) == "pallas"
    assert capsys.readouterr().out.count('backend "pallas" on this cpu is what the reference') == 1


@jax.custom_jvp
def spoilt(x):
    """`x`, with a gradient that is not a number in one place."""
    return x


@spoilt.defjvp
def _(primals, tangents):
    return primals[0], tangents[0].at[0, 9].multiply(jnp.nan)


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("out by ", {"start": lambda start: start + (start > 0)}),  # one key too few
        ("out by ", {"start": lambda start: jnp.where(start == 250, 249, start)}),  # one too many
        ("out by nan", {"wrong": lambda out, q, k, v: out.at[0, 3, 0, 0].set(jnp.nan)}),
        ("dv by nan", {"wrong": lambda out, q, k, v: out + 0 * spoilt(v).repeat(2, 2)}),
    ],
)
def test_a_wrong_kernel_does_not(monkeypatch, told, wrong):
    replaced(monkeypatch, **wrong)
    with pytest.raises(UserError, match=rf"differs from the reference \(.*{told}.*blockwise"):
        checking.checked_backend(CONFIG)


def test_a_kernel_that_does_not_run(monkeypatch):
    """Pallas has no compiler for a CPU."""
    monkeypatch.setattr(checking, "choose_backend", lambda name, image_attention: "pallas")
    with pytest.raises(UserError, match=r'"pallas" on this cpu does not run \(.*\); choose model'):
        checking.checked_backend(CONFIG)


def test_plain_jax_is_not_tried(monkeypatch):
    monkeypatch.setattr(checking, "compare", None)
    assert checking.checked_backend(CONFIG) == "blockwise"


def test_a_checkpoint_of_another_machine(capsys):
    """Trained with a TPU's kernel and named so; opened here."""
    splash = dataclasses.replace(CONFIG, attention_backend="splash")
    assert checking.backend_here(splash) == CONFIG
    assert 'backend "splash" runs on TPU and this is cpu' in capsys.readouterr().out
    assert checking.backend_here(CONFIG) is CONFIG
