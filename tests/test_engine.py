"""The engine: answers that depend on nothing but the prompt, and what is computed only once."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from fuyu_jax.data.example import BadImageError
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.processor import Processor
from fuyu_jax.errors import UserError
from fuyu_jax.generate import chunks
from fuyu_jax.generate.pretrained import PretrainedModel
from fuyu_jax.model import make_decoder
from fuyu_jax.model.paged import PAGE

ROOT = Path(__file__).parent.parent
PATCH = 8


def open_model(tokenizer, tiny_model, **changes):
    config = dataclasses.replace(
        tiny_model, vocab_size=tokenizer.vocab_size, num_kv_heads=2, **changes
    )
    made = make_decoder(
        config, image_id=tokenizer.image_id, newline_id=tokenizer.newline_id, seed=7
    )
    graph, params = nnx.split(made)
    processor = Processor(tokenizer, LayoutPolicy(PATCH))
    return PretrainedModel(processor, config, graph, params, (tokenizer.eos_id,))


@pytest.fixture(scope="module")
def model(tokenizer, tiny_model):
    return open_model(tokenizer, tiny_model)


def picture(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(rng, count):
    return rng.integers(300, 400, count).tolist()


def make_prompts(rng, number, longest=120):
    """Text, an image and text, or text between two images."""
    prompts = []
    for i in range(number):
        side = lambda: int(rng.integers(5, 60))  # noqa: E731
        text = ids(rng, int(rng.integers(1, longest)))
        image = picture(rng, side(), side())
        kinds = [[text], [image, text], [image, text, picture(rng, side(), side()), ids(rng, 3)]]
        prompts.append(kinds[i % 3])
    return prompts


def marks(model):
    """Ids of layouts, which stand for no text."""
    t = model.tokenizer
    return t.pad_id, t.bos_id, t.image_id, t.newline_id, t.answer_id


def ask(model, prompts, count, **settings):
    """Answers that go on to the end, with no mark in them."""
    settings = {"eos_ids": (), "banned": marks(model), **settings}
    return model.generate(prompts, count, **settings)


def by_the_whole_pass(model, prompt, count):
    """Greedy tokens, each from the logits of everything before it, with how clear each was."""
    said, clear = [], []
    for _ in range(count):
        logits = np.array(model.logits([*prompt[:-1], prompt[-1] + said])[-1])
        logits[list(marks(model))] = -np.inf
        best = np.sort(logits)[::-1]
        clear.append(best[0] - best[1])
        said.append(int(logits.argmax()))
    return said, min(clear)


def test_answers_are_those_of_the_whole_pass_at_any_batch_size(model):
    prompts = make_prompts(np.random.default_rng(0), 40)
    found = {n: ask(model, prompts, 9, batch_size=n) for n in (1, 7, 32)}
    assert found[1] == found[7] == found[32]
    for i in range(0, 40, 3):
        expected, clear = by_the_whole_pass(model, prompts[i], 9)
        assert clear > 1e-4  # or rounding could decide
        assert list(found[7][i].tokens) == expected
    # Rows that end at different times are given to others.
    first = {a.tokens[3] for a in found[1][:20]}
    cut = {n: ask(model, prompts, 9, batch_size=n, eos_ids=list(first)) for n in (1, 7, 32)}
    assert cut[1] == cut[7] == cut[32]
    for whole, short in zip(found[1], cut[1], strict=True):
        end = next((i for i, t in enumerate(whole.tokens) if t in first), None)
        assert short.tokens == whole.tokens[:end]
        assert short.finished == (end is not None)
    assert len({len(a.tokens) for a in cut[1]}) > 3


@pytest.mark.parametrize(
    "changes",
    [{}, {"window": 41}, {"image_attention": "bidirectional"}],
    ids=["causal", "window", "bidirectional"],
)
def test_prompts_longer_than_a_chunk(tokenizer, tiny_model, changes, monkeypatch):
    """Parts of a prompt run one after another; images that see both ways are not divided."""
    monkeypatch.setattr(chunks, "LARGE", 64)
    monkeypatch.setattr(chunks, "SMALL", 64)
    model = open_model(tokenizer, tiny_model, **changes)
    rng = np.random.default_rng(1)
    image = picture(rng, 50, 80)  # 7 × (10 + 1) tokens: more than a chunk
    prompts = [
        [ids(rng, 150)],
        [ids(rng, 20), image, ids(rng, 30)],
        [image, ids(rng, 3)],
        [picture(rng, 30, 30), ids(rng, 60), picture(rng, 20, 60), ids(rng, 9)],
    ]
    for prompt, answer in zip(prompts, ask(model, prompts, 6), strict=True):
        expected, clear = by_the_whole_pass(model, prompt, 6)
        assert clear > 1e-4
        assert list(answer.tokens) == expected


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_what_prompts_begin_alike_is_computed_once(tokenizer, tiny_model, kind):
    model = open_model(tokenizer, tiny_model, image_attention=kind)
    rng = np.random.default_rng(2)
    image, other = picture(rng, 70, 60), picture(rng, 70, 60)
    tokens = 9 * (8 + 1)
    questions = [ids(rng, 12) for _ in range(6)]
    prompts = [[image, q] for q in questions] + [[other, questions[0]]]
    answers = ask(model, prompts, 5)
    usage = model.usage()
    # Of 81 tokens of the image two pages are whole; pages inside of it are of no use where its
    # tokens see each other both ways.
    each = tokens // PAGE * PAGE if kind == "causal" else 0
    assert usage["reused_tokens"] == 5 * each
    assert usage["prompt_tokens"] + usage["reused_tokens"] == 7 * (tokens + 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = open_model(tokenizer, tiny_model, image_attention=kind)
        assert ask(alone, [prompt], 5) == [answer]
    assert answers[0] != answers[-1]
    # The next call finds what is there still: the whole pages before the last token.
    assert ask(model, prompts, 5, batch_size=2) == answers
    again = (tokens + 12 - 1) // PAGE * PAGE
    inside = again < tokens and kind == "bidirectional"
    assert model.usage()["reused_tokens"] - usage["reused_tokens"] == (0 if inside else 7 * again)
    model.forget()
    assert ask(model, prompts[:1], 5) == answers[:1]


def test_likelihoods_are_those_of_the_whole_pass(model):
    rng = np.random.default_rng(3)
    model.forget()
    before = model.usage()
    image = picture(rng, 60, 60)
    pairs = [([image, ids(rng, 9)], ids(rng, int(rng.integers(1, 8)))) for _ in range(5)]
    context = [picture(rng, 30, 30), ids(rng, 70)]
    pairs += [(context, ids(rng, 4)) for _ in range(6)]
    pairs += [([ids(rng, 3)], ids(rng, 1500))]
    found = model.scores(pairs)
    for (prompt, words), score in zip(pairs, found, strict=True):
        logits = np.asarray(model.logits([*prompt[:-1], prompt[-1] + words]), np.float64)
        at = logits[-len(words) - 1 : -1]
        top = at.max(-1, keepdims=True)
        logprobs = at - top - np.log(np.exp(at - top).sum(-1, keepdims=True))
        expected = logprobs[np.arange(len(words)), words].sum()
        # Each token's log-probability is good to some 1e-6 in float32.
        assert score.logprob == pytest.approx(expected, abs=3e-6 * len(words))
        assert score.tokens == len(words)
        assert score.is_greedy == (at.argmax(-1).tolist() == words)
    usage = model.usage()
    image_tokens, context_tokens = 8 * 9, 4 * 5 + 70
    expected = 4 * (image_tokens // PAGE) * PAGE + 5 * ((context_tokens - 1) // PAGE) * PAGE
    assert usage["reused_tokens"] - before["reused_tokens"] == expected
    greedy = ask(model, [context], 3)[0].tokens
    assert model.score(context, greedy).is_greedy


def test_a_thousand_prompts_of_all_lengths_take_six_compilations(tokenizer, tiny_model):
    model = open_model(tokenizer, tiny_model)
    rng = np.random.default_rng(4)
    lengths = np.exp(rng.uniform(0, np.log(3000), 1000)).astype(int)
    prompts = [[ids(rng, int(n))] for n in lengths]
    for i in range(0, 1000, 50):
        prompts[i] = [
            picture(rng, int(rng.integers(5, 200)), int(rng.integers(5, 200))),
            *prompts[i],
        ]
    assert len(ask(model, prompts, 2, batch_size=32)) == 1000
    assert model.usage()["compilations"] <= 6


def test_draws_follow_the_probabilities_and_not_the_batch(model):
    rng = np.random.default_rng(5)
    prompt = [picture(rng, 20, 20), ids(rng, 6)]
    temperature, number = 0.7, 3000
    logits = np.asarray(model.logits(prompt)[-1], np.float64) / temperature
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    drawn = ask(model, [prompt] * number, 1, temperature=temperature)
    counts = np.bincount([a.tokens[0] for a in drawn], minlength=len(shares))
    # Standardised: a tenth of a per cent of such sums of squares lies above 1.4 for 200 classes.
    likely = shares * number > 5
    deviation = (counts[likely] - shares[likely] * number) ** 2 / (shares[likely] * number)
    assert deviation.mean() < 1.5
    assert likely.sum() > 20
    few = ask(model, [prompt] * 500, 1, temperature=temperature, top_p=0.3)
    order = np.argsort(-shares)
    kept = order[: int((np.cumsum(shares[order]) < 0.3).sum()) + 1]
    assert {a.tokens[0] for a in few} <= set(kept.tolist())
    assert len({a.tokens[0] for a in few}) > len(kept) / 2
    prompts = make_prompts(rng, 20)
    settings = {"temperature": 1.0, "top_p": 0.9}
    a, b = (ask(model, prompts, 6, batch_size=n, **settings) for n in (3, 16))
    assert a == b
    assert ask(model, prompts, 6, batch_size=16, seed=1, **settings) != a


def test_text_is_told_as_it_is_said(model, tmp_path):
    rng = np.random.default_rng(6)
    prompts = make_prompts(rng, 9, longest=20)
    pieces: dict[int, list[str]] = {}
    answers: dict[int, object] = {}
    found = ask(
        model,
        prompts,
        30,
        batch_size=4,
        on_text=lambda i, piece: pieces.setdefault(i, []).append(piece),
        on_answer=lambda i, answer: answers.__setitem__(i, answer),
    )
    assert [answers[i] for i in range(9)] == found
    assert sum(map(len, pieces.values())) > 9 * 3
    for i, answer in enumerate(found):
        assert answer.text.startswith("".join(pieces[i]))
        # What is left is a character whose last bytes were never said.
        assert len(answer.text) - len("".join(pieces[i])) <= 4
    broken = [tmp_path / "gone.png", [300]]
    with pytest.raises(BadImageError, match=r"gone\.png"):
        ask(model, [prompts[0], broken], 3)


def test_an_image_that_goes_bad_is_an_answer_with_an_error(model, tmp_path):
    from PIL import Image

    path = tmp_path / "a.png"
    Image.effect_noise((60, 60), 50).convert("RGB").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # its header is good
    rng = np.random.default_rng(7)
    good = make_prompts(rng, 3)
    told = {}
    found = ask(model, [good[0], [path, [300]], *good[1:]], 4, on_answer=told.__setitem__)
    assert "a.png" in found[1].error and told[1] == found[1]
    assert [found[0], *found[2:]] == ask(model, good, 4)
    with pytest.raises(BadImageError, match=r"a\.png"):
        model.scores([([path, [300]], [301])])
    scores = {}
    got = model.scores([([path, [300]], [301]), (good[0], [301])], on_score=scores.__setitem__)
    assert len(got) == 1 and got[0] == scores[1]
    assert "a.png" in scores[0]


def test_a_callback_that_fails_leaves_the_model_usable(model):
    prompts = make_prompts(np.random.default_rng(8), 6)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        ask(model, prompts, 5, batch_size=2, on_answer=fail)
    assert len(ask(model, prompts, 5, batch_size=2)) == 6


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": -1}, "temperature=-1: give 0"),
        ({"top_p": 0.5}, "changes nothing where temperature=0"),
        ({"top_p": 1.5, "temperature": 1}, r"top_p=1\.5: give more than 0"),
        ({"num_beams": 0}, "num_beams=0: give 1 or more"),
        ({"num_beams": 3, "temperature": 1.0}, "neither draw by chance"),
        ({"num_beams": 300}, "num_beams=300: give 1 to 64"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": -1}, "batch_size=-1"),
    ],
)
def test_settings_that_make_no_sense(model, settings, told):
    with pytest.raises(UserError, match=told):
        ask(model, [[[300, 301]]], 3, **settings)


SCRIPT = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from pathlib import Path
from fuyu_jax.config import MeshConfig, ModelConfig
from fuyu_jax.parallel import make_mesh
from fuyu_jax.parallel.mesh import state_shardings
from fuyu_jax.tokenizer import Tokenizer
import test_engine as t

tiny = ModelConfig(**json.loads(sys.argv[3]))
model = t.open_model(Tokenizer(Path(sys.argv[2])), tiny)
params = jax.tree.map(np.asarray, model.params)
told = []
for sizes in json.loads(sys.argv[4]):
    mesh = make_mesh(MeshConfig(*sizes)) if sizes else None
    here = t.PretrainedModel(
        model.processor, model.config, model.graph,
        jax.device_put(params, state_shardings(params, mesh) if mesh else jax.devices()[0]),
        model.eos_ids, mesh,
    )
    told.append(t.everything(here))
print(json.dumps(told))
"""


