"""The encoder-free decoder: patches through one linear map, in among the text's embeddings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import ModelConfig
from fuyu_jax.model import patch_loss
from fuyu_jax.model.attention import KeyRange, key_range
from fuyu_jax.model.layers import Block, KeysAndValues, Linear, Norm
from fuyu_jax.model.paged import PagedCache, Prior
from fuyu_jax.model.remat import rematerialise
from fuyu_jax.model.rotary import RotaryScaling, rotary_tables

FREQUENCIES = 12  # an axis
Prepare = Callable[[Any], Any]  # of a layer's parameters


def position_features(coords: Int32[Array, "B P 2"]) -> Float32[Array, "B P features"]:
    """Sines and cosines of row and column at wavelengths from 4 to 512 patches (any size fits)."""
    wavelengths = 4 * 2 ** jnp.linspace(0, 7, FREQUENCIES)
    angles = coords[..., None].astype(jnp.float32) * (2 * jnp.pi / wavelengths)
    both = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both.reshape(*coords.shape[:-1], -1)


@jax.custom_vjp
def look_up(table: Float[Array, "V D"], tokens: Int32[Array, "B S"]) -> Float[Array, "B S D"]:
    """Rows of a table, whose gradient is summed in float32 whatever the table's type."""
    return table[tokens]


def _look_up_forward(table, tokens):
    # An empty slice carries the table's type and width.
    return table[tokens], (table[:0], table.shape[0], tokens)


