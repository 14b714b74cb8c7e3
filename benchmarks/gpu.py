"""What one GPU does: attention against PyTorch, train steps of 1B and of Fuyu-8B's shapes, answers.

python benchmarks/gpu.py [--parts=check,attention,train,generate] [--seconds=450] [--small]

One run of under 8 minutes, compilation included: no part is begun after `--seconds`. Times are
medians. `--small` runs every part at a size for a CPU, to show that it works, without PyTorch's.

* check: our kernel against the dense reference, values and gradients, bfloat16.
* attention: forward, and with gradients, over one segment a row and over many; PyTorch's
  `varlen_attn` (flash attention) on the same segments; cuDNN's causal kernel where there is one.
* train: MFU of packed rows of 8,192 tokens (docs/performance.md has the formula). Fuyu-8B is whole
  with Adafactor where the memory is there, else it has as many of its 36 layers as fit with AdamW.
* generate: new tokens a second of the 1B model, a batch of prompts with images.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some, too

import jax
import jax.numpy as jnp
import numpy as np
from step import IMAGE, our_step, packed_rows

from fuyu_jax.config import ModelConfig, OptimConfig
from fuyu_jax.model.attention import attention, choose_backend
from fuyu_jax.parallel import flops

SHAPES = {"64 heads of 64": (64, 64, 64), "32/8 heads of 128": (32, 8, 128)}


def median(run: Callable[[], object], repeats: int) -> float:
    """Seconds, after two runs that are not counted."""
    times = []
    for turn in range(repeats + 2):
        began = time.perf_counter()
        run()
        if turn > 1:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def segment_ids(size: int, count: int) -> np.ndarray:
    """[1,S] of `count` segments of unequal lengths."""
    rng = np.random.default_rng(count)
    cuts = np.sort(rng.choice(np.arange(1, size), count - 1, replace=False))
    return np.searchsorted(cuts, np.arange(size), side="right")[None].astype(np.int32) + 1


def draw(shape: tuple[int, int, int], size: int) -> list[np.ndarray]:
    """q, k, v and the output's gradient, [1,S,heads,E]."""
    rng = np.random.default_rng(0)
    heads, kv, width = shape
    return [rng.normal(size=(1, size, h, width)).astype(np.float32) for h in (heads, kv, kv, heads)]


def packed(ids: jax.Array, backend: str = "auto") -> Callable[..., jax.Array]:
    return lambda q, k, v: attention(q, k, v, ids, backend=backend)


def values_and_gradients(run: Callable[..., jax.Array], q, k, v, d_out) -> tuple[jax.Array, ...]:
    def both(q, k, v, d_out):
        out, back = jax.vjp(run, q, k, v)
        return out, *back(d_out)

    return jax.jit(both)(q, k, v, d_out)


def check(small: bool) -> None:
    """Raises where the kernel is not the reference."""
    backend = choose_backend("auto")
    size = 128 if small else 1024
    for name, shape in SHAPES.items():
        ids = jnp.asarray(segment_ids(size, 7)).at[:, -30:].set(0)
        q, k, v, d_out = (jnp.asarray(x, jnp.bfloat16) for x in draw(shape, size))
        if small:
            q, k, v, d_out = q[:, :, :8], k[:, :, :2], v[:, :, :2], d_out[:, :, :8]

        ours, dense = (
            values_and_gradients(packed(ids, b), q, k, v, d_out) for b in (backend, "reference")
        )
        worst = [
            float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(float)))
            for a, b in zip(ours, dense, strict=True)
        ]
        told = ", ".join(
            f"{n} {w:.1e}" for n, w in zip(("out", "dq", "dk", "dv"), worst, strict=True)
        )
        print(f"check of {backend}, {name}: relative differences {told}", flush=True)
        # bfloat16 rounds by up to 2^-9 = 0.002; weights, outputs and sums are rounded in turn.
        assert max(worst) < 0.02, worst


