"""Blockwise attention against `jax.nn.dot_product_attention`, in turn in one process.

python benchmarks/attention.py [--rows=4 --size=1024 --heads=8 --width=64 --repeats=9]

Prints medians in milliseconds and ratios, forward and with gradients, for one causal segment a row
and for rows of many segments (the dense form takes them as a mask of S×S).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turn

from fuyu_jax.model.attention import attend, dense_mask, key_range


def segments(rows: int, size: int, length: int, rng: np.random.Generator) -> jax.Array:
    """Segment ids [B,S] of lengths around `length`."""
    ids = np.zeros((rows, size), np.int32)
    for row in ids:
        at = number = 0
        while at < size:
            step = max(1, int(length * rng.uniform(0.5, 1.5)))
            number += 1
            row[at : at + step] = number
            at += step
    return jnp.asarray(ids)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 4), ("size", 1024), ("heads", 8), ("width", 64), ("repeats", 9)):
        flags.add_argument(f"--{name}", type=int, default=default)
    args = flags.parse_args()
    rng = np.random.default_rng(0)
    shape = (args.rows, args.size, args.heads, args.width)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} ({device.device_kind}), {shape}, float32")
    for name, length in (("one segment a row", 10 * args.size), ("segments of about 128", 128)):
        ids = segments(args.rows, args.size, length, rng)
        keys = key_range(ids)
        mask = dense_mask(keys, args.size)[:, None]

        def dense(q, k, v, mask=mask):
            return jax.nn.dot_product_attention(q, k, v, mask=mask)

        def ours(q, k, v, keys=keys):
            return attend(q, k, v, keys, backend="blockwise")

        worst = float(jnp.abs(jax.jit(ours)(q, k, v) - jax.jit(dense)(q, k, v)).max())
        for what, wrap in (
            ("forward", jax.jit),
            (
                "forward and backward",
                lambda f: jax.jit(jax.grad(lambda *a: f(*a).sum(), (0, 1, 2))),
            ),
        ):
            runs = {
                name: lambda f=f: jax.block_until_ready(f(q, k, v))
                for name, f in (("dense", wrap(dense)), ("ours", wrap(ours)))
            }
            ms = {name: 1e3 * s for name, s in in_turn(runs, args.repeats).items()}
            print(
                f"{name}, {what}: dense {ms['dense']:.0f} ms, blockwise {ms['ours']:.0f} ms, "
                f"ratio {ms['dense'] / ms['ours']:.1f} (largest difference {worst:.1e})"
            )


if __name__ == "__main__":
    main()
