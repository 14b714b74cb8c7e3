"""Training here and in PyTorch: the same weights and batch, loss, gradients and twenty steps."""

import re

import numpy as np
import pytest

pytest.importorskip("torch", reason="the referee: pip install -e '.[interop]'")
pytest.importorskip("transformers", reason="the referee: pip install -e '.[interop]'")

import jax
import torch
from flax import nnx
from interop_models import IMAGE, NEWLINE, fuyu_model, one_batch, pixels, save

from fuyu_jax.config import MeshConfig, OptimConfig
from fuyu_jax.interop import describe, read_params
from fuyu_jax.interop.fuyu import file_tensors
from fuyu_jax.model import loss_sums, make_decoder
from fuyu_jax.parallel.mesh import make_mesh, paths, state_shardings
from fuyu_jax.train.optimizer import make_optimizer, schedule
from fuyu_jax.train.step import TrainState, make_train_step

STEPS = 20


@pytest.fixture(scope="module", params=["persimmon", "qwen3"])
def both(request, tmp_path_factory):
    """A reference model, our config, parameters and graph, and one batch for both."""
    model = fuyu_model(text=request.param)
    folder = save(model, tmp_path_factory.mktemp("model"))
    described = describe(folder)
    config = described.config
    params, _ = read_params(folder)
    graph = nnx.split(
        nnx.eval_shape(lambda: make_decoder(config, image_id=IMAGE, newline_id=NEWLINE))
    )[0]
    rng = np.random.default_rng(0)

    def text(length):
        return rng.integers(7, 61, length).tolist()

    image = ([IMAGE] * 3 + [NEWLINE]) * 2
    rows = [[*image, 1, *text(6), *image, *text(9)], [1, *text(25)], [*image, 1, *text(4)]]
    batch = one_batch(rows, config.patch_channels)
    for weights, row in zip(batch.loss_weights, rows, strict=True):
        weights[len(row) - 5 : len(row)] = 1
    weights[len(rows[2]) - 3] = 0
    return model, described, params, graph, batch


def their_loss(model, batch):
    given = [p[: (t == IMAGE).sum()] for p, t in zip(batch.patches, batch.tokens, strict=True)]
    labels = np.where(batch.loss_weights > 0, batch.tokens, -100)
    return model(
        input_ids=torch.tensor(batch.tokens, dtype=torch.long),
        pixel_values=pixels(np.concatenate(given))[None],
        attention_mask=torch.tensor(batch.segment_ids > 0, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
    ).loss


def by_their_names(described, tree):
    """A tree of our parameters' shape as their tensors."""
    ours = {p: np.asarray(x) for p, x in zip(paths(tree), jax.tree.leaves(tree), strict=True)}
    found = {}
    for tensor in file_tensors(described.config, described.text_type, True):
        for layer in range(described.config.num_layers if tensor.layered else 1):
            out = np.full(tensor.factored, np.nan, np.float32)
            for part in tensor.parts:
                value = ours[part.path]
                part.view(out)[...] = value[layer] if tensor.layered else value
            found[tensor.name.format(layer)] = out.reshape(tensor.shape)
    return found


def test_loss_and_every_gradient(both):
    model, described, params, graph, batch = both

    @jax.jit
    @jax.value_and_grad
    def ours(params, batch):
        model = nnx.merge(graph, params)
        hidden = model(batch)
        sums, _ = loss_sums(hidden, model.head_kernel(), batch.tokens, batch.loss_weights)
        return sums / batch.loss_weights.sum()

    loss, gradients = ours(params, batch)
    model.zero_grad()
    theirs = their_loss(model, batch)
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    mine = by_their_names(described, gradients)
    named = dict(model.named_parameters())
    assert mine.keys() == named.keys()
    for name, parameter in named.items():
        expected = parameter.grad.numpy()
        error = np.linalg.norm(mine[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-3, f"{name}: {error}"


def test_twenty_steps_of_adamw(both):
    """The run's own step, optimizer, clipping and schedule against torch.optim.AdamW's."""
    model, described, params, graph, batch = both
    if described.text_type != "persimmon":
        pytest.skip("one family's steps are enough; gradients are compared for both")
    config = OptimConfig(peak_lr=3e-3, warmup_steps=4, weight_decay=0.1, clip_norm=1.0)
    mesh = make_mesh(MeshConfig())
    tx = make_optimizer(config, params, STEPS)
    zero = np.zeros((), np.int32)
    state = TrainState(zero, jax.tree.map(np.asarray, params), tx.init(params), zero)
    shardings = state_shardings(state, mesh)
    step = make_train_step(graph, tx, shardings, mesh, image_id=IMAGE)
    state = jax.device_put(state, shardings)
    stacked = jax.tree.map(lambda x: x[None], batch)
    ours = []
    for _ in range(STEPS):
        state, metrics = step(state, stacked)
        ours.append(float(metrics.loss))

    before = {k: v.clone() for k, v in model.state_dict().items()}
    # Decay is of linear maps' matrices alone, as in a run here.
    spared = re.compile(r"language_model\.embed_tokens|norm|\.bias$")
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if not spared.search(n)]},
        {"params": [p for n, p in named.items() if spared.search(n)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=1.0, betas=(config.b1, config.b2), eps=config.eps, weight_decay=0.1
    )
    rate = schedule(config, config.peak_lr, STEPS)
    theirs = []
    for number in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(number))
        optimizer.zero_grad()
        loss = their_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        theirs.append(loss.item())
    trained = {k: v.detach().numpy().copy() for k, v in named.items()}
    model.load_state_dict(before)
    assert theirs[-1] < 0.7 * theirs[0]
    print("loss", theirs[0], theirs[-1], "max", np.max(np.abs(np.subtract(ours, theirs))))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    for name, mine in by_their_names(described, state.params).items():
        if name.endswith("k_layernorm.bias"):
            continue  # its unturned half has no gradient but rounding, of which Adam makes steps
        moved = np.linalg.norm(trained[name] - before[name].numpy())
        assert np.linalg.norm(mine - trained[name]) < 0.01 * moved, name
