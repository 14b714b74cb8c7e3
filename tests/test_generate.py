"""Generation with a cache against the plain forward pass, and independence of batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fuyu_jax.batch import PackedBatch
from fuyu_jax.data.example import split_answer
from fuyu_jax.data.layout import LayoutPolicy, lay_out
from fuyu_jax.data.rows import fill_row, with_pixels
from fuyu_jax.data.sources.llava import LlavaSource
from fuyu_jax.generate import Engine
from fuyu_jax.model import make_decoder

POLICY = LayoutPolicy(patch_size=8)
NEW = 6


@pytest.fixture(scope="module")
def setting(llava_json, tokenizer, tiny_model):
    config = dataclasses.replace(tiny_model, vocab_size=tokenizer.vocab_size, num_kv_heads=2)
    model = make_decoder(
        config, image_id=tokenizer.image_id, newline_id=tokenizer.newline_id, seed=3
    )
    graph, params = nnx.split(model)
    source = LlavaSource(llava_json)
    prompts = [split_answer(source[i])[0] for i in range(12)]
    engine = Engine(graph, tokenizer, POLICY, batch_size=4, max_new_tokens=NEW)
    return engine, params, prompts


def greedy_without_cache(engine, params, prompt):
    """The whole forward pass again for every token."""
    example = with_pixels(prompt, lay_out(prompt, engine.tokenizer, POLICY, ask=True), POLICY)
    size = len(example.layout.tokens)
    batch = PackedBatch.empty(1, 96, 64, 192)
    fill_row(batch, 0, [example])

    @jax.jit
    def logits(params, batch):
        model = nnx.merge(engine.graph, params)
        return model.logits(model(batch))

    chosen = []
    for _ in range(NEW):
        scores = np.array(logits(params, jax.tree.map(jnp.asarray, batch))[0, size - 1])
        scores[list(engine.banned)] = -np.inf
        token = int(scores.argmax())
        if token == engine.tokenizer.eos_id:
            break
        chosen.append(token)
        batch.tokens[0, size] = token
        batch.segment_ids[0, size] = 1
        batch.positions[0, size] = size
        size += 1
    return tuple(chosen)


def test_the_cache_gives_what_the_whole_pass_gives(setting):
    engine, params, prompts = setting
    answers = engine.answer(params, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == greedy_without_cache(engine, params, prompt)
        assert answer.finished == (len(answer.tokens) < NEW)
        assert not set(answer.tokens) & set(engine.banned)
    assert len({a.tokens for a in answers}) > 3  # the prompts make a difference


def test_batch_size_changes_no_answer(setting):
    engine, params, prompts = setting
    expected = engine.answer(params, prompts)
    for size in (1, 7):
        other = Engine(engine.graph, engine.tokenizer, POLICY, batch_size=size, max_new_tokens=NEW)
        assert other.answer(params, prompts) == expected


def test_blind_zeroes_the_patches(setting):
    engine, params, prompts = setting
    same_size = [p for p in prompts if p.images]
    seen, blind = engine.answer(params, same_size), engine.answer(params, same_size, blind=True)
    assert [a.tokens for a in seen] != [a.tokens for a in blind]


def test_a_missing_image_is_answered_with_an_error(setting, tmp_path):
    engine, params, prompts = setting
    broken = dataclasses.replace(
        prompts[0],
        segments=tuple(
            dataclasses.replace(s, encoded=tmp_path / "gone.png") if hasattr(s, "encoded") else s
            for s in prompts[0].segments
        ),
    )
    answers = engine.answer(params, [prompts[1], broken, prompts[2]])
    assert "gone.png" in answers[1].error
    expected = engine.answer(params, [prompts[1], prompts[2]])
    assert [answers[0], answers[2]] == expected


def test_windowed_attention_decodes_like_the_whole_pass(llava_json, tokenizer, tiny_model):
    config = dataclasses.replace(
        tiny_model, vocab_size=tokenizer.vocab_size, window=9, image_attention="bidirectional"
    )
    model = make_decoder(config, image_id=tokenizer.image_id, newline_id=tokenizer.newline_id)
    graph, params = nnx.split(model)
    engine = Engine(graph, tokenizer, POLICY, batch_size=4, max_new_tokens=NEW)
    source = LlavaSource(llava_json)
    prompts = [split_answer(source[i])[0] for i in (0, 1, 2)]
    for prompt, answer in zip(prompts, engine.answer(params, prompts), strict=True):
        assert answer.tokens == greedy_without_cache(engine, params, prompt)
