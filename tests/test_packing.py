"""A packed row is its examples one by one, and neighbours in a row do not touch each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fuyu_jax.batch import PackedBatch
from fuyu_jax.data.layout import LayoutPolicy, lay_out
from fuyu_jax.data.rows import fill_row, with_pixels
from fuyu_jax.data.sources.llava import LlavaSource
from fuyu_jax.model import loss_sums, make_decoder

SIZE, PATCHES = 160, 96
POLICY = LayoutPolicy(patch_size=8)


@pytest.fixture(scope="module")
def setting(llava_json, tokenizer, tiny_model):
    import dataclasses

    config = dataclasses.replace(tiny_model, vocab_size=tokenizer.vocab_size)
    model = make_decoder(config, image_id=tokenizer.image_id, newline_id=tokenizer.newline_id)
    graph, params = nnx.split(model)
    source = LlavaSource(llava_json)
    examples = [
        with_pixels(source[i], lay_out(source[i], tokenizer, POLICY), POLICY)
        for i in (0, 1, 4, 5, 7)  # one has two turns and a box, one is text alone
    ]

    @jax.jit
    def run(params, batch):
        def loss(params):
            model = nnx.merge(graph, params)
            hidden = model(batch)
            total, _ = loss_sums(hidden, model.head_kernel(), batch.tokens, batch.loss_weights)
            return total, model.logits(hidden)

        (total, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return total, logits, grads

    return examples, params, run


def pack(examples):
    batch = PackedBatch.empty(1, SIZE, PATCHES, 8 * 8 * 3)
    fill_row(batch, 0, examples)
    return jax.tree.map(jnp.asarray, batch)


def test_a_packed_row_equals_its_examples_one_by_one(setting):
    examples, params, run = setting
    total, logits, grads = run(params, pack(examples))
    at, sum_loss, sum_grads = 0, 0.0, jax.tree.map(jnp.zeros_like, params)
    for example in examples:
        loss, alone, grad = run(params, pack([example]))
        size = len(example.layout.tokens)
        scale = np.abs(alone[0, :size]).max()
        # float32, other blocks and so another order of summation: 1e-5 of the largest logit.
        np.testing.assert_allclose(
            logits[0, at : at + size], alone[0, :size], rtol=1e-5, atol=1e-5 * scale
        )
        at += size
        sum_loss += float(loss)
        sum_grads = jax.tree.map(jnp.add, sum_grads, grad)
    assert at > 100
    np.testing.assert_allclose(total, sum_loss, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(sum_grads), strict=True):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(np.asarray(theirs)).max()
        )


def test_changing_an_example_changes_nothing_in_its_neighbours(setting):
    examples, params, run = setting
    before = np.asarray(run(params, pack(examples))[1][0])
    changed = list(examples)
    layout, cut = examples[1]
    rng = np.random.default_rng(0)
    tokens = layout.tokens.copy()
    text = np.flatnonzero(tokens > 300)
    tokens[text] = rng.permutation(tokens[text])
    import dataclasses

    noise = [rng.integers(0, 256, c.shape).astype(np.uint8) for c in cut]
    changed[1] = changed[1]._replace(
        layout=dataclasses.replace(layout, tokens=tokens), patches=noise
    )
    after = np.asarray(run(params, pack(changed))[1][0])
    first = len(examples[0].layout.tokens)
    last = first + len(layout.tokens)
    assert np.abs(before[first:last] - after[first:last]).max() > 0.01  # the change was one
    np.testing.assert_array_equal(before[:first], after[:first])
    end = sum(len(e.layout.tokens) for e in examples)
    np.testing.assert_array_equal(before[last:end], after[last:end])


def test_no_gradient_flows_between_neighbours(setting):
    """The loss of one example alone in a full row gives the gradient of that example alone."""
    examples, params, run = setting
    batch = pack(examples)
    keep = np.asarray(batch.segment_ids) == 2
    only = batch._replace(loss_weights=jnp.where(keep, batch.loss_weights, 0))
    ours = run(params, only)[2]
    theirs = run(params, pack([examples[1]]))[2]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(np.asarray(b)).max())