def everything(model):
    rng = np.random.default_rng(9)
    prompts = [*make_prompts(rng, 20), [ids(rng, 1400)]]
    image = picture(rng, 60, 60)
    prompts += [[image, ids(rng, 4)] for _ in range(4)]
    greedy = ask(model, prompts, 7, batch_size=6)
    drawn = ask(model, prompts, 4, batch_size=16, temperature=1.0)
    beams = ask(model, prompts[:6], 5, num_beams=3)
    scores = model.scores([(p, [301, 302, 303]) for p in prompts])
    return {
        "greedy": [a.tokens for a in greedy],
        "drawn": [a.tokens for a in drawn],
        "beams": [a.tokens for a in beams],
        "scores": [s.logprob for s in scores],
    }


def test_any_mesh_gives_the_same(tokenizer, tiny_model, tmp_path):
    meshes = [None, (2, 2, 2)]
    tokenizer_file = next(
        p for p in Path(tokenizer.path).parent.iterdir() if p.name.startswith("tokenizer")
    )
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(ROOT / "tests"),
            str(tokenizer_file),
            json.dumps(dataclasses.asdict(tiny_model)),
            json.dumps(meshes),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    alone, *others = json.loads(result.stdout.splitlines()[-1])
    for other in others:
        assert {k: other[k] for k in ("greedy", "drawn", "beams")} == {
            k: alone[k] for k in ("greedy", "drawn", "beams")
        }
        # Sums of three log-probabilities in float32, added in another order.
        np.testing.assert_allclose(other["scores"], alone["scores"], atol=1e-5)


def test_the_cache_is_laid_over_the_mesh():
    """Pages with their rows, heads over `tensor`: seen from the shapes alone."""
    from fuyu_jax.model.paged import cache_specs

    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    spec = cache_specs(2, mesh).k
    assert spec[1] == ("data", "fsdp") and spec[2] == "tensor"
    assert cache_specs(1, mesh).k[2] is None
