"""Generation against transformers' `generate` on the same prompts and weights.

python benchmarks/generate.py [--dim=384 --layers=6 --examples=64 --batch=16 --new_tokens=64]

One process, both programs in turn in every round, medians, float32, all cores for both. Prompts are
images of mixed sizes with a question each. Theirs are padded on the left to the longest of a batch,
in the order given, or sorted by length, as some of its users do. Two cases: answers that all have
the full length, and answers that end by themselves: any of a twentieth of the vocabulary ends one.
Preparing images is part of neither time for theirs; for ours it is part of it. All answers are
compared. Then: what a decoding step costs by the tokens that rows hold, and how much is compiled
for prompts of all lengths.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from timing import in_turn

PATCH = 30
VOCABULARY = 4096  # a tenth of the model's work at the default sizes, as in Fuyu-8B


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--dim", type=int, default=384)
    flags.add_argument("--layers", type=int, default=6)
    flags.add_argument("--examples", type=int, default=64)
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--new_tokens", type=int, default=64)
    flags.add_argument("--repeats", type=int, default=3)
    flags.add_argument("--theirs", default=True, action=argparse.BooleanOptionalAction)
    args = flags.parse_args()

    import jax
    import torch
    import transformers

    import fuyu_jax
    from fuyu_jax.generate.compiling import compiled
    from fuyu_jax.model.paged import PAGE
    from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece

    rng = np.random.default_rng(0)
    folder = Path(tempfile.mkdtemp())
    train_sentencepiece(["What is it?", "a photograph"] * 20, folder / "tokenizer.model", 400)
    tokenizer = Tokenizer(folder)
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
            image_token_id=tokenizer.image_id,
        )
    ).eval()
    theirs.save_pretrained(folder)
    ours = fuyu_jax.load(folder)
    shutil.rmtree(folder)

    sizes = np.exp(rng.uniform(np.log(90), np.log(900), (args.examples, 2))).astype(int)
    prompts = [
        [
            rng.integers(0, 256, (h, w, 3), dtype=np.uint8),
            rng.integers(1000, VOCABULARY, rng.integers(5, 30)).tolist(),
        ]
        for h, w in sizes
    ]
    lengths = np.array([len(ours.processor([p]).input_ids[0]) for p in prompts])
    ends = rng.permutation(np.arange(1000, VOCABULARY))[: VOCABULARY // 20].tolist()

    def padded(order: np.ndarray) -> list[tuple[list[int], dict]]:
        batches = []
        for at in range(0, len(order), args.batch):
            here = order[at : at + args.batch].tolist()
            made = ours.processor([prompts[i] for i in here], padding_side="left")
            batches.append(
                (
                    here,
                    {
                        "input_ids": torch.tensor(made.input_ids),
                        "attention_mask": torch.tensor(made.attention_mask),
                        "image_patches": torch.tensor(made.image_patches)[None],
                    },
                )
            )
        return batches

    orders = {
        "transformers": padded(np.arange(len(prompts))),
        "transformers, sorted": padded(np.argsort(lengths)),
    }
    said: dict[str, dict[int, list[int]]] = {}

    def generate_ours(eos: list[int]) -> None:
        ours.forget()  # or the next round would find all prompts computed
        answers = ours.generate(prompts, args.new_tokens, batch_size=args.batch, eos_ids=eos)
        said["ours"] = {i: list(a.tokens) for i, a in enumerate(answers)}

    def generate_theirs(name: str, eos: list[int]) -> None:
        said[name] = {}
        for here, batch in orders[name]:
            out = theirs.generate(
                **batch,
                max_new_tokens=args.new_tokens,
                do_sample=False,
                eos_token_id=eos or None,
                pad_token_id=0,
            )
            for i, row in zip(here, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((k for k, t in enumerate(row) if t in eos), len(row))
                said[name][i] = row[:end]

    parameters = sum(p.numel() for p in theirs.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, {len(prompts)} prompts of {lengths.min()} to "
        f"{lengths.max()} tokens (mean {lengths.mean():.0f}), batch {args.batch}; torch "
        f"{torch.__version__} with {torch.get_num_threads()} threads, transformers "
        f"{transformers.__version__}, jax {jax.__version__} on {jax.device_count()} × "
        f"{jax.devices()[0].device_kind}\n"
    )
    print("| answers | program | samples/s | new tokens/s | ours / it | same answers |")
    print("|---|---|---|---|---|---|")
    theirs.generation_config.eos_token_id = None
    for case, eos in (("full length", []), ("ending by themselves", ends)):
        runs: dict[str, Callable[[], object]] = {"ours": lambda eos=eos: generate_ours(eos)}
        if args.theirs:
            for name in orders:
                runs[name] = lambda name=name, eos=eos: generate_theirs(name, eos)
        seconds = in_turn(runs, args.repeats)
        for name, s in seconds.items():
            new = sum(map(len, said[name].values()))
            same = sum(said[name][i] == said["ours"][i] for i in said["ours"])
            print(
                f"| {case} | {name} | {len(prompts) / s:.2f} | {new / s:.1f} | "
                f"{s / seconds['ours']:.2f} | {same} of {len(prompts)} |",
                flush=True,
            )

    print("\nA decoding step of 16 rows by the tokens that they hold:\n")
    print("| rows | tokens in all | longest × 16 | ms a step |\n|---|---|---|---|")
    cases = {f"16 of {n}": [n] * 16 for n in (100, 400, 1600)}
    cases["one of 6,000, 15 of 27"] = [6000, *[27] * 15]
    rows_of = {
        k: [[rng.integers(1000, VOCABULARY, n).tolist()] for n in v] for k, v in cases.items()
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(6):
        for name, rows in rows_of.items():
            ours.generate(rows, 33, batch_size=16, eos_ids=())
            before = ours.usage()
            ours.generate(rows, 33, batch_size=16, eos_ids=())  # what was not kept is one chunk,
            after = ours.usage()  # so that all rows make their 32 steps together
            assert after["prompt_tokens"] - before["prompt_tokens"] <= 16 * PAGE
            if turn:
                times[name].append(after["decode_seconds"] - before["decode_seconds"])
    for name, lengths_of in cases.items():
        each = statistics.median(times[name]) / 32 * 1e3
        total = sum(lengths_of)
        print(f"| {name} | {total:,} | {16 * max(lengths_of):,} | {each:.1f} |", flush=True)

    ours.forget()
    before = compiled()
    many = [[rng.integers(1000, VOCABULARY, n).tolist()] for n in rng.integers(1, 3000, 100)]
    ours.generate(many, 4, batch_size=16, eos_ids=())
    now = compiled()
    print(
        f"\n100 prompts of 1 to 3,000 tokens: {now.number - before.number} more compilations, "
        f"{now.seconds - before.seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
