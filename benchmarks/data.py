"""The data path: rows of 1080p and VGA JPEGs against bare decoding, patchify, and the planner.

python benchmarks/data.py [--images=60 --repeats=5 --lengths=FILE.csv]

One core (threads are pinned to it), everything in turn in one process, medians. With transformers
and torch installed it also times `FuyuImageProcessorPil` + `FuyuProcessor` on the same images.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image as PilImage
from timing import in_turn

from fuyu_jax.config import DataConfig
from fuyu_jax.data.example import Example, Text, open_image
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.packed import PackedData
from fuyu_jax.data.plan import make_plan, read_lengths
from fuyu_jax.decoding import decode_image
from fuyu_jax.patches import fit, grid_of, patchify
from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece


def photo(height: int, width: int, rng: np.random.Generator) -> bytes:
    """A JPEG with smooth areas, edges and noise, as photographs have them."""
    small = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3)).astype(np.uint8)
    image = PilImage.fromarray(small).resize((width, height), PilImage.Resampling.BICUBIC)
    pixels = np.asarray(image, np.int16) + rng.integers(-8, 9, (height, width, 1))
    file = io.BytesIO()
    PilImage.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


class Photos:
    """A source of photographs held in memory."""

    def __init__(self, encoded: list[bytes]):
        self.images = [open_image(data, name=f"photo {i}") for i, data in enumerate(encoded)]

    def __len__(self) -> int:
        return len(self.images)

    def id(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Example:
        texts = Text("What is it?"), Text("a photograph", train=True)
        return Example(str(index), (self.images[index], *texts))


def median(run: Callable[[], object], repeats: int) -> float:
    """Seconds of a call."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def theirs(encoded: list[bytes]) -> Callable[[], object] | None:
    """transformers' processor on the same images, or None where it is not installed."""
    try:
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from transformers import FuyuProcessor, PreTrainedTokenizerFast
        from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
    except ImportError:
        return None
    import torch

    class Processor(FuyuImageProcessorPil):
        def patchify_image(self, image, patch_size=None):
            # transformers 5.23 gives its own function a tensor where it wants an array.
            cut = super().patchify_image(np.asarray(image), patch_size)
            return torch.from_numpy(np.ascontiguousarray(cut))

    words = ["<unk>", "<s>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|", "<0x04>", "What", "is", "it"]
    fast = FastTokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = Whitespace()
    fast.add_special_tokens(words[1:6])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", pad_token="<unk>")
    processor = FuyuProcessor(Processor(), tokenizer)
    # It counts tokens that a tokenizer as small as this one joins; the time is the same.
    processor._check_special_mm_tokens = lambda *_, **__: None

    def run() -> None:
        for data in encoded:
            image = PilImage.open(io.BytesIO(data)).convert("RGB")
            processor(text="What is it?", images=[image])

    return run


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--images", type=int, default=60)
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--lengths", help="CSV of height,width,text_tokens for the planner")
    args = flags.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = np.random.default_rng(0)
    model = Path("/tmp/fuyu_jax_benchmark.model")
    train_sentencepiece(["What is it?", "a photograph"] * 20, model, 400)
    tokenizer = Tokenizer(model)
    print("| images | bare decode + resize | rows | rows / bare | transformers | rows faster by |")
    print("|---|---|---|---|---|---|")
    sizes = {"640×480": (480, 640), "1080p": (1080, 1920), "4000×3000": (3000, 4000)}
    for name, (height, width) in sizes.items():
        count = args.images if height < 3000 else max(args.images // 6, 2)
        encoded = [photo(height, width, rng) for _ in range(count)]
        config = DataConfig(tokens_per_row=8192, patches_per_row=7168, threads=1)
        data = PackedData(Photos(encoded), tokenizer, LayoutPolicy(30), config, seed=0)
        rows = data.row_source(0)

        grid = grid_of(height, width, 30)

        def bare(encoded=encoded, grid=grid) -> None:
            for one in encoded:
                fit(decode_image(one, (grid.height, grid.width)), grid)

        def build(rows=rows) -> None:
            for i in range(len(rows)):
                rows.buffers.give_back(rows[i].batch.patches)

        runs = {"bare": bare, "rows": build}
        other = theirs(encoded)
        if other is not None:
            runs["theirs"] = other
        s = in_turn(runs, args.repeats, warm=0)
        rates = {k: count / v for k, v in s.items()}
        line = f"| {name} | {rates['bare']:.0f}/s | {rates['rows']:.0f}/s "
        line += f"| {rates['rows'] / rates['bare']:.2f} | "
        line += (
            f"{rates['theirs']:.1f}/s | {rates['rows'] / rates['theirs']:.1f} |"
            if other
            else "– | – |"
        )
        print(line, flush=True)
    pixels = np.asarray(PilImage.open(io.BytesIO(photo(1080, 1920, rng))))
    grid = grid_of(1080, 1920, 30)
    out = np.empty((grid.patches, 2700), np.uint8)
    seconds = median(lambda: patchify(pixels, grid, 30, out=out), 50)
    print(f"\npatchify 1080p into a buffer: {seconds * 1e3:.2f} ms")
    if args.lengths:
        tokens, patches = read_lengths(args.lengths, 30)
        print("\n| plan | rows | token padding | patch padding | µs an example |")
        print("|---|---|---|---|---|")
        for s, p in ((8192, 7168), (4096, 3584), (8192, 6000)):

            def plan(s=s, p=p):
                budgets = {"tokens_per_row": s, "patches_per_row": p}
                return make_plan(tokens, patches, **budgets, seed=0, epoch=0)

            seconds, made = median(plan, args.repeats), plan()
            print(
                f"| {s} / {p} | {made.rows} | {made.token_padding:.3%} | {made.patch_padding:.2%} "
                f"| {seconds / len(tokens) * 1e6:.1f} |"
            )


if __name__ == "__main__":
    main()