def torch_attention(shape: tuple[int, int, int], size: int, ids: np.ndarray):
    """(forward, forward and backward) by PyTorch's flash attention; None without it."""
    try:
        import torch
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    q, k, v, d_out = (
        torch.tensor(x[0], dtype=torch.bfloat16, device="cuda") for x in draw(shape, size)
    )
    for x in (q, k, v):
        x.requires_grad_()
    lengths = np.bincount(ids[0])[1:]
    ends = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32).cuda()
    longest = int(lengths.max())

    def out():
        return varlen_attn(
            q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True
        )

    def forward() -> None:
        with torch.no_grad():
            out()
        torch.cuda.synchronize()

    def both() -> None:
        torch.autograd.grad(out(), (q, k, v), d_out)
        torch.cuda.synchronize()

    return forward, both


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def jax_times(run: Callable[..., jax.Array], arrays: list, repeats: int) -> tuple[float, float]:
    """Seconds forward, and forward and backward."""
    ahead = jax.jit(run)
    both = jax.jit(lambda q, k, v, d_out: jax.vjp(run, q, k, v)[1](d_out))
    return (
        median(lambda: jax.block_until_ready(ahead(*arrays[:3])), repeats),
        median(lambda: jax.block_until_ready(both(*arrays)), repeats),
    )


def attention_times(small: bool) -> None:
    size, repeats = (256, 2) if small else (8192, 20)
    backend = choose_backend("auto")
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    print("| heads | segments | what | forward | and backward | TFLOP/s | share of peak |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        heads, kv, width = (4, 2, 64) if small else shape
        for count in (1, 8, 32):
            ids = segment_ids(size, count)
            pairs = flops.attended_pairs(np.bincount(ids[0])[1:])
            arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw((heads, kv, width), size)]
            timed = {backend: jax_times(packed(jnp.asarray(ids)), arrays, repeats)}
            if count == 1 and not small:
                try:
                    timed["cuDNN, one segment"] = jax_times(cudnn, arrays, repeats)
                except Exception as error:
                    print(f"(cuDNN: {str(error).splitlines()[0][:150]})")
            theirs = torch_attention((heads, kv, width), size, ids)
            if theirs:
                timed["PyTorch varlen"] = tuple(median(run, repeats) for run in theirs)
            elif not small:
                print("(no PyTorch with CUDA and varlen_attn here)")
            for what, (ahead, both) in timed.items():
                done = 14 * heads * width * pairs / both  # 4 forward, 10 backward a pair
                share = f"{done / peak:.1%}" if peak else "–"
                print(
                    f"| {name} | {count} | {what} | {ahead * 1e3:.2f} ms | {both * 1e3:.2f} ms | "
                    f"{done / 1e12:.1f} | {share} |",
                    flush=True,
                )


def model(dim: int, layers: int, vocab: int, remat: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        num_layers=layers,
        num_heads=dim // 64,
        head_dim=64,
        mlp_dim=4 * dim,
        qk_norm=True,
        patch_size=30,
        dtype="bfloat16",
        remat=remat,
    )


def parameters(config: ModelConfig) -> int:
    return flops.matmul_parameters(config) + 2 * config.vocab_size * config.dim


def fuyu_8b(memory: float) -> tuple[str, ModelConfig, OptimConfig]:
    """As much of Fuyu-8B as a device of so many bytes trains."""
    whole = model(4096, 36, 262_144, "full")
    # Adafactor: parameters and gradients in float32. 12 GB for activations and a chunk of logits.
    if 8 * parameters(whole) + 12e9 < 0.95 * memory:
        return "Fuyu-8B, 36 layers, Adafactor", whole, OptimConfig(name="adafactor", peak_lr=1e-5)
    # AdamW: parameters, gradients and two moments.
    bare = model(4096, 0, 262_144, "full")
    layer = parameters(model(4096, 1, 262_144, "full")) - parameters(bare)
    layers = max(1, int((0.95 * memory - 12e9 - 16 * parameters(bare)) / (16 * layer)))
    name = f"Fuyu-8B's shapes, {layers} of 36 layers, AdamW"
    return name, model(4096, layers, 262_144, "full"), OptimConfig(peak_lr=1e-5)


