"""Cross-entropy in chunks, at loss positions only, with the gradient made in the same pass.

Full logits would be V floats a position (8.6 GB a row at S = 8192 and V = 262,144). Positions
with a weight are gathered to the front, and a loop of as many chunks as they fill computes
logits, loss and gradients of one chunk at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from fuyu_jax.parallel.shards import row_shards, sum_shards

CHUNK = 512


def _slice(x: jax.Array, at: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, at, size)


def _chunk_terms(hidden, kernel, targets, weights, z_loss):
    """Logits, where the target is, log-sum-exp, and the sums of loss and hits.

    Targets are found by comparison, so that a vocabulary split over `tensor` stays split.
    """
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    chosen = jnp.arange(logits.shape[1]) == targets[:, None]
    peak = jnp.max(logits, axis=-1)
    lse = peak + jnp.log(jnp.sum(jnp.exp(logits - peak[:, None]), axis=-1))
    picked = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    loss = jnp.sum((lse - picked + z_loss * lse * lse) * weights)
    return logits, chosen, lse, loss, jnp.sum((picked >= peak) & (weights > 0))


def _by_weight(hidden, targets, weights, chunk):
    """Flattens, brings weighted positions to the front in order, pads to whole chunks."""
    flat = weights.reshape(-1)
    size = -(-flat.size // chunk) * chunk
    count = jnp.sum(flat != 0)
    order = jnp.argsort(flat == 0, stable=True)
    order = jnp.pad(order, (0, size - flat.size))
    live = jnp.arange(size) < count
    rows = hidden.reshape(-1, hidden.shape[-1])[order]
    return rows, targets.reshape(-1)[order], jnp.where(live, flat[order], 0), order, count


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss_sums(hidden, kernel, targets, weights, chunk, z_loss):
    kernel = kernel.astype(hidden.dtype)  # once, not once a chunk

    def local(hidden, targets, weights):
        rows, targets, weights, _, count = _by_weight(hidden, targets, weights, chunk)

        def body(i, sums):
            at = [_slice(a, i * chunk, chunk) for a in (rows, targets, weights)]
            _, _, _, loss, hits = _chunk_terms(at[0], kernel, at[1], at[2], z_loss)
            return sums[0] + loss, sums[1] + hits

        zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
        return jax.lax.fori_loop(0, -(-count // chunk), body, zero)

    return sum_shards(local, (True, True), hidden, targets, weights)


def _loss_sums_forward(hidden, kernel, targets, weights, chunk, z_loss):
    kind, kernel = kernel.dtype, kernel.astype(hidden.dtype)

    def local(hidden, targets, weights):
        rows, flat_targets, flat_weights, order, count = _by_weight(hidden, targets, weights, chunk)

        def body(i, carry):
            total, hits, d_rows, d_kernel = carry
            at = i * chunk
            h, t, w = (_slice(a, at, chunk) for a in (rows, flat_targets, flat_weights))
            logits, chosen, lse, loss, hit = _chunk_terms(h, kernel, t, w, z_loss)
            shares = jnp.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None]
            d_logits = ((shares - chosen) * w[:, None]).astype(h.dtype)
            d_h = jnp.matmul(d_logits, kernel.T)
            d_kernel = d_kernel + jnp.matmul(h.T, d_logits, preferred_element_type=jnp.float32)
            d_rows = jax.lax.dynamic_update_slice_in_dim(d_rows, d_h, at, 0)
            return total + loss, hits + hit, d_rows, d_kernel

        init = (
            jnp.zeros((), jnp.float32),
            jnp.zeros((), jnp.int32),
            jnp.zeros_like(rows),
            jnp.zeros(kernel.shape, jnp.float32),
        )
        total, hits, d_rows, d_kernel = jax.lax.fori_loop(0, -(-count // chunk), body, init)
        # The padding of `order` points at position 0; its rows' gradients are 0.
        d_hidden = jnp.zeros((targets.size, hidden.shape[-1]), hidden.dtype).at[order].add(d_rows)
        return total, hits, d_hidden.reshape(hidden.shape), d_kernel.astype(kind)

    total, hits, d_hidden, d_kernel = sum_shards(
        local, (True, True, False, True), hidden, targets, weights
    )
    return (total, hits), (d_hidden, d_kernel)


def _loss_sums_backward(chunk, z_loss, saved, cotangents):
    del chunk, z_loss
    d_hidden, d_kernel = saved
    scale = cotangents[0]
    d_kernel = (d_kernel * scale).astype(d_kernel.dtype)
    return (d_hidden * scale).astype(d_hidden.dtype), d_kernel, None, None


_loss_sums.defvjp(_loss_sums_forward, _loss_sums_backward)


def loss_sums(
    hidden: Float[Array, "B S D"],
    kernel: Float[Array, "D V"],
    tokens: Int32[Array, "B S"],
    loss_weights: Float32[Array, "B S"],
    chunk: int = CHUNK,
    z_loss: float = 0.0,
) -> tuple[Float32[Array, ""], Int32[Array, ""]]:
    """Σ weight · cross-entropy, and how many weighted tokens are the most likely one.

    Args:
      hidden: states after the final norm; the state at t-1 predicts token t.
      kernel: the output map.
      tokens: the row's tokens.
      loss_weights: weight of predicting `tokens[t]`; the first token of a segment has none.
      chunk: positions whose logits exist at one time.
      z_loss: weight of (log-sum-exp of the logits)², a part of the loss where it is not 0: it keeps
        the softmax's denominator near 1 (PaLM, arXiv:2204.02311).

    Only the first result carries a gradient, to `hidden` and `kernel`.
    """
    targets = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    weights = jnp.concatenate([loss_weights[:, 1:], jnp.zeros_like(loss_weights[:, :1])], axis=1)
    chunk = min(chunk, targets.size // row_shards(targets.shape[0]))
    return _loss_sums(hidden, kernel, targets, weights, chunk, z_loss)
