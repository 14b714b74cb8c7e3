"""The encoder-free decoder: patches through one linear map, in among the text's embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import ModelConfig
from fuyu_jax.model import patch_loss
from fuyu_jax.model.attention import KeyRange, key_range
from fuyu_jax.model.layers import Block, KeysAndValues, Linear, Norm
from fuyu_jax.model.rotary import RotaryScaling, rotary_tables

FREQUENCIES = 12  # an axis


def position_features(coords: Int32[Array, "B P 2"]) -> Float32[Array, "B P features"]:
    """Sines and cosines of row and column at wavelengths from 4 to 512 patches (any size fits)."""
    wavelengths = 4 * 2 ** jnp.linspace(0, 7, FREQUENCIES)
    angles = coords[..., None].astype(jnp.float32) * (2 * jnp.pi / wavelengths)
    both = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both.reshape(*coords.shape[:-1], -1)


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
        x = self.embedding[...][batch.tokens].astype(self.dtype)
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

    def _scan(self, method, x, *layer_inputs):
        """Runs `method(block, x, *inputs of this layer)` over the layers."""
        graph, state = nnx.split(self.layers)

        def step(x, inputs):
            layer, extra = inputs
            return method(nnx.merge(graph, layer), x, *extra)

        if self.config.remat == "full":
            step = jax.checkpoint(step, prevent_cse=False)
        return jax.lax.scan(step, x, (state, layer_inputs))

    def __call__(self, batch: PackedBatch) -> Float[Array, "B S D"]:
        """Hidden states after the final norm; `logits` maps them to the vocabulary."""
        tables = self._tables(batch.positions)
        keys = self.key_range(batch)
        x = self.embed(batch)
        x, _ = self._scan(lambda block, x: (block(x, tables, keys)[0], None), x)
        return self.final_norm(x)

    def training_states(
        self, batch: PackedBatch
    ) -> tuple[Float[Array, "B S D"], Float32[Array, ""]]:
        """As `__call__`, and the sum over patches of the auxiliary loss (0 where it is off)."""
        if self.patch_head is None or batch.patches.shape[1] == 0:
            return self(batch), jnp.zeros((), jnp.float32)
        tables = self._tables(batch.positions)
        keys = self.key_range(batch)
        layer = self.config.patch_loss_layer

        def walk(block, carry, number):
            x, tapped = carry
            x = block(x, tables, keys)[0]
            return (x, jnp.where(number == layer, x, tapped)), None

        x = self.embed(batch)
        numbers = jnp.arange(1, self.config.num_layers + 1)
        (x, tapped), _ = self._scan(walk, (x, x), numbers)
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
        self, batch: PackedBatch, cache_size: int
    ) -> tuple[Float[Array, "B S D"], KeysAndValues]:
        """As `__call__`, and a cache of `cache_size` places a row, the first S of them filled."""
        tables = self._tables(batch.positions)
        keys = self.key_range(batch)
        x = self.embed(batch)
        x, cache = self._scan(lambda block, x: block(x, tables, keys), x)
        room = ((0, 0), (0, 0), (0, cache_size - batch.tokens.shape[1]), (0, 0), (0, 0))
        cache = KeysAndValues(jnp.pad(cache.k, room), jnp.pad(cache.v, room))
        return self.final_norm(x), cache

    def decode(
        self,
        tokens: Int32[Array, "B"],
        positions: Int32[Array, "B"],
        at: Int32[Array, "B"],
        cache: KeysAndValues,
    ) -> tuple[Float[Array, "B D"], KeysAndValues]:
        """One step: text tokens at cache index `at`; returns their hidden states."""
        tables = self._tables(positions[:, None])
        x = self.embedding[...][tokens[:, None]].astype(self.dtype)
        w = self.config.window
        start = jnp.maximum(at + 1 - w, 0) if w else jnp.zeros_like(at)
        x, cache = self._scan(
            lambda block, x, layer: block.decode(x, tables, layer, at, start), x, cache
        )
        return self.final_norm(x)[:, 0], cache

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
