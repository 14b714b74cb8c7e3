"""The decoder against Persimmon's block written out in float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import ModelConfig
from fuyu_jax.model import make_decoder
from fuyu_jax.model.rotary import rotary_tables, rotate
from fuyu_jax.parallel.mesh import paths

IMAGE, NEWLINE = 3, 4
FUYU = ModelConfig(
    vocab_size=50,
    dim=24,
    num_layers=3,
    num_heads=3,
    head_dim=16,
    mlp_dim=40,
    patch_size=4,
    init_std=0.3,
)


def random_parameters(model, seed=0):
    """Every parameter random, norms and biases too, so that none can be left out unnoticed."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(model)
    return graph, jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), state
    )


def as_dict(state):
    leaves = jax.tree.leaves(state)
    return {p: np.asarray(x, np.float64) for p, x in zip(paths(state), leaves, strict=True)}


def one_row(rng, rows=3, columns=4, text=9):
    """An image and text in a row of their own."""
    image = ([IMAGE] * columns + [NEWLINE]) * rows
    tokens = np.array([image + rng.integers(5, 50, text).tolist()], np.int32)
    size = tokens.shape[1]
    batch = PackedBatch.empty(1, size, rows * columns, 48)
    batch.tokens[:] = tokens
    batch.segment_ids[:] = 1
    batch.positions[:] = np.arange(size)
    batch.patches[:] = rng.integers(0, 256, batch.patches.shape)
    batch.patch_coords[0] = np.stack(np.divmod(np.arange(rows * columns), columns), -1)
    return batch


def layer_norm(x, scale, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + bias


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate_half(x, fraction, base):
    """x [S,H,E]: the definition, dimension by dimension."""
    out = x.copy()
    rotated = int(x.shape[-1] * fraction)
    half = rotated // 2
    for s in range(x.shape[0]):
        for i in range(half):
            angle = s * base ** (-2 * i / rotated)
            a, b = x[s, :, i], x[s, :, half + i]
            out[s, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[s, :, half + i] = b * np.cos(angle) + a * np.sin(angle)
    return out


def forward_float64(p, batch, config, bidirectional=False):
    """Logits [S,V] of a row that is one example."""
    tokens = np.asarray(batch.tokens[0])
    pixels = (np.asarray(batch.patches[0], np.float64) / 255 - 0.5) / 0.5
    x = p["embedding"][tokens]
    projected = pixels @ p["patch_projection/kernel"] + p["patch_projection/bias"]
    if config.image_positions == "fourier":
        features = []
        for coord in np.asarray(batch.patch_coords[0]):
            for trig in (np.sin, np.cos):
                for axis in (0, 1):
                    waves = 4 * 2 ** (7 * np.arange(12) / 11)
                    features.append((axis, trig is np.cos, trig(2 * np.pi * coord[axis] / waves)))
        rows = [
            np.concatenate([f for _, _, f in sorted(four, key=lambda x: x[:2])])
            for four in zip(*[iter(features)] * 4, strict=True)
        ]
        projected = projected + np.stack(rows) @ p["patch_position/kernel"]
    x[tokens == IMAGE] = projected[: (tokens == IMAGE).sum()]
    size = len(tokens)
    mask = np.tril(np.ones((size, size), bool))
    if bidirectional:
        image = (tokens == IMAGE) | (tokens == NEWLINE)
        mask |= image[:, None] & image[None]
    layernorm = config.norm == "layernorm"

    def norm(x, name, layer):
        scale = p[f"{name}/scale"][layer]
        if layernorm:
            return layer_norm(x, scale, p[f"{name}/bias"][layer], config.norm_eps)
        return rms_norm(x, scale, config.norm_eps)

    def linear(x, name, layer, axes=1):
        y = np.tensordot(x, p[f"{name}/kernel"][layer], axes)
        return y + p[f"{name}/bias"][layer] if f"{name}/bias" in p else y

    for i in range(config.num_layers):
        h = norm(x, "layers/attention_norm", i)
        q, k, v = (linear(h, f"layers/attention/{n}", i) for n in "qkv")
        if config.qk_norm:
            q = norm(q, "layers/attention/q_norm", i)
            k = norm(k, "layers/attention/k_norm", i)
        q, k = (rotate_half(t, config.rotary_fraction, config.rotary_base) for t in (q, k))
        groups = config.num_heads // config.kv_heads
        k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
        scores = np.einsum("she,the->hst", q, k) / np.sqrt(config.head_dim)
        weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hst,the->she", weights, v)
        x = x + linear(out, "layers/attention/out", i, 2)
        h = norm(x, "layers/mlp_norm", i)
        up = linear(h, "layers/mlp/up", i)
        if config.mlp == "relu2":
            up = np.maximum(up, 0) ** 2
        else:
            gate = linear(h, "layers/mlp/gate", i)
            up = up * gate / (1 + np.exp(-gate))
        x = x + linear(up, "layers/mlp/down", i)
    final = {k: v[None] for k, v in p.items() if k.startswith("final_norm")}
    p = {**p, **final}
    x = norm(x, "final_norm", 0)
    return x @ (p["embedding"].T if config.tie_embeddings else p["head/kernel"])


LLAMA = dataclasses.replace(
    FUYU,
    norm="rmsnorm",
    mlp="silu_gated",
    num_heads=4,
    num_kv_heads=2,
    qk_norm=False,
    out_bias=False,
    mlp_bias=False,
    tie_embeddings=True,
    rotary_fraction=1.0,
    rotary_base=10_000.0,
)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(FUYU, id="fuyu"),
        pytest.param(
            dataclasses.replace(FUYU, image_attention="bidirectional"), id="bidirectional"
        ),
        pytest.param(LLAMA, id="llama"),
        pytest.param(dataclasses.replace(FUYU, image_positions="fourier"), id="positions"),
    ],
)
def test_logits_equal_float64(config):
    model = make_decoder(config, image_id=IMAGE, newline_id=NEWLINE)
    graph, state = random_parameters(model)
    batch = one_row(np.random.default_rng(1))

    @jax.jit
    def logits(state, batch):
        model = nnx.merge(graph, state)
        return model.logits(model(batch))

    ours = logits(state, batch)[0]
    expected = forward_float64(
        as_dict(state), batch, config, config.image_attention == "bidirectional"
    )
    # float32 through three layers; logits are of size 10.
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-4)


