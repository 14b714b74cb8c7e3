"""The train step at several sizes: packed rows of text and images; and dense rows against PyTorch.

python benchmarks/step.py [--sizes=256x4,512x8 --rows=2 --tokens=1024 --segment=256 --repeats=5]

A size is DIM x LAYERS, with heads of 64 and a feed-forward of 4 · DIM, as Fuyu's. Packed rows hold
segments of about `--segment` tokens, two thirds of them patches, answers at a quarter of the rest.
Where torch and transformers are installed, its Persimmon (Fuyu's decoder) trains on the same dense
rows: one segment of text a row, a loss at every position, float32, AdamW, all cores for both, both
in turn in every round. Times are medians; operations are the model's, as in docs/performance.md.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from timing import in_turn

from fuyu_jax.parallel.mesh import use_cpu_cores

IMAGE, NEWLINE = 1, 2


def packed_rows(rng: np.random.Generator, args: argparse.Namespace, channels: int):
    """Rows of segments: an image, then text with an answer at its end."""
    from fuyu_jax.batch import PackedBatch

    s = args.tokens
    batch = PackedBatch.empty(args.rows, s, s, channels)
    batch.tokens[:] = rng.integers(10, args.vocab, batch.tokens.shape)
    batch.patches[:] = rng.integers(0, 256, batch.patches.shape, dtype=np.uint8)
    for row in range(args.rows):
        at = segment = patches = 0
        while s - at >= 8:
            length = min(int(rng.integers(args.segment // 2, 3 * args.segment // 2 + 1)), s - at)
            segment += 1
            own, image = slice(at, at + length), 2 * length // 3
            batch.segment_ids[row, own] = segment
            batch.positions[row, own] = np.arange(length)
            batch.tokens[row, at : at + image] = IMAGE
            batch.patch_coords[row, patches : patches + image, 1] = np.arange(image)
            batch.loss_weights[row, at + length - (length - image) // 4 : at + length] = 1
            at, patches = at + length, patches + image
    return batch


def dense_rows(rng: np.random.Generator, args: argparse.Namespace):
    """One segment of text a row."""
    from fuyu_jax.batch import PackedBatch

    batch = PackedBatch.empty(args.rows, args.tokens, 0, 0)
    batch.tokens[:] = rng.integers(10, args.vocab, batch.tokens.shape)
    batch.segment_ids[:] = 1
    batch.positions[:] = np.arange(args.tokens)
    batch.loss_weights[:, 1:] = 1
    return batch


def our_step(config: Any, batch: Any, optim: Any = None) -> tuple[Callable[[], None], int]:
    """A function that makes one step, and the number of parameters; by AdamW, if not told."""
    import jax

    from fuyu_jax.config import MeshConfig, OptimConfig
    from fuyu_jax.model.decoder import make_decoder
    from fuyu_jax.parallel.mesh import batch_sharding, make_mesh
    from fuyu_jax.train.optimizer import make_optimizer
    from fuyu_jax.train.step import create_state, make_train_step

    mesh = make_mesh(MeshConfig(data=1, fsdp=-1) if _accelerated() else MeshConfig())
    optim = optim or OptimConfig(peak_lr=1e-5, warmup_steps=0, clip_norm=0.0)
    graph, state, shardings = create_state(
        lambda: make_decoder(config, image_id=IMAGE, newline_id=NEWLINE),
        lambda params: make_optimizer(optim, params, 10_000),
        mesh,
    )
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    tx = make_optimizer(optim, state.params, 10_000)
    step = make_train_step(graph, tx, shardings, mesh, image_id=IMAGE)
    one = jax.tree.map(lambda x: x[None], batch)
    placed = jax.device_put(one, batch_sharding(mesh, leading=1))
    held = {"state": state}
    del state

    def run() -> None:
        held["state"], metrics = step(held["state"], placed)
        assert np.isfinite(float(metrics.loss))

    return run, parameters


def _accelerated() -> bool:
    import jax

    return jax.devices()[0].platform != "cpu"


def their_step(config: Any, batch: Any) -> Callable[[], None] | None:
    """The same with PyTorch and transformers; None without them, or on an accelerator."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    if _accelerated():
        return None
    model = transformers.PersimmonForCausalLM(
        transformers.PersimmonConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=16_384,
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
    tokens = torch.tensor(np.asarray(batch.tokens)).long()

    def run() -> None:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)

    return run


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--sizes", default="256x4,512x8")
    flags.add_argument("--rows", type=int, default=2)
    flags.add_argument("--tokens", type=int, default=1024)
    flags.add_argument("--segment", type=int, default=256)
    flags.add_argument("--vocab", type=int, default=4096)
    flags.add_argument("--patch", type=int, default=30)
    flags.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    flags.add_argument("--remat", default="none")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--peak_flops", type=float, default=0.0, help="of one device")
    args = flags.parse_args()
    use_cpu_cores(args.rows)

    import jax

    from fuyu_jax.config import ModelConfig
    from fuyu_jax.parallel import flops
    from fuyu_jax.train.measure import peak_device_bytes

    rng = np.random.default_rng(0)
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind, args.peak_flops)
    print(
        f"{jax.device_count()} × {device.device_kind}, jax {jax.__version__}, {args.dtype}, "
        f"{args.rows} rows of {args.tokens} tokens, remat {args.remat}\n"
    )
    print("| size | parameters | rows | step | real tokens/s | TFLOP/s a device | MFU | torch |")
    print("|---|---|---|---|---|---|---|---|")
    for size in args.sizes.split(","):
        dim, layers = (int(n) for n in size.split("x"))
        config = ModelConfig(
            vocab_size=args.vocab,
            dim=dim,
            num_layers=layers,
            num_heads=dim // 64,
            head_dim=64,
            mlp_dim=4 * dim,
            patch_size=args.patch,
            dtype=args.dtype,
            remat=args.remat,
        )
        batches = {
            "packed": packed_rows(rng, args, config.patch_channels),
            "dense": dense_rows(rng, args),
        }
        for kind, batch in batches.items():
            # One model at a time is on the device.
            ours, parameters = our_step(config, batch)
            runs = {"ours": ours}
            theirs = their_step(config, batch) if kind == "dense" else None
            if theirs:
                runs["theirs"] = theirs
            seconds = in_turn(runs, args.repeats, warm=3)
            lengths = flops.segment_lengths(batch.segment_ids)
            work = flops.Work(
                float(lengths.sum()),
                float(flops.attended_pairs(lengths)),
                float((batch.loss_weights > 0).sum()),
                float((batch.tokens == IMAGE).sum()),
            )
            own = seconds["ours"]
            each = flops.model_flops(config, work).total / own / jax.device_count()
            share = f"{each / peak:.1%}" if peak else "–"
            ratio = "–"
            if theirs:
                ratio = f"{seconds['theirs'] * 1e3:,.0f} ms; ours {seconds['theirs'] / own:.2f}×"
            print(
                f"| {size} | {parameters / 1e6:.1f} M | {kind} | {own * 1e3:,.0f} ms | "
                f"{work.tokens / own:,.0f} | {each / 1e12:.3f} | {share} | {ratio} |",
                flush=True,
            )
            del ours, theirs, runs
    if held := peak_device_bytes():
        print(f"\npeak memory of a device {held / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
