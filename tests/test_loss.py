"""The chunked loss against a plain one over all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fuyu_jax.model.loss import loss_sums


def plain(hidden, kernel, tokens, weights):
    logp = jax.nn.log_softmax(hidden[:, :-1] @ kernel, axis=-1)
    picked = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights[:, 1:])


def case(rng, rows=3, size=41, width=16, vocab=60, share=0.3):
    hidden = jnp.asarray(rng.normal(size=(rows, size, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, vocab, (rows, size)), jnp.int32)
    weights = (rng.random((rows, size)) < share) * rng.uniform(0.5, 2, (rows, size))
    return hidden, kernel, tokens, jnp.asarray(weights, jnp.float32)


@pytest.mark.parametrize(("share", "chunk"), [(0.3, 16), (1.0, 7), (0.02, 512)])
def test_loss_and_gradients_equal_the_plain_form(share, chunk):
    hidden, kernel, tokens, weights = case(np.random.default_rng(chunk), share=share)
    ours = jax.jit(
        jax.value_and_grad(lambda h, k: loss_sums(h, k, tokens, weights, chunk)[0] * 3, (0, 1))
    )(hidden, kernel)
    theirs = jax.value_and_grad(lambda h, k: plain(h, k, tokens, weights) * 3, (0, 1))(
        hidden, kernel
    )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-6)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)  # float32 sums of up to 123 terms of size 10


def test_without_gradient_it_is_the_same_sum():
    hidden, kernel, tokens, weights = case(np.random.default_rng(5))
    value, _ = jax.jit(lambda: loss_sums(hidden, kernel, tokens, weights, 16))()
    np.testing.assert_allclose(value, plain(hidden, kernel, tokens, weights), rtol=2e-6)


def test_hits_count_weighted_positions_whose_token_is_the_most_likely():
    hidden, kernel, tokens, weights = case(np.random.default_rng(6))
    best = np.asarray(jnp.argmax(hidden @ kernel, -1))
    tokens = np.asarray(tokens).copy()
    tokens[:, 1::2] = best[:, :-1][:, ::2]
    _, hits = loss_sums(hidden, kernel, jnp.asarray(tokens), weights, 16)
    expected = ((best[:, :-1] == tokens[:, 1:]) & (np.asarray(weights)[:, 1:] > 0)).sum()
    assert int(hits) == expected > 5


def test_no_weight_at_all_is_zero_with_zero_gradient():
    hidden, kernel, tokens, weights = case(np.random.default_rng(7))
    value, grad = jax.value_and_grad(
        lambda h: loss_sums(h, kernel, tokens, jnp.zeros_like(weights), 16)[0]
    )(hidden)
    assert value == 0
    assert (np.asarray(grad) == 0).all()


def test_wide_logits_do_not_overflow():
    hidden, kernel, tokens, weights = case(np.random.default_rng(8))
    value, grad = jax.value_and_grad(lambda h: loss_sums(h, kernel, tokens, weights, 16)[0])(
        hidden * 1e4
    )
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_z_loss_equals_the_plain_form():
    hidden, kernel, tokens, weights = case(np.random.default_rng(9))

    def plain_z(hidden, kernel):
        lse = jax.nn.logsumexp(hidden[:, :-1] @ kernel, axis=-1)
        return plain(hidden, kernel, tokens, weights) + 0.1 * jnp.sum(lse**2 * weights[:, 1:])

    ours = jax.jit(
        jax.value_and_grad(lambda h, k: loss_sums(h, k, tokens, weights, 16, 0.1)[0], (0, 1))
    )(hidden, kernel)
    theirs = jax.value_and_grad(plain_z, (0, 1))(hidden, kernel)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-6)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