def test_images_side_by_side_do_not_see_each_other():
    """Under bidirectional image attention each image is a picture of its own."""
    config = dataclasses.replace(FUYU, image_attention="bidirectional")
    model = make_decoder(config, image_id=IMAGE, newline_id=NEWLINE)
    batch = PackedBatch.empty(1, 12, 6, 48)
    batch.tokens[0] = ([IMAGE] * 3 + [NEWLINE]) * 2 + [7, 8, 9, 10]
    batch.segment_ids[:] = 1
    batch.patch_coords[0] = [[0, 0], [0, 1], [0, 2]] * 2
    keys = model.key_range(jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(keys.stop[0], [4] * 4 + [8] * 4 + [9, 10, 11, 12])


def test_rotary_rotates_half_of_the_head_only():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 16)), jnp.float32)
    out = rotate(x, *rotary_tables(jnp.arange(5)[None], 16, 0.5, 25_000.0))
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
    np.testing.assert_allclose(
        out[0], rotate_half(np.asarray(x[0], np.float64), 0.5, 25e3), atol=1e-6
    )


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    config = dataclasses.replace(FUYU, dtype="bfloat16")
    model = make_decoder(config, image_id=IMAGE, newline_id=NEWLINE)
    batch = jax.tree.map(jnp.asarray, one_row(np.random.default_rng(2)))
    hidden = nnx.jit(lambda model, batch: model(batch))(model, batch)
    assert hidden.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    exact = nnx.jit(lambda model, batch: model(batch))(
        make_decoder(FUYU, image_id=IMAGE, newline_id=NEWLINE), batch
    )
    # Normed states of size 1; 8 bits through three layers.
    np.testing.assert_allclose(np.asarray(hidden, np.float32), exact, atol=0.15)


@pytest.mark.parametrize("policy", ["full", "minimal", "offload"])
def test_remat_changes_nothing(policy):
    batch = jax.tree.map(jnp.asarray, one_row(np.random.default_rng(3)))

    def gradients(config):
        graph, state = nnx.split(make_decoder(config, image_id=IMAGE, newline_id=NEWLINE))
        return jax.jit(jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(batch)[..., 0] ** 2)))(state)

    plain, remat = gradients(FUYU), gradients(dataclasses.replace(FUYU, remat=policy))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # another order of float32 sums
