"""Lengths from an outline are those of laying every example out."""

import numpy as np
import pytest

from fuyu_jax.data.cleaning import CleanedSource
from fuyu_jax.data.example import BadImageError, Example, Image, Text
from fuyu_jax.data.layout import LayoutPolicy, Visit, lay_out
from fuyu_jax.data.lengths import BadExamples, measure, measure_visit
from fuyu_jax.data.mixture import Part
from fuyu_jax.data.outline import Outline, Outliner
from fuyu_jax.data.resolution import Resolution, TokenDrop


class Listed:
    """Examples of 0 to 3 images; number 7 cannot be read, number 8 is empty."""

    def __init__(self, count, seed=0):
        rng = np.random.default_rng(seed)
        self.examples = []
        for i in range(count):
            images = [
                Image(b"", int(rng.integers(1, 90)), int(rng.integers(1, 90)))
                for _ in range(rng.integers(0, 4))
            ]
            box = "<box>2, 4, 6, 8</box>" if i % 3 else "<box>2, 4, 99999, 8</box>"
            texts = [Text("what colour is " + box), Text("red " * (i % 5), train=True)]
            segments = [*images, *texts, *images[:1]] if i != 8 else []
            self.examples.append(
                Example(str(i), tuple(segments), {"difficulty": 2} if i % 2 else {})
            )

    def __len__(self):
        return len(self.examples)

    def id(self, index):
        return str(index)

    def __getitem__(self, index):
        if index == 7:
            raise BadImageError("image 7: no such file")
        return self.examples[index]


POLICIES = {
    "native": LayoutPolicy(8, 40, 40),
    "budget": LayoutPolicy(8, resolution=Resolution("patches", max_patches=9)),
    "sampled": LayoutPolicy(8, resolution=Resolution("sampled", min_side=8, max_side=60)),
    "dropped": LayoutPolicy(8, drop=TokenDrop(((0, 0.7), (3, 0.1)))),
    "all": LayoutPolicy(
        8,
        resolution=Resolution(
            "sampled", min_side=8, max_side=60, scale_schedule=((0, 0.3), (4, 1.0))
        ),
        drop=TokenDrop(((0, 0.5),)),
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_lengths_are_those_of_the_layout(name, tokenizer):
    source, policy = Listed(60), POLICIES[name]
    part, bad = Part("a", source, 1.0, policy), BadExamples(5)
    lengths = measure(part, tokenizer, bad)
    assert bad.reasons == {"7": "image 7: no such file"}
    assert lengths.tokens[7] == lengths.patches[7] == 0 and lengths.empty == 1
    assert lengths.outline.varies.sum() == 20  # every third has a box beyond all tokens
    resized = images = 0
    for i, example in enumerate(source.examples):
        if i == 7:
            continue
        layout = lay_out(example, tokenizer, policy)
        assert (lengths.tokens[i], lengths.patches[i]) == (len(layout.tokens), layout.num_patches)
        assert lengths.difficulty[i] == (2 if i % 2 else len(layout.tokens))
        resized += layout.resized
        images += len(layout.grids)
        for epoch, at in ((0, 0.2), (1, 1.9)):
            visit = Visit(3, epoch, i, at)
            layout = lay_out(example, tokenizer, policy, visit=visit)
            found = measure_visit(part, lengths, tokenizer, visit)
            assert found == (len(layout.tokens), layout.num_patches)
    assert (lengths.images, lengths.resized) == (images, resized)


def test_a_source_with_an_outline_is_not_read(tokenizer):
    class Known(Listed):
        def outline(self, given):
            assert given is tokenizer
            return Outline(
                np.asarray([5, 9], np.int32),
                np.zeros(2, bool),
                np.asarray([0, 1, 1], np.int64),
                np.asarray([[16, 17]], np.int32),
                np.full(2, np.nan, np.float32),
            )

        def __getitem__(self, index):
            raise AssertionError("read")

    lengths = measure(Part("a", Known(2), 1.0, LayoutPolicy(8)), tokenizer, BadExamples(0))
    # 16 × 17 pixels: 2 rows of 3 patches and a newline.
    assert lengths.tokens.tolist() == [5 + 8, 9] and lengths.patches.tolist() == [6, 0]


def test_some_of_an_outline_are_the_outline_of_some(tokenizer):
    source, chosen = Listed(30), [20, 3, 8, 4, 29]
    outliner, whole = Outliner(tokenizer), Outliner(tokenizer)
    for example in source.examples:
        whole.add(example)
    for i in chosen:
        outliner.add(source.examples[i])
    found = whole.done().take(np.asarray(chosen, np.int64))
    for a, b in zip(vars(found).values(), vars(outliner.done()).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_cleaned_source_hands_its_outline_on(tokenizer):
    class Known(Listed):
        def outline(self, given):
            outliner = Outliner(given)
            for example in self.examples:
                outliner.add(example)
            return outliner.done()

    source = Known(12)
    cleaned = CleanedSource(source, np.asarray([2, 8, 11], np.int64))
    assert cleaned.outline(tokenizer).text_tokens.tolist() == [
        source.outline(tokenizer).text_tokens[i] for i in (2, 8, 11)
    ]
    assert CleanedSource(Listed(3), np.asarray([1], np.int64)).outline(tokenizer) is None
