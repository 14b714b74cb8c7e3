"""Choosing the next token: the likeliest, or one by chance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from fuyu_jax.errors import UserError


class Sampling(NamedTuple):
    """How tokens are drawn. temperature: divides the logits; 0 takes the likeliest. top_p: only of
    the likeliest tokens whose probabilities together first reach this (nucleus sampling,
    arXiv:1904.09751). seed: what is drawn depends on it, the prompt's number and the position, not
    on the batch."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises UserError: a setting out of its range."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give more than 0, and 1 at most")
        if self.top_p < 1 and not self.temperature:
            raise UserError(
                f"top_p={self.top_p} changes nothing where temperature=0 takes the likeliest token"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: give 0 to 4294967295")


class Draw(NamedTuple):
    """`Sampling` for a jitted function, with what makes each draw its own. number: of the prompt.
    position: of the token that is drawn."""

    temperature: Float32[Array, ""]
    top_p: Float32[Array, ""]
    seed: Int32[Array, ""] | jax.Array
    number: Int32[Array, "N"]
    position: Int32[Array, "N"]


def nucleus(scores: Float32[Array, "N V"], top_p: Float32[Array, ""]) -> Bool[Array, "N V"]:
    """Which tokens may be drawn: the fewest of the likeliest that reach `top_p`, ties included."""
    best = -jnp.sort(-scores, axis=-1)
    shares = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    last = jnp.sum(before < top_p, axis=-1) - 1
    return scores >= jnp.take_along_axis(best, jnp.maximum(last, 0)[:, None], axis=-1)


def choose(logits: Float32[Array, "N V"], draw: Draw | None = None) -> Int32[Array, "N"]:
    """The next tokens; without `draw` the likeliest (of equals the first).

    Args:
      logits: minus infinity for what may not be chosen.
      draw: how to draw.
    """
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits / draw.temperature
    scores = jnp.where(nucleus(scores, draw.top_p), scores, -jnp.inf)
    base = jax.random.key(draw.seed)

    def one(number, position, scores):
        key = jax.random.fold_in(jax.random.fold_in(base, number), position)
        return jax.random.categorical(key, scores)

    return jax.vmap(one)(draw.number, draw.position, scores).astype(jnp.int32)
