"""Backends against a float64 computation written out by hand, values and gradients."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from fuyu_jax.errors import UserError
from fuyu_jax.model import attention as attention_module
from fuyu_jax.model.attention import choose_backend, dense_mask, key_range
from fuyu_jax.model.blockwise import blockwise_attention
from fuyu_jax.model.pallas_gpu import Blocks, pallas_attention
from fuyu_jax.model.splash import splash_attention

# Compiled once a shape: op by op, these loops would take minutes.
attention = jax.jit(attention_module.attention, static_argnames=("window", "backend"))


def random_segments(rng, rows, size, mean):
    """Contiguous segments of random lengths, some rows with padding at the end."""
    ids = np.zeros((rows, size), np.int32)
    for row in range(rows):
        at, segment = 0, 0
        end = size if row % 2 else size - int(rng.integers(0, size // 3))
        while at < end:
            length = min(int(rng.integers(1, 2 * mean)), end - at)
            segment += 1
            ids[row, at : at + length] = segment
            at += length
    return ids


def random_images(rng, segment_ids):
    """Inside some segments, a run of tokens of an image, told apart by its number."""
    images = np.zeros_like(segment_ids)
    number = 0
    for row, ids in enumerate(segment_ids):
        for segment in range(1, ids.max() + 1):
            places = np.flatnonzero(ids == segment)
            if rng.random() < 0.7:
                number += 1
                first = int(rng.integers(0, len(places)))
                images[row, places[first : first + int(rng.integers(1, 12))]] = number
    return images


def mask_by_definition(segment_ids, image_ids=None, window=0):
    """Pair by pair: what may be seen."""
    rows, size = segment_ids.shape
    mask = np.zeros((rows, size, size), bool)
    for r in range(rows):
        for i in range(size):
            for j in range(size):
                same = segment_ids[r, i] == segment_ids[r, j] != 0
                causal = j <= i and (not window or i - j < window)
                image = image_ids is not None and image_ids[r, i] == image_ids[r, j] != 0
                mask[r, i, j] = same and (causal or image)
    return mask


def attention_float64(q, k, v, mask, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    scores = np.einsum("bshe,bthe->bhst", q, k) * scale
    scores = np.where(mask[:, None], scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = np.where(mask[:, None], weights, 0)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("bhst,bthe->bshe", weights, v)


def inputs(rng, rows, size, heads, kv_heads, width):
    def draw(h):
        return jnp.asarray(rng.normal(size=(rows, size, h, width)), jnp.float32)

    return draw(heads), draw(kv_heads), draw(kv_heads)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("with_images", [False, True])
def test_key_range_is_the_mask_by_definition(window, with_images):
    rng = np.random.default_rng(window + with_images)
    ids = random_segments(rng, 4, 50, 12)
    images = random_images(rng, ids) if with_images else None
    keys = key_range(jnp.asarray(ids), None if images is None else jnp.asarray(images), window)
    expected = mask_by_definition(ids, images, window)
    if with_images and window:
        # One run of keys is all that a range can say: a window that begins after its image's
        # beginning is widened to it, never narrowed.
        assert (
            np.asarray(dense_mask(keys, 50)) | expected == np.asarray(dense_mask(keys, 50))
        ).all()
    else:
        np.testing.assert_array_equal(dense_mask(keys, 50), expected)


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "width", "mean"),
    [(100, 4, 4, 16, 20), (129, 6, 2, 8, 90), (64, 2, 1, 64, 5), (8, 1, 1, 128, 3)],
)
@pytest.mark.parametrize("with_images", [False, True])
def test_backends_equal_float64(size, heads, kv_heads, width, mean, with_images):
    rng = np.random.default_rng(size)
    ids = random_segments(rng, 3, size, mean)
    images = random_images(rng, ids) if with_images else None
    q, k, v = inputs(rng, 3, size, heads, kv_heads, width)
    expected = attention_float64(q, k, v, mask_by_definition(ids, images), width**-0.5)
    for backend in ("blockwise", "reference"):
        image_ids = None if images is None else jnp.asarray(images)
        out = attention(q, k, v, jnp.asarray(ids), image_ids=image_ids, backend=backend)
        # float32 sums of at most 129 terms of size 1: some 1e-6.
        np.testing.assert_allclose(out, expected, atol=5e-6)
        assert (np.asarray(out)[ids == 0] == 0).all()


def of_backend(backend, images, window):
    """A backend as a function of q, k, v, ids; kernels for TPU and GPU as their operations one by
    one. Blocks on GPU are small here, so that there are whole ones and edges."""

    def call(q, k, v, ids):
        if backend == "pallas":
            keys = key_range(ids, images, window)
            blocks, scale = Blocks(32, 16, 16), q.shape[-1] ** -0.5
            return pallas_attention(q, k, v, keys.start, keys.stop, scale, blocks, interpret=True)
        if backend == "splash":
            return splash_attention(q, k, v, ids, q.shape[-1] ** -0.5, window, interpret=True)
        given = {"image_ids": images, "window": window, "backend": backend}
        return attention_module.attention(q, k, v, ids, **given)

    return call


def values_and_gradients(backend, q, k, v, ids, probe, images=None, window=0):
    call = of_backend(backend, images, window)

    def total(q, k, v):
        out = call(q, k, v, ids)
        return jnp.sum(out * probe), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (4, 2, 64), (3, 1, 128)])
@pytest.mark.parametrize("window", [0, 60])
@pytest.mark.parametrize("backend", ["blockwise", "splash", "pallas"])
def test_backends_equal_the_reference_in_values_and_gradients(
    backend, window, heads, kv_heads, width
):
    if backend == "splash" and width == 16:
        width = 64  # its heads are of 64 or 128
    rng = np.random.default_rng(width + window)
    ids = jnp.asarray(random_segments(rng, 2, 150, 40))
    q, k, v = inputs(rng, 2, 150, heads, kv_heads, width)
    probe = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    ours = values_and_gradients(backend, q, k, v, ids, probe, window=window)
    theirs = values_and_gradients("reference", q, k, v, ids, probe, window=window)
    for a, b in zip(ours, theirs, strict=True):
        # Two orders of summation in float32; gradients are of size 1 to 10.
        np.testing.assert_allclose(a, b, atol=3e-5)
    assert (np.asarray(ours[0])[np.asarray(ids) == 0] == 0).all()


@pytest.mark.parametrize("backend", ["blockwise", "pallas"])
def test_gradients_equal_the_reference_with_images(backend):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(random_segments(rng, 2, 150, 40))
    images = jnp.asarray(random_images(rng, np.asarray(ids)))
    q, k, v = inputs(rng, 2, 150, 4, 2, 64)
    probe = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    ours = values_and_gradients(backend, q, k, v, ids, probe, images, 60)
    theirs = values_and_gradients("reference", q, k, v, ids, probe, images, 60)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_gradient_by_finite_differences():
    """The hand-written backward pass against the function itself, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        ids = jnp.asarray(random_segments(rng, 1, 24, 9))
        keys = key_range(ids)
        q, k, v, probe = (jnp.asarray(rng.normal(size=(1, 24, 2, 8))) for _ in range(4))

        @jax.jit
        def of(q, k, v):
            out = blockwise_attention(q, k, v, keys.start, keys.stop, 0.3, 8)
            return jnp.sum(out * probe)

        grads = jax.jit(jax.grad(of, argnums=(0, 1, 2)))(q, k, v)
        for n in range(3):
            direction = rng.normal(size=q.shape)
            moved = [[q, k, v] for _ in range(2)]
            h = 1e-3
            moved[0][n], moved[1][n] = moved[0][n] + h * direction, moved[1][n] - h * direction
            slope = (of(*moved[0]) - of(*moved[1])) / (2 * h)
            # Scores are summed in float32, so a difference over h = 1e-3 is good to about 1e-3.
            np.testing.assert_allclose(jnp.sum(grads[n] * direction), slope, rtol=5e-3, atol=5e-3)


