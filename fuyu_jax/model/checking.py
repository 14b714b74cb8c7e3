"""Kernels are compared with the dense reference on the machine that is to use them, before they are
trusted: a few seconds against weeks of training on wrong gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fuyu_jax.config import ModelConfig
from fuyu_jax.errors import UserError
from fuyu_jax.model.attention import attend, choose_backend, key_range, reference_attention

KERNELS = ("splash", "pallas")  # of one kind of machine each; the others are plain JAX
_SIZE = 512  # tokens of the row that is tried
# bfloat16 rounds by up to 2^-9 = 0.002 of a number; weights, sums and results are rounded in turn.
# Blockwise attention is off by up to 0.008; one key too many or too few by 0.5 and more.
_TOLERANCE = 0.02


def checked_backend(config: ModelConfig) -> str:
    """The attention backend that this model has here (`choose_backend`). A kernel is run first, on
    one small row, forward and backward.

    Raises:
      UserError: it cannot be, does not run, or is not what the reference is; names what to do.
    """
    backend = choose_backend(config.attention_backend, image_attention=config.image_attention)
    if backend in KERNELS:
        groups, both_ways = config.num_heads // config.kv_heads, config.image_attention != "causal"
        compare(backend, groups, config.head_dim, config.dtype, config.window, both_ways)
    return backend


def backend_here(config: ModelConfig) -> ModelConfig:
    """The config of a trained model for this machine: a kernel of the machine that it was trained
    on becomes "auto", which is told."""
    try:
        choose_backend(config.attention_backend, image_attention=config.image_attention)
    except UserError as error:
        if jax.process_index() == 0:
            print(f"{error}; taken: auto", flush=True)
        return dataclasses.replace(config, attention_backend="auto")
    return config


@functools.cache
def compare(
    backend: str, groups: int, head_dim: int, dtype: str, window: int, both_ways: bool
) -> dict[str, float]:
    """Largest differences from the reference, as shares of its largest number: of the output and
    of the three gradients.

    Args:
      backend: to be run.
      groups: query heads of a key head; there are two key heads.
      head_dim, dtype, window: as in `ModelConfig`.
      both_ways: images are seen from both sides.

    Raises:
      UserError: a difference that rounding does not explain, or whatever the compiler says.
    """
    rng = np.random.default_rng(0)
    ids, images = np.zeros((2, 1, _SIZE), np.int32)
    ends = (70, 71, 250, 480)  # the rest is padding
    for n, (at, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True), 1):
        ids[0, at:end] = n
        images[0, at + (end - at) // 4 : at + (end - at) // 2] = n
    kind = jnp.dtype(dtype)
    shapes = {"q": 2 * groups, "k": 2, "v": 2, "d": 2 * groups}
    label = f'attention backend "{backend}" on this {jax.local_devices()[0].device_kind}'
    advice = "choose model.attention_backend=blockwise, and report this"
    with jax.default_device(jax.local_devices()[0]):
        q, k, v, d = (
            jnp.asarray(rng.normal(size=(1, _SIZE, heads, head_dim)), kind)
            for heads in shapes.values()
        )
        keys = key_range(jnp.asarray(ids), jnp.asarray(images) if both_ways else None, window)

        def kernel(q, k, v):
            return attend(q, k, v, keys, window=window, backend=backend)

        def reference(q, k, v):
            with jax.default_matmul_precision("highest"):
                return reference_attention(q, k, v, keys, head_dim**-0.5)

        def results(function):
            @jax.jit
            def run(q, k, v, d):
                out, pull = jax.vjp(function, q, k, v)
                return out, *pull(d)

            return [np.asarray(x, np.float64) for x in run(q, k, v, d)]

        expected = results(reference)
        try:
            found = results(kernel)
        except Exception as error:  # of the compiler or the machine: of any class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{label} does not run ({reason}); {advice}") from error
    differences = {
        name: float(np.abs(a - b).max() / np.abs(b).max())
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True)
    }
    told = ", ".join(f"{name} by {x:.1e}" for name, x in differences.items())
    if not all(x < _TOLERANCE for x in differences.values()):  # as where one is not a number
        raise UserError(f"{label} differs from the reference ({told}); {advice}")
    if jax.process_index() == 0:
        print(f"{label} is what the reference is ({told})", flush=True)
    return differences
