"""The parts of a decoder block: norm, linear map, attention, feed-forward."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from fuyu_jax.config import ModelConfig
from fuyu_jax.model.attention import KeyRange, attend, reference_probabilities
from fuyu_jax.model.blockwise import blockwise_with_lse
from fuyu_jax.model.paged import PagedCache, Prior, decode_attention, merge, prior_attention
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


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` [*any, I] times `kernel` [I, O].

    Its gradient is written out for the CPU's compiler: JAX's own is the transpose of gᵀ·x, and XLA
    copies g transposed for it and takes twice the time.
    """
    return jnp.matmul(x, kernel)


def _product_forward(x, kernel):
    return jnp.matmul(x, kernel), (x, kernel)


def _product_backward(saved, g):
    x, kernel = saved
    flat = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.matmul(g, kernel.T), jax.lax.dot_general(*flat, (((0,), (0,)), ((), ())))


_product.defvjp(_product_forward, _product_backward)


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

    def __call__(self, x: jax.Array, name: str = "") -> jax.Array:
        """The map; `name` is what remat policies know the product by."""
        # As one matrix: of [D,H,E] the TPU's compiler makes a convolution over H, and it pads
        # a last axis of 64 to 128 wherever the product is kept.
        kernel = self.kernel[...].astype(x.dtype)
        kernel, outputs = kernel.reshape(-1, math.prod(kernel.shape[self.inputs :])), kernel.shape
        lead = x.shape[: x.ndim - self.inputs]
        y = _product(x.reshape(*lead, kernel.shape[0]), kernel)
        if name:
            y = checkpoint_name(y, name)
        y = y.reshape(*lead, *outputs[self.inputs :])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class KeysAndValues(NamedTuple):
    """Of a row's tokens in one layer; of all layers, with a leading axis L."""

    k: Float[Array, "*L B S K E"]
    v: Float[Array, "*L B S K E"]


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
        self.window = config.window
        self.scale = 1 / math.sqrt(e)

    def heads(
        self,
        x: Float[Array, "B S D"],
        tables: tuple[Float32[Array, "B S R"], Float32[Array, "B S R"]],
    ) -> tuple[Float[Array, "B S H E"], Float[Array, "B S K E"], Float[Array, "B S K E"]]:
        """Queries and keys, normed and rotated, and values."""
        q, k, v = (project(x, "qkv") for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *tables), rotate(k, *tables), v

    def __call__(self, x: Float[Array, "B S D"], tables, keys: KeyRange):
        """Attends inside the row; also returns the row's keys and values, for a cache."""
        q, k, v = self.heads(x, tables)
        out = attend(q, k, v, keys, window=self.window, backend=self.backend, scale=self.scale)
        return self.out(out), KeysAndValues(k, v)

    def probabilities(
        self, x: Float[Array, "B S D"], tables, keys: KeyRange
    ) -> Float32[Array, "B H S S"]:
        """The attention weights, dense: for looking at, not for training."""
        q, k, _ = self.heads(x, tables)
        return reference_probabilities(q, k, keys, self.scale)

    def go_on(
        self,
        x: Float[Array, "B S D"],
        tables,
        keys: KeyRange,
        cache: PagedCache,
        layer: Int32[Array, ""],
        prior: Prior,
        positions: Int32[Array, "B S"],
    ):
        """As `__call__`, with what of the prompts is in the cache before the row's own tokens."""
        q, k, v = self.heads(x, tables)
        own, own_lse = blockwise_with_lse(q, k, v, keys.start, keys.stop, self.scale)
        before, lse = prior_attention(
            q, cache, layer, prior, positions, window=self.window, scale=self.scale
        )
        out = merge(own, own_lse, before, lse)
        return self.out(out.astype(x.dtype)), KeysAndValues(k, v)

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        tables,
        cache: PagedCache,
        layer: Int32[Array, ""],
        table: Int32[Array, "B M"],
        lengths: Int32[Array, "B"],
    ):
        """One new token a row, which sees its pages and itself; also its key and value."""
        q, k, v = self.heads(x, tables)
        out = decode_attention(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            cache,
            layer,
            table,
            lengths,
            window=self.window,
            scale=self.scale,
        )
        return self.out(out[:, None].astype(x.dtype)), KeysAndValues(k, v)


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

    def go_on(self, x: Float[Array, "B S D"], *args: Any):
        """As `__call__`, behind what is in the cache: see `Attention.go_on`."""
        out, new = self.attention.go_on(self.attention_norm(x), *args)
        return self._feed_forward(x + out), new

    def decode(self, x: Float[Array, "B 1 D"], *args: Any):
        """One new token a row: see `Attention.decode`."""
        out, new = self.attention.decode(self.attention_norm(x), *args)
        return self._feed_forward(x + out), new
