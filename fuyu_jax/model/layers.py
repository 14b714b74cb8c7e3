"""The parts of a decoder block: norm, linear map, attention, feed-forward."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from fuyu_jax.config import ModelConfig
from fuyu_jax.model.attention import KeyRange, attend, reference_probabilities
from fuyu_jax.model.rotary import rotate


class Norm(nnx.Module):
    """LayerNorm (weight and bias) or RMSNorm (weight) over the last axis, computed in float32."""

    def __init__(self, size: int, config: ModelConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        layernorm = config.norm == "layernorm"
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32)) if layernorm else None

    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """A linear map from the trailing axes `inputs` to the axes `outputs`.

    The kernel is [*inputs, *outputs] and drawn from normal(0, std).
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        bias: bool,
        std: float,
        rngs: nnx.Rngs,
    ):
        self.inputs = len(inputs)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*inputs, *outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        last = tuple(range(x.ndim - self.inputs, x.ndim))
        axes = ((last, tuple(range(self.inputs))), ((), ()))
        y = jax.lax.dot_general(x, self.kernel[...].astype(x.dtype), axes)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class KeysAndValues(NamedTuple):
    """The cache of one layer; of all layers, with a leading axis L."""

    k: Float[Array, "*L B T K E"]
    v: Float[Array, "*L B T K E"]


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values, q/k norm and partial rotary."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, h, k, e = config.dim, config.num_heads, config.kv_heads, config.head_dim
        std = config.init_std
        self.q = Linear((d,), (h, e), bias=config.qkv_bias, std=std, rngs=rngs)
        self.k = Linear((d,), (k, e), bias=config.qkv_bias, std=std, rngs=rngs)
        self.v = Linear((d,), (k, e), bias=config.qkv_bias, std=std, rngs=rngs)
        self.out = Linear((h, e), (d,), bias=config.out_bias, std=std, rngs=rngs)
        # One weight and bias for all heads, over the head size, before rotary (Persimmon).
        self.q_norm = Norm(e, config) if config.qk_norm else None
        self.k_norm = Norm(e, config) if config.qk_norm else None
        self.backend = config.attention_backend
        self.scale = 1 / math.sqrt(e)

    def heads(
        self,
        x: Float[Array, "B S D"],
        tables: tuple[Float32[Array, "B S R"], Float32[Array, "B S R"]],
    ) -> tuple[Float[Array, "B S H E"], Float[Array, "B S K E"], Float[Array, "B S K E"]]:
        """Queries and keys, normed and rotated, and values."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *tables), rotate(k, *tables), v

    def __call__(self, x: Float[Array, "B S D"], tables, keys: KeyRange):
        """Attends inside the row; also returns this row's keys and values, for a cache."""
        q, k, v = self.heads(x, tables)
        out = attend(q, k, v, keys, backend=self.backend, scale=self.scale)
        return self.out(out), KeysAndValues(k, v)

    def probabilities(
        self, x: Float[Array, "B S D"], tables, keys: KeyRange
    ) -> Float32[Array, "B H S S"]:
        """The attention weights, dense: for looking at, not for training."""
        q, k, _ = self.heads(x, tables)
        return reference_probabilities(q, k, keys, self.scale)

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        tables,
        cache: KeysAndValues,
        at: Int32[Array, "B"],
        start: Int32[Array, "B"],
    ):
        """One new token a row: stored at index `at`, seeing keys `start..at` of the cache."""
        q, k, v = self.heads(x, tables)
        rows = jnp.arange(x.shape[0])
        cache = KeysAndValues(
            cache.k.at[rows, at].set(k[:, 0].astype(cache.k.dtype)),
            cache.v.at[rows, at].set(v[:, 0].astype(cache.v.dtype)),
        )
        b, _, h, e = q.shape
        kv = cache.k.shape[2]
        grouped = q.reshape(b, kv, h // kv, e)
        scores = jnp.einsum("bkge,btke->bkgt", grouped, cache.k, preferred_element_type=jnp.float32)
        t = jnp.arange(cache.k.shape[1])
        seen = (t >= start[:, None]) & (t <= at[:, None])
        scores = jnp.where(seen[:, None, None], scores * self.scale, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(cache.v.dtype)
        out = jnp.einsum("bkgt,btke->bkge", weights, cache.v, preferred_element_type=jnp.float32)
        return self.out(out.reshape(b, 1, h, e).astype(x.dtype)), cache


class FeedForward(nnx.Module):
    """up → relu² → down (Persimmon), or the gated forms of Llama (silu) and Gemma (gelu)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.dim, config.mlp_dim
        std, bias = config.init_std, config.mlp_bias
        self.kind = config.mlp
        gated = config.mlp != "relu2"
        self.gate = Linear((d,), (f,), bias=bias, std=std, rngs=rngs) if gated else None
        self.up = Linear((d,), (f,), bias=bias, std=std, rngs=rngs)
        self.down = Linear((f,), (d,), bias=bias, std=std, rngs=rngs)

    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        y = self.up(x)
        if self.gate is None:
            return self.down(jnp.square(jax.nn.relu(y)))
        act = jax.nn.silu if self.kind == "silu_gated" else jax.nn.gelu
        return self.down(act(self.gate(x)) * y)


class Block(nnx.Module):
    """Pre-norm block: x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.dim, config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = Norm(config.dim, config)
        self.mlp = FeedForward(config, rngs=rngs)

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.mlp_norm(x))

    def __call__(self, x: Float[Array, "B S D"], tables, keys: KeyRange):
        out, cache = self.attention(self.attention_norm(x), tables, keys)
        return self._feed_forward(x + out), cache

    def looking(self, x: Float[Array, "B S D"], tables, keys: KeyRange):
        """The block's output and its attention weights."""
        weights = self.attention.probabilities(self.attention_norm(x), tables, keys)
        return self(x, tables, keys)[0], weights

    def decode(self, x: Float[Array, "B 1 D"], tables, cache: KeysAndValues, at, start):
        out, cache = self.attention.decode(self.attention_norm(x), tables, cache, at, start)
        return self._feed_forward(x + out), cache
