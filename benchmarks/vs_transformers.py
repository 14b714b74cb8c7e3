"""Generation and training against transformers' Fuyu (PyTorch) on the same examples and weights.

python benchmarks/vs_transformers.py [--dim=512 --layers=8 --examples=64 --repeats=3]

One process, both programs in turn in every round, medians (after three rounds of training that are
not counted: the heap that they share grows until then), float32, all cores for both. Examples
are images of mixed sizes, each with a question and an answer. Theirs are padded to the longest of a
batch, as its users run it (on the left to generate, on the right to train); ours are packed into
rows to train, and batched by length to generate. Preparing images is not part of either time.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from timing import in_turn

from fuyu_jax.parallel.mesh import use_cpu_cores

ROWS = 2  # of a step of ours; one a core
BATCH = 8  # of theirs
PATCH = 30
VOCABULARY = 4096  # a tenth of the model's work at the default sizes, as in Fuyu-8B


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--dim", type=int, default=512)
    flags.add_argument("--layers", type=int, default=8)
    flags.add_argument("--examples", type=int, default=64)
    flags.add_argument("--new_tokens", type=int, default=32)
    flags.add_argument("--repeats", type=int, default=3)
    args = flags.parse_args()
    use_cpu_cores(ROWS)

    import jax
    import torch
    import transformers

    import fuyu_jax
    from fuyu_jax.batch import PackedBatch
    from fuyu_jax.config import DataConfig, MeshConfig, OptimConfig
    from fuyu_jax.data.example import Example, Tokens, image_of_pixels
    from fuyu_jax.data.layout import LayoutPolicy
    from fuyu_jax.data.packed import PackedData
    from fuyu_jax.model.decoder import make_decoder
    from fuyu_jax.parallel.mesh import batch_sharding, make_mesh
    from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece
    from fuyu_jax.train.optimizer import make_optimizer
    from fuyu_jax.train.step import create_state, make_train_step

    rng = np.random.default_rng(0)
    folder = Path(tempfile.mkdtemp())
    train_sentencepiece(["What is it?", "a photograph"] * 20, folder / "tokenizer.model", 400)
    tokenizer = Tokenizer(folder)
    image, newline = tokenizer.image_id, tokenizer.newline_id
    theirs = transformers.FuyuForCausalLM(
        transformers.FuyuConfig(
            text_config={
                "model_type": "persimmon",
                "vocab_size": VOCABULARY,
                "hidden_size": args.dim,
                "intermediate_size": 4 * args.dim,
                "num_hidden_layers": args.layers,
                "num_attention_heads": args.dim // 64,
                "rope_theta": 25_000.0,
            },
            patch_size=PATCH,
            image_token_id=image,
        )
    )
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(folder)
    ours = fuyu_jax.load(folder, mesh=MeshConfig(data=-1))
    shutil.rmtree(folder)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(1000, VOCABULARY, rng.integers(low, high)).tolist())

    class Photos:
        """Images of 90 to 900 pixels a side, a question and an answer."""

        def __init__(self) -> None:
            sizes = np.exp(rng.uniform(np.log(90), np.log(900), (args.examples, 2))).astype(int)
            pixels = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]
            self.parts = [
                (image_of_pixels(p), Tokens(ids(5, 30)), Tokens(ids(2, 60), train=True))
                for p in pixels
            ]

        def __len__(self) -> int:
            return len(self.parts)

        def id(self, index: int) -> str:
            return str(index)

        def __getitem__(self, index: int) -> Example:
            return Example(str(index), self.parts[index])

    photos = Photos()
    policy = LayoutPolicy(PATCH)

    # --- Training ---
    data = PackedData(
        photos, tokenizer, policy, DataConfig(tokens_per_row=2048, patches_per_row=1984), seed=0
    )
    rows = [data.row_source(0)[i].batch for i in range(data.plan(0).rows)]
    empty = jax.tree.map(np.zeros_like, rows[0])
    rows += [empty] * (-len(rows) % ROWS)
    steps = [
        PackedBatch(*(np.concatenate(a)[None] for a in zip(*rows[i : i + ROWS], strict=True)))
        for i in range(0, len(rows), ROWS)
    ]
    optim = OptimConfig(name="adamw", peak_lr=1e-5, warmup_steps=0, clip_norm=1e9)
    mesh = make_mesh(MeshConfig())

    def make():
        return make_decoder(ours.config, image_id=image, newline_id=newline)

    graph, state, shardings = create_state(
        make, lambda p: make_optimizer(optim, p, 10_000), mesh, lambda _: ours.params
    )
    tx = make_optimizer(optim, state.params, 10_000)
    step = make_train_step(graph, tx, shardings, mesh, image_id=image)
    placed = [jax.device_put(s, batch_sharding(mesh, leading=1)) for s in steps]
    # The step takes its parameters over; generation keeps those that it has.
    state = jax.tree.map(lambda x: x.copy(), state)
    held = {"state": state}

    def train_ours() -> None:
        for one in placed:
            held["state"], metrics = step(held["state"], one)
        jax.block_until_ready(metrics)
        assert np.isfinite(float(metrics.loss))

    torch_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5, weight_decay=0.1)
    weights = [p.detach().clone() for p in theirs.parameters()]
    order = np.random.default_rng(0).permutation(len(photos)).tolist()
    batches = []
    for at in range(0, len(order), BATCH):
        prompts = [list(photos.parts[i]) for i in order[at : at + BATCH]]
        made = ours.processor(prompts, ask=False, padding_side="right")
        batches.append(
            {
                "input_ids": torch.tensor(made.input_ids),
                "attention_mask": torch.tensor(made.attention_mask),
                "position_ids": torch.tensor(made.position_ids),
                "image_patches": torch.tensor(made.image_patches)[None],
                "labels": torch.tensor(made.labels).long(),
            }
        )

    def train_theirs() -> None:
        theirs.train()
        for batch in batches:
            torch_optimizer.zero_grad()
            loss = theirs(**batch, use_cache=False).loss
            loss.backward()
            torch_optimizer.step()
        assert torch.isfinite(loss)

    real = sum(int(s.segment_ids.astype(bool).sum()) for s in steps)
    padded = sum(b["input_ids"].numel() for b in batches)
    print(
        f"{len(photos)} examples, {real:,} tokens; theirs padded to {padded:,} "
        f"({1 - real / padded:.0%} padding), ours packed into {len(rows) * 2048:,} "
        f"({1 - real / len(rows) / 2048:.0%})",
        flush=True,
    )
    s = in_turn({"ours": train_ours, "theirs": train_theirs}, args.repeats, warm=3)
    print("| | ours | transformers | ours / theirs |\n|---|---|---|---|")
    a, b = len(photos) / s["ours"], len(photos) / s["theirs"]
    print(f"| training, examples/s | {a:.2f} | {b:.2f} | {a / b:.2f} |", flush=True)

    # --- Generation, from the weights as they were ---
    with torch.no_grad():
        for parameter, before in zip(theirs.parameters(), weights, strict=True):
            parameter.copy_(before)
    theirs.eval()
    prompts = [list(p[:2]) for p in photos.parts]
    padded_prompts = []
    for at in range(0, len(prompts), 2 * BATCH):
        made = ours.processor(prompts[at : at + 2 * BATCH], padding_side="left")
        padded_prompts.append(
            {
                "input_ids": torch.tensor(made.input_ids),
                "attention_mask": torch.tensor(made.attention_mask),
                "image_patches": torch.tensor(made.image_patches)[None],
            }
        )
    said: dict[str, list] = {}

    def generate_ours() -> None:
        ours.forget()  # or the next round would find all prompts computed
        answers = ours.generate(prompts, args.new_tokens, batch_size=2 * BATCH, eos_ids=())
        said["ours"] = [list(x.tokens) for x in answers]

    def generate_theirs() -> None:
        said["theirs"] = []
        for batch in padded_prompts:
            out = theirs.generate(**batch, max_new_tokens=args.new_tokens, do_sample=False)
            said["theirs"] += out[:, batch["input_ids"].shape[1] :].tolist()

    s = in_turn({"ours": generate_ours, "theirs": generate_theirs}, args.repeats)
    tokens = len(prompts) * args.new_tokens
    a, b = tokens / s["ours"], tokens / s["theirs"]
    print(f"| generation, tokens/s | {a:.1f} | {b:.1f} | {a / b:.2f} |")
    equal = sum(x == y for x, y in zip(said["ours"], said["theirs"], strict=True))
    print(f"\n{equal} of {len(prompts)} answers of {args.new_tokens} tokens are the same.")
    parameters = sum(p.numel() for p in theirs.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters; torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, jax {jax.__version__} on {jax.device_count()} "
        f"{jax.devices()[0].platform} devices"
    )


if __name__ == "__main__":
    main()