def test_bfloat16_stays_near_float32():
    rng = np.random.default_rng(2)
    ids = jnp.asarray(random_segments(rng, 2, 96, 30))
    q, k, v = inputs(rng, 2, 96, 4, 2, 32)
    exact = attention(q, k, v, ids, backend="reference")
    low = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), ids, backend="blockwise")
    assert low.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: inputs and outputs of size 1 to 3 are rounded by up to 0.01.
    np.testing.assert_allclose(np.asarray(low, np.float32), exact, atol=0.05)


def test_a_query_block_visits_only_the_key_blocks_it_reaches():
    """Keys out of reach are never read: not-a-number there does no harm."""
    rng = np.random.default_rng(3)
    ids = np.repeat(np.arange(1, 5, dtype=np.int32), 64)[None]
    q, k, v = inputs(rng, 1, 256, 2, 2, 16)
    poisoned_k, poisoned_v = k.at[:, 128:].set(jnp.nan), v.at[:, 128:].set(jnp.nan)
    clean = attention(q, k, v, jnp.asarray(ids), backend="blockwise")[:, :128]
    out = attention(q, poisoned_k, poisoned_v, jnp.asarray(ids), backend="blockwise")[:, :128]
    np.testing.assert_array_equal(out, clean)


def test_a_gpu_program_visits_only_the_blocks_it_reaches():
    """Keys (and, for their gradients, queries) out of reach are never read."""
    rng = np.random.default_rng(5)
    ids = jnp.asarray(np.repeat(np.arange(1, 5, dtype=np.int32), 64)[None])
    q, k, v = inputs(rng, 1, 256, 2, 1, 16)
    far = jnp.nan * jnp.ones((1, 128, 1, 16))
    probe = jnp.zeros(q.shape).at[:, :128].set(1)
    clean = values_and_gradients("pallas", q, k, v, ids, probe)
    poisoned = [x.at[:, 128:].set(far) for x in (q, k, v)]
    out = values_and_gradients("pallas", *poisoned, ids, probe)
    for a, b in zip(clean, out, strict=True):
        np.testing.assert_array_equal(a[:, :128], b[:, :128])


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 64), (4, 4, 128)])
def test_gpu_kernels_are_lowered_to_triton(heads, kv_heads, width):
    """What a GPU's compiler is given: three kernels, and no buffer of S×S."""
    size = 1000

    def total(q, k, v, ids):
        out = attention_module.attention(q, k, v, ids, backend="pallas")
        return jnp.sum(out.astype(jnp.float32))

    q, kv = (jax.ShapeDtypeStruct((2, size, h, width), jnp.bfloat16) for h in (heads, kv_heads))
    ids = jax.ShapeDtypeStruct((2, size), jnp.int32)
    kernel = "__gpu$xla.gpu.triton"
    # From jax 0.12 on the lowering asks which GPU it is for.
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", None, "gpu"))
    with use_abstract_mesh(gpu):
        text = export.export(
            jax.jit(jax.grad(total, (0, 1, 2))),
            platforms=["cuda"],
            disabled_checks=[export.DisabledSafetyCheck.custom_call(kernel)],
        )(q, kv, kv, ids).mlir_module()
    assert text.count(f"@{kernel}") == 3
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)  # the kernels are strings
    assert f"tensor<2x{size}x" in outside
    assert not re.search(r"(1000|1024)x(1000|1024)x", outside)


