"""What of every example is known for good: its text's tokens and its images' sizes.

From an outline the lengths under any resolution policy, at any visit, are arithmetic: no text is
encoded again and no header read. A prepared set keeps one beside its records.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from fuyu_jax.data.example import BadImageError, Example, Image
from fuyu_jax.data.layout import LayoutPolicy, Visit, lay_out
from fuyu_jax.data.resolution import example_rng
from fuyu_jax.data.sources.base import Source
from fuyu_jax.tokenizer import Tokenizer

# Every image is one patch: what is left is the text.
_ONE_PATCH = LayoutPolicy(1 << 30, 1 << 30, 1 << 30)


@dataclass(frozen=True)
class Outline:
    """Of N examples with M images.

    text_tokens: tokens that are of no image (texts, marks, `<s>`, ends); -1: cannot be read.
    varies: their number may depend on the image's scale (a box that has no tokens at full size).
    starts: images of example i are `starts[i]..starts[i + 1]`.
    sizes: height and width in pixels.
    difficulty: what the source says of an example; not a number where it says nothing.
    """

    text_tokens: Int32[np.ndarray, "N"]
    varies: Bool[np.ndarray, "N"]
    starts: Int64[np.ndarray, "N1"]
    sizes: Int32[np.ndarray, "M 2"]
    difficulty: Float32[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.text_tokens)

    def images(self, index: int) -> Int32[np.ndarray, "images 2"]:
        """Sizes of an example's images."""
        return self.sizes[self.starts[index] : self.starts[index + 1]]

    def take(self, indices: Int64[np.ndarray, "K"]) -> "Outline":
        """Of some of the examples, in the given order."""
        counts = np.diff(self.starts)[indices]
        starts = np.concatenate([[0], np.cumsum(counts)])
        # Image j of the result is so many behind the first of its example.
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        return Outline(
            self.text_tokens[indices],
            self.varies[indices],
            starts.astype(np.int64),
            self.sizes[np.repeat(self.starts[:-1][indices], counts) + within],
            self.difficulty[indices],
        )


class Outliner:
    """Makes an outline, example by example."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._varies: list[bool] = []
        self._counts: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._difficulty: list[float] = []

    def add(self, example: Example) -> None:
        images = example.images
        tokens = len(lay_out(example, self.tokenizer, _ONE_PATCH).tokens) - 2 * len(images)
        difficulty = example.info.get("difficulty", np.nan)
        self._add(tokens, self._scale_matters(example), len(images), difficulty)
        self._sizes += [(i.height, i.width) for i in images]

    def add_bad(self) -> None:
        """An example that cannot be read."""
        self._add(-1, False, 0, np.nan)

    def _add(self, tokens: int, varies: bool, images: int, difficulty: int | float) -> None:
        self._tokens.append(tokens)
        self._varies.append(varies)
        self._counts.append(images)
        self._difficulty.append(difficulty)

    def _scale_matters(self, example: Example) -> bool:
        """A box that has tokens at full size has them at every smaller one; another may."""
        t = self.tokenizer
        for segment in example.segments:
            text = "" if isinstance(segment, Image) else getattr(segment, "text", "")
            if marks := text.count("<box>") + text.count("<point>"):
                ids = t.encode(text)
                if ids.count(t.box_ids[0]) + ids.count(t.point_ids[0]) < marks:
                    return True
        return False

    def done(self) -> Outline:
        return Outline(
            np.asarray(self._tokens, np.int32),
            np.asarray(self._varies, bool),
            np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64),
            np.asarray(self._sizes, np.int32).reshape(-1, 2),
            np.asarray(self._difficulty, np.float32),
        )


def read_outline(
    source: Source, tokenizer: Tokenizer, on_bad: Callable[[int, str], None]
) -> Outline:
    """A source's own outline, or one made from every text and header.

    `on_bad` is called with the index of each example that cannot be read, and the reason.
    """
    own = getattr(source, "outline", None)
    if own is not None and (found := own(tokenizer)) is not None:
        return found
    outliner = Outliner(tokenizer)
    for index in range(len(source)):
        try:
            outliner.add(source[index])
        except BadImageError as error:
            outliner.add_bad()
            on_bad(index, str(error))
    return outliner.done()


def static_lengths(
    outline: Outline, policy: LayoutPolicy
) -> tuple[Int32[np.ndarray, "N"], Int32[np.ndarray, "N"], int]:
    """Tokens and patches of every example without chance (0 where it cannot be read), and how many
    images are shrunk. Examples that vary are not right here.
    """
    sizes, inverse = np.unique(outline.sizes, axis=0, return_inverse=True)
    grids = [policy.sized(int(h), int(w)) for h, w in sizes]
    of_size = np.asarray([(g.tokens, g.patches, g.scale != 1) for g in grids], np.int64)
    of_image = of_size.reshape(-1, 3)[inverse.reshape(-1)]
    sums = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(of_image, axis=0)])
    tokens, patches, _ = (sums[outline.starts[1:]] - sums[outline.starts[:-1]]).T
    bad = outline.text_tokens < 0
    tokens, patches = tokens + outline.text_tokens, patches.copy()
    tokens[bad], patches[bad] = 0, 0
    return tokens.astype(np.int32), patches.astype(np.int32), int(sums[-1, 2])


def visit_lengths(outline: Outline, policy: LayoutPolicy, visit: Visit) -> tuple[int, int]:
    """Tokens and patches of an example at one visit, drawn by chance in the order of `lay_out`."""
    rng = example_rng(visit.seed, visit.epoch, visit.index)
    rate = policy.drop.rate(visit.at, rng)
    tokens, patches = int(outline.text_tokens[visit.index]), 0
    sizes = outline.images(visit.index)
    for number, (height, width) in enumerate(sizes.tolist()):
        grid = policy.sized(height, width, at=visit.at, rng=rng)
        kept = grid.patches
        if rate:
            if number + 1 < len(sizes):  # what comes after is drawn after
                kept = len(policy.drop.keep(grid.patches, rate, rng))
            else:
                kept = policy.drop.kept(grid.patches, rate)
        tokens += grid.tokens - (grid.patches - kept)
        patches += kept
    return tokens, patches
