"""The pictures show what the arrays hold."""

import io
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.patches import Rectangle
from PIL import Image as PilImage

from fuyu_jax import viz
from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import ModelConfig
from fuyu_jax.data.example import Example, Text, open_image
from fuyu_jax.data.layout import LayoutPolicy, lay_out
from fuyu_jax.data.rows import fill_row, with_pixels
from fuyu_jax.model.attention import dense_mask, key_range
from fuyu_jax.model.decoder import make_decoder
from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece
from fuyu_jax.viz.kinds import ANSWER, NEWLINE, PADDING, PATCH, TEXT, runs, token_kinds

PATCH_SIZE = 8
POLICY = LayoutPolicy(PATCH_SIZE)
TOKENS, PATCHES = 96, 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["What colour is the square?", "It is red.", "Where is the circle?", "one two three"]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return Tokenizer(train_sentencepiece(texts * 4, path, 420))


def _example(id, height, width, question="What colour is the square?", answer="red"):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    encoded = io.BytesIO()
    PilImage.fromarray(pixels).save(encoded, format="PNG")
    image = open_image(encoded.getvalue(), id)
    return Example(id, (image, Text(question), Text(answer, train=True)))


@pytest.fixture(scope="module")
def patched(tokenizer):
    examples = [_example("a", 20, 27), _example("b", 16, 24, "Where is the circle?", "one")]
    return [with_pixels(e, lay_out(e, tokenizer, POLICY), POLICY) for e in examples]


@pytest.fixture(scope="module")
def batch(patched):
    batch = PackedBatch.empty(1, TOKENS, PATCHES, PATCH_SIZE**2 * 3)
    fill_row(batch, 0, patched)
    return batch


def _rectangles(axes, gid):
    return [p for p in axes.patches if isinstance(p, Rectangle) and p.get_gid() == gid]


def _texts(axes):
    return [t.get_text() for t in axes.texts]


def _legend(legend):
    return [t.get_text() for t in legend.get_texts()]