@pytest.mark.parametrize("backward", [False, True])
def test_time_follows_the_segments(backward):
    """Eight equal segments have 1/8 of one segment's pairs; they may take 1/4 of its time."""
    size = 4096
    rng = np.random.default_rng(4)
    q, k, v = inputs(rng, 1, size, 2, 2, 64)

    def total(q, k, v, ids):
        return jnp.sum(attention_module.attention(q, k, v, ids, backend="blockwise"))

    run = jax.jit(jax.grad(total, (0, 1, 2)) if backward else total)
    layouts = [
        jnp.asarray(np.repeat(np.arange(1, n + 1, dtype=np.int32), size // n)[None]) for n in (1, 8)
    ]
    times = [[], []]
    for turn in range(10):  # in turn, so that other work on the machine meets both
        for layout, kept in zip(layouts, times, strict=True):
            begun = time.perf_counter()
            jax.block_until_ready(run(q, k, v, layout))
            if turn:  # the first one compiles
                kept.append(time.perf_counter() - begun)
    one, eight = (float(np.median(kept)) for kept in times)
    assert eight <= one / 4, f"one segment {one:.3f} s, eight {eight:.3f} s"


def test_the_backend_that_auto_means():
    assert choose_backend("auto", platform="tpu") == "splash"
    assert choose_backend("auto", platform="tpu", image_attention="bidirectional") == "blockwise"
    assert choose_backend("auto", platform="gpu") == "pallas"
    assert choose_backend("auto", platform="gpu", image_attention="bidirectional") == "pallas"
    assert choose_backend("auto") == "blockwise"
    assert choose_backend("splash", platform="tpu") == "splash"


def test_a_backend_that_cannot_run_is_an_error():
    q = jnp.zeros((1, 8, 1, 8))
    with pytest.raises(UserError, match="flash9"):
        attention(q, q, q, jnp.ones((1, 8), jnp.int32), backend="flash9")
    with pytest.raises(UserError, match='"splush" is unknown; did you mean "splash"'):
        choose_backend("splush")
    with pytest.raises(UserError, match=r'"splash" runs on TPU and this is cpu; "blockwise" runs'):
        choose_backend("splash", platform="cpu")
    with pytest.raises(UserError, match=r'"pallas" runs on GPU and this is cpu; "blockwise" runs'):
        choose_backend("pallas", platform="cpu")
    with pytest.raises(UserError, match=r"image_attention is bidirectional"):
        choose_backend("splash", platform="tpu", image_attention="bidirectional")
    ones = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(UserError, match="causal"):
        attention(q, q, q, ones, image_ids=ones, backend="splash")