def train_times(small: bool, only: str) -> None:
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    memory = float(stats.get("bytes_limit", 16e9))
    args = argparse.Namespace(rows=1, tokens=8192, segment=1024, vocab=1000)
    if small:
        args = argparse.Namespace(rows=1, tokens=128, segment=40, vocab=1000)
        cases = {"small": (model(128, 2, 1000, "full"), OptimConfig(name="adafactor"), 1)}
    elif only == "1b":
        args.rows = 2
        cases = {"1B": (model(2048, 16, 32_000, "minimal"), OptimConfig(peak_lr=1e-5), 10)}
    else:
        name, config, optim = fuyu_8b(memory)
        cases = {name: (config, optim, 5)}
    peak = flops.peak_flops(device.device_kind)
    for name, (config, optim, repeats) in cases.items():
        batch = packed_rows(np.random.default_rng(0), args, config.patch_channels)
        run, count = our_step(config, batch, optim)
        seconds = median(run, repeats)
        lengths = flops.segment_lengths(batch.segment_ids)
        work = flops.Work(
            float(lengths.sum()),
            float(flops.attended_pairs(lengths)),
            float((batch.loss_weights > 0).sum()),
            float((batch.tokens == IMAGE).sum()),
        )
        done = flops.model_flops(config, work).total / seconds / jax.device_count()
        share = f", MFU {done / peak:.1%}" if peak else ""
        held = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        print(
            f"train {name}: {count / 1e9:.2f} B parameters, {args.rows} × {args.tokens} tokens, "
            f"remat {config.remat}: {seconds * 1e3:,.0f} ms, {work.tokens / seconds:,.0f} real "
            f"tokens/s, {done / 1e12:.1f} TFLOP/s a device{share}, peak memory so far "
            f"{held / 1e9:.1f} GB",
            flush=True,
        )


def generate_times(small: bool) -> None:
    from flax import nnx

    from fuyu_jax.data.example import Example, Tokens, image_of_pixels
    from fuyu_jax.data.layout import LayoutPolicy
    from fuyu_jax.generate.engine import Engine
    from fuyu_jax.model.decoder import make_decoder
    from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece

    config = model(128, 2, 1000, "none") if small else model(2048, 16, 32_000, "none")
    prompts, new, side = (2, 4, 60) if small else (32, 128, 600)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        train_sentencepiece(["What is it?", "a photo"] * 20, Path(folder) / "tokenizer.model", 400)
        tokenizer = Tokenizer(Path(folder))
    made = make_decoder(config, image_id=tokenizer.image_id, newline_id=tokenizer.newline_id)
    graph, params = nnx.split(made)
    del made
    engine = Engine(
        graph,
        tokenizer,
        LayoutPolicy(config.patch_size),
        batch_size=prompts,
        max_new_tokens=new,
        eos_ids=(),
    )
    asked = [
        Example(
            str(i),
            (
                image_of_pixels(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)),
                Tokens(tuple(rng.integers(500, 1000, 20).tolist())),
            ),
        )
        for i in range(prompts)
    ]
    seconds = median(lambda: engine.answer(params, asked), 1 if small else 3)
    print(
        f"generate: {prompts} prompts of an image of {side} × {side} and 20 tokens, {new} new "
        f"tokens each, preparing included: {seconds:.2f} s, {prompts * new / seconds:,.0f} new "
        "tokens/s",
        flush=True,
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--parts", default="check,attention,train,generate")
    flags.add_argument("--seconds", type=float, default=450)
    flags.add_argument("--small", action="store_true")
    args = flags.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.small:
        sys.exit(f"error: this wants a GPU and here is {device.platform}; --small runs anywhere")
    print(f"{device.device_kind}, jax {jax.__version__}, {' '.join(sys.argv[1:])}", flush=True)
    began, failed = time.perf_counter(), []
    parts: dict[str, list[Callable[[bool], Any]]] = {
        "check": [check],
        "attention": [attention_times],
        "train": [lambda small: train_times(small, "1b"), lambda small: train_times(small, "8b")],
        "generate": [generate_times],
    }
    asked = args.parts.split(",")
    if strange := [p for p in asked if p not in parts]:
        sys.exit(f"error: --parts={args.parts}: {strange[0]} is none of {', '.join(parts)}")
    for part in asked:
        for run in parts[part][: 1 if args.small else None]:
            spent = time.perf_counter() - began
            if spent > args.seconds:
                print(f"{part}: not begun after {spent:.0f} s")
                continue
            try:
                run(args.small)
            except Exception:  # what follows may still be had
                traceback.print_exc()
                failed.append(part)
            jax.clear_caches()
    print(f"{time.perf_counter() - began:.0f} s in all; failed: {', '.join(failed) or 'nothing'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