def _look_up_backward(saved, d_out):
    like, rows, tokens = saved
    sums = jnp.zeros((rows, like.shape[1]), jnp.float32)
    return sums.at[tokens].add(d_out.astype(jnp.float32)).astype(like.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Decoder(nnx.Module):
    """A decoder-only transformer over text tokens and raw image patches (Fuyu; Persimmon).

    Args:
      config: sizes and settings; `vocab_size` must be set.
      image_id: the placeholder token: its k-th occurrence in a row is the row's k-th patch.
      newline_id: the token after every row of patches.
      rngs: for initialisation.
    """

    def __init__(self, config: ModelConfig, *, image_id: int, newline_id: int, rngs: nnx.Rngs):
        self.config = config
        self.image_id = image_id
        self.newline_id = newline_id
        std = config.init_std
        d, v = config.dim, config.vocab_size
        self.embedding = nnx.Param(
            (config.embedding_init_std or std) * jax.random.normal(rngs.params(), (v, d))
        )
        self.patch_projection = Linear(
            (config.patch_channels,),
            (d,),
            bias=True,
            std=config.patch_init_std or std,
            rngs=rngs,
        )

        size = 4 * FREQUENCIES
        # About as strong as the patch itself: half of the features' squares is 1.
        strength = (config.patch_init_std or std) / (size / 2) ** 0.5
        self.patch_position = (
            Linear((size,), (d,), bias=False, std=strength, rngs=rngs)
            if config.image_positions == "fourier"
            else None
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_layers(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        # One Block whose parameters have a leading layer axis, walked by a scan: one compile.
        self.layers = make_layers(rngs)
        self.final_norm = Norm(d, config)
        self.head = (
            None if config.tie_embeddings else Linear((d,), (v,), bias=False, std=std, rngs=rngs)
        )

        self.patch_head = (
            Linear((d,), (patch_loss.SIZE,), bias=True, std=std, rngs=rngs)
            if config.patch_loss == "edges"
            else None
        )

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output map, which may be the embedding's transpose."""
        return self.embedding[...].T if self.head is None else self.head.kernel[...]

    def embed(self, batch: PackedBatch) -> Float[Array, "B S D"]:
        """Token embeddings, with projected patches in the placeholders' stead."""
        x = look_up(self.embedding[...], jnp.asarray(batch.tokens)).astype(self.dtype)
        if batch.patches.shape[1] == 0:
            return x
        # The reference's (x/255 - 0.5)/0.5, in float32 whatever the compute type.
        pixels = (batch.patches.astype(jnp.float32) / 255 - 0.5) / 0.5
        projected = self.patch_projection(pixels.astype(self.dtype))
        if self.patch_position is not None:
            features = position_features(jnp.asarray(batch.patch_coords))
            projected = projected + self.patch_position(features.astype(self.dtype))
        is_patch = batch.tokens == self.image_id
        index = self._patch_index(batch)
        placed = jnp.take_along_axis(projected, index[..., None], axis=1)
        return jnp.where(is_patch[..., None], placed, x)

    def _patch_index(self, batch: PackedBatch) -> Int32[Array, "B S"]:
        """The patch that each placeholder stands for (any patch where there is none)."""
        index = jnp.cumsum(batch.tokens == self.image_id, axis=1, dtype=jnp.int32) - 1
        return jnp.clip(index, 0, batch.patches.shape[1] - 1)

    def key_range(self, batch: PackedBatch) -> KeyRange:
        """What each token sees under this model's settings."""
        image_ids = None
        if self.config.image_attention == "bidirectional" and batch.patches.shape[1]:
            coords = jnp.take_along_axis(
                jnp.asarray(batch.patch_coords), self._patch_index(batch)[..., None], axis=1
            )
            is_patch = batch.tokens == self.image_id
            begins = is_patch & (coords == 0).all(-1)
            inside = is_patch | (batch.tokens == self.newline_id)
            image_ids = jnp.where(inside, jnp.cumsum(begins, axis=1, dtype=jnp.int32), 0)
        return key_range(batch.segment_ids, image_ids, self.config.window)

    def _tables(self, positions):
        c = self.config
        scaling = RotaryScaling.of(c)
        return rotary_tables(positions, c.head_dim, c.rotary_fraction, c.rotary_base, scaling)

    def _scan(self, method, x, *layer_inputs, prepare: Prepare | None = None):
        """Runs `method(block, x, *inputs of this layer)` over the layers.

        `prepare`, if given, makes of a layer's parameters what is computed with: gathers them.
        """
        graph, state = nnx.split(self.layers)

        def step(x, inputs):
            layer, extra = inputs
            return method(nnx.merge(graph, prepare(layer) if prepare else layer), x, *extra)

        walk = rematerialise(step, self.config.remat, gathers=prepare is not None)
        return jax.lax.scan(walk, x, (state, layer_inputs))

    def __call__(self, batch: PackedBatch, prepare: Prepare | None = None) -> Float[Array, "B S D"]:
        """Hidden states after the final norm; `logits` maps them to the vocabulary."""
        tables = self._tables(batch.positions)
        keys = self.key_range(batch)
        x = self.embed(batch)
        walk = lambda block, x: (block(x, tables, keys)[0], None)  # noqa: E731
        x, _ = self._scan(walk, x, prepare=prepare)
        return self.final_norm(x)

    def training_states(
        self, batch: PackedBatch, prepare: Prepare | None = None
    ) -> tuple[Float[Array, "B S D"], Float32[Array, ""]]:
        """As `__call__`, and the sum over patches of the auxiliary loss (0 where it is off)."""
        if self.patch_head is None or batch.patches.shape[1] == 0:
            return self(batch, prepare), jnp.zeros((), jnp.float32)
        tables = self._tables(batch.positions)
        keys = self.key_range(batch)
        layer = self.config.patch_loss_layer

        def walk(block, carry, number):
            x, tapped = carry
            x = block(x, tables, keys)[0]
            return (x, jnp.where(number == layer, x, tapped)), None

        x = self.embed(batch)
        numbers = jnp.arange(1, self.config.num_layers + 1)
        (x, tapped), _ = self._scan(walk, (x, x), numbers, prepare=prepare)
        place, real = self._patch_places(batch)
        states = jnp.take_along_axis(tapped, place[..., None], axis=1)
        # Normed, as every reader of the residual stream sees it.
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(states), axis=-1, keepdims=True) + 1e-5)
        edges = self.patch_head(states * scale)
        loss = patch_loss.edge_loss(edges, batch.patches, real, self.config.patch_size)
        return self.final_norm(x), loss

    def _patch_places(self, batch: PackedBatch) -> tuple[Int32[Array, "B P"], Bool[Array, "B P"]]:
        """Where each patch's placeholder stands in its row, and whether there is such a patch."""
        is_patch = batch.tokens == self.image_id
        order = jnp.argsort(~is_patch, axis=1, stable=True)
        number = min(batch.patches.shape[1], order.shape[1])
        real = jnp.arange(number) < is_patch.sum(axis=1, keepdims=True)
        room = ((0, 0), (0, batch.patches.shape[1] - number))
        return jnp.pad(order[:, :number].astype(jnp.int32), room), jnp.pad(real, room)

    def logits(self, hidden: Float[Array, "*any D"]) -> Float32[Array, "*any V"]:
        """Scores of every vocabulary entry, in float32."""
        kernel = self.head_kernel().astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def prefill(
        self, batch: PackedBatch, cache: PagedCache | None = None, prior: Prior | None = None
    ) -> tuple[Float[Array, "B S D"], KeysAndValues]:
        """As `__call__`, and the keys and values of all layers.

        Args:
          batch: packed rows; with `prior` their segments may be a prompt's later part.
          cache, prior: what of the prompts has been computed already.
        """
        tables = self._tables(batch.positions)
        keys = self.key_range(batch)
        x = self.embed(batch)
        if prior is None or cache is None:
            x, new = self._scan(lambda block, x: block(x, tables, keys), x)
        else:
            positions = jnp.asarray(batch.positions)
            x, new = self._scan(
                lambda block, x, layer: block.go_on(
                    x, tables, keys, cache, layer, prior, positions
                ),
                x,
                jnp.arange(self.config.num_layers, dtype=jnp.int32),
            )
        return self.final_norm(x), new

    def decode(
        self,
        tokens: Int32[Array, "B"],
        lengths: Int32[Array, "B"],
        table: Int32[Array, "B M"],
        cache: PagedCache,
    ) -> tuple[Float[Array, "B D"], KeysAndValues]:
        """One step: a text token a row behind the `lengths` tokens that its pages hold.

        Returns:
          Their hidden states, and their keys and values, which are still to be written.
        """
        tables = self._tables(lengths[:, None])
        x = self.embedding[...][tokens[:, None]].astype(self.dtype)
        x, new = self._scan(
            lambda block, x, layer: block.decode(x, tables, cache, layer, table, lengths),
            x,
            jnp.arange(self.config.num_layers, dtype=jnp.int32),
        )
        return self.final_norm(x)[:, 0], new

    def attention_maps(self, batch: PackedBatch) -> Float32[Array, "L B H S S"]:
        """Attention weights of every layer and head (dense: keep S small)."""
        tables = self._tables(batch.positions)
        keys = self.key_range(batch)
        x = self.embed(batch)
        return self._scan(lambda block, x: block.looking(x, tables, keys), x)[1]


def make_decoder(config: ModelConfig, *, image_id: int, newline_id: int, seed: int = 0) -> Decoder:
    """A decoder with fresh parameters."""
    return Decoder(config, image_id=image_id, newline_id=newline_id, rngs=nnx.Rngs(params=seed))


def count_parameters(model: nnx.Module) -> int:
    """Numbers in all parameters."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