def _drawn(figure):
    """The figure's pixels: that it can be drawn at all."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=40)
    assert np.asarray(PilImage.open(out)).std() > 1


def test_kinds_are_counted_as_laid_out(patched, batch, tokenizer):
    kinds = token_kinds(batch.tokens[0], batch.segment_ids[0], batch.loss_weights[0], tokenizer)
    grids = [p.layout.grids[0] for p in patched]
    count = Counter(kinds.tolist())
    assert count[PATCH] == sum(g.patches for g in grids) == 12 + 6
    assert count[NEWLINE] == sum(g.rows for g in grids) == 3 + 2
    assert count[ANSWER] == int(batch.loss_weights.sum())
    assert count[PADDING] == TOKENS - sum(len(p.layout.tokens) for p in patched)
    assert count[TEXT] == TOKENS - sum(count[k] for k in (PATCH, NEWLINE, ANSWER, PADDING))
    assert runs(np.asarray([3, 3, 1, 0, 0], np.int32)) == [(3, 0, 2), (1, 2, 3), (0, 3, 5)]


def test_patches_and_newlines_are_drawn_in_order(patched, tokenizer):
    layout, cut = patched[0]
    grid = layout.grids[0]
    figure = viz.draw_patches(patched[0], tokenizer)
    above, below = figure.axes
    assert len(above.images) == grid.patches == 12
    cells = cut[0].reshape(-1, PATCH_SIZE, PATCH_SIZE, 3)
    for shown, cell in zip(above.images, cells, strict=True):
        np.testing.assert_array_equal(shown.get_array(), cell)
    assert len(_rectangles(above, "newline")) == grid.rows == 3
    # Indices in the sequence: four patches, a newline, and so on.
    newlines = [t for t in _texts(above) if t.startswith("↵")]
    assert newlines == ["↵\n4", "↵\n9", "↵\n14"]
    assert [int(t) for t in _texts(above) if t not in newlines] == [
        i for i in range(grid.tokens) if layout.tokens[i] == tokenizer.image_id
    ]
    assert "20 × 27 pixels: 3 rows of 4 patches and a newline = 15 tokens" in above.get_title()

    ids = layout.tokens[grid.tokens :].tolist()
    assert len(_rectangles(below, "chip")) == len(ids)
    assert _texts(below) == [t for i in ids for t in (tokenizer.piece(i), str(i))]
    assert _legend(figure.legends[0]) == ["row newline", "text", "answer (has loss)"]
    _drawn(figure)


def test_indices_begin_where_the_image_does(tokenizer):
    example = _example("late", 8, 16)
    late = Example("late", (Text("It is red."), *example.segments))
    layout = lay_out(late, tokenizer, POLICY)
    above = viz.draw_patches(with_pixels(late, layout, POLICY), tokenizer).axes[0]
    first = layout.tokens.tolist().index(tokenizer.image_id)
    assert first > 0 and _texts(above) == [str(first), str(first + 1), f"↵\n{first + 2}"]


def test_many_patches_are_not_numbered(tokenizer):
    example = _example("large", 8 * PATCH_SIZE, 9 * PATCH_SIZE)
    ready = with_pixels(example, lay_out(example, tokenizer, POLICY), POLICY)
    above = viz.draw_patches(ready, tokenizer).axes[0]
    assert len(above.images) == 72
    assert len(_texts(above)) == 8  # the newlines' alone


def test_row_shows_segments_and_both_budgets(patched, batch, tokenizer):
    figure = viz.draw_row(batch, tokenizer, ids=("first", "second"))
    tokens, kinds, patches = figure.axes
    lengths = [len(p.layout.tokens) for p in patched]
    assert [r.get_width() for r in _rectangles(tokens, "segment")] == lengths
    assert [r.get_width() for r in _rectangles(tokens, "padding")] == [TOKENS - sum(lengths)]
    assert [r.get_width() for r in _rectangles(patches, "segment")] == [12, 6]
    assert [r.get_width() for r in _rectangles(patches, "padding")] == [PATCHES - 18]
    assert _texts(tokens) == _texts(patches) == ["1", "2"]
    used, free = sum(lengths), TOKENS - sum(lengths)
    title = f"tokens: {used} of {TOKENS} used, {free} padding ({free / TOKENS:.1%})"
    assert tokens.get_title(loc="left") == title
    assert patches.get_title(loc="left") == "patches: 18 of 40 used, 22 padding (55.0%)"
    assert sum(r.get_width() for r in _rectangles(kinds, "kind")) == used
    # The same segment has the same colour over both budgets.
    colours = [[r.get_facecolor() for r in _rectangles(a, "segment")] for a in (tokens, patches)]
    assert colours[0] == colours[1] and colours[0][0] != colours[0][1]
    names = ["patch", "row newline", "text", "answer (has loss)", "padding"]
    assert _legend(kinds.get_legend()) == names
    assert _legend(figure.legends[0]) == ["1: first", "2: second"]
    _drawn(figure)


def test_an_empty_row_is_all_padding(tokenizer):
    figure = viz.draw_row(PackedBatch.empty(1, 8, 0, 3), tokenizer)
    assert not _rectangles(figure.axes[0], "segment")
    assert figure.axes[2].get_title(loc="left") == "patches: 0 of 0 used, 0 padding (0.0%)"
    _drawn(figure)


def test_masks_tell_later_tokens_from_earlier_ones():
    segment_ids = np.asarray([1, 1, 1, 2, 2, 2, 2, 0], np.int32)
    image_ids = np.asarray([1, 1, 0, 2, 2, 2, 0, 0], np.int32)
    segments, images = jnp.asarray(segment_ids)[None], jnp.asarray(image_ids)[None]
    masks = {
        "causal": np.asarray(dense_mask(key_range(segments), 8)[0]),
        "bidirectional": np.asarray(dense_mask(key_range(segments, images), 8)[0]),
    }
    figure = viz.draw_masks(masks, segment_ids, segment=2)
    shown = {
        a.get_title() + str(n): np.asarray(a.images[0].get_array())
        for n, a in enumerate(figure.axes)
    }
    causal, bidirectional = shown["causal0"], shown["bidirectional1"]
    np.testing.assert_array_equal(causal > 0, masks["causal"])
    np.testing.assert_array_equal(bidirectional > 0, masks["bidirectional"])
    assert (causal == 2).sum() == 0
    assert (bidirectional == 2).sum() == 1 + 3  # pairs above the diagonal of images of 2 and 3
    np.testing.assert_array_equal(shown["segment 2 alone3"], bidirectional[3:7, 3:7])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "2", ""]
    assert "seen: later tokens of its image" in _legend(figure.legends[0])
    _drawn(figure)


@pytest.fixture(scope="module")
def looked(patched, tokenizer):
    """One example alone, and a random model's attention in it."""
    layout, _ = patched[0]
    size = len(layout.tokens)
    batch = PackedBatch.empty(1, size, layout.num_patches, PATCH_SIZE**2 * 3)
    fill_row(batch, 0, patched[:1])
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=2,
        num_heads=4,
        head_dim=8,
        mlp_dim=32,
        patch_size=PATCH_SIZE,
        init_std=0.3,
    )

    @nnx.jit
    def look(batch):
        ids = {"image_id": tokenizer.image_id, "newline_id": tokenizer.newline_id}
        return make_decoder(config, seed=1, **ids).attention_maps(batch)

    return layout, batch, np.asarray(look(jax.tree.map(jnp.asarray, batch)))


def test_heat_is_the_attention_on_patches(looked, tokenizer):
    layout, batch, maps = looked
    grid, query = layout.grids[0], len(layout.tokens) - 3
    assert maps.shape == (2, 1, 4, len(layout.tokens), len(layout.tokens))
    maps = maps[:, 0]
    heat = viz.patch_attention(maps, query, layout.tokens, tokenizer.image_id)
    assert heat.shape == (2, 4, grid.patches)
    elsewhere = maps[:, :, query, layout.tokens != tokenizer.image_id].sum(-1)
    np.testing.assert_allclose(heat.sum(-1) + elsewhere, 1, rtol=1e-5)

    figure = viz.draw_attention(
        maps,
        query,
        layout.tokens,
        batch.patches[0],
        grid,
        tokenizer.image_id,
        heads=3,
        title="Who?",
    )
    panels = figure.axes[1:6]
    means = heat.mean(axis=1)
    for n, panel in enumerate(panels[:2]):
        shown = np.asarray(panel.images[1].get_array())
        assert shown.shape == (grid.rows, grid.columns)
        np.testing.assert_allclose(shown.ravel(), means[n] / means[n].max(), rtol=1e-6)
        title = f"layer {n + 1}, mean of heads\n{means[n].sum():.0%} on patches, "
        assert panel.get_title() == title + f"max {means[n].max():.1%}"
    order = np.argsort(-heat.max(-1).ravel())[:3]
    names = [p.get_title().split("\n")[0] for p in panels[2:]]
    assert names == [f"layer {n // 4 + 1}, head {n % 4 + 1}" for n in order]
    # The first panel is the picture itself, without its padding.
    assert figure.axes[0].images[0].get_array().shape == (grid.height, grid.width, 3)
    assert figure.get_suptitle() == "Who?"
    _drawn(figure)
