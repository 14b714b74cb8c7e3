"""The loss on patches' edges: its target worked out pixel by pixel, and its place in training."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fuyu_jax import config as config_lib
from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import ModelConfig
from fuyu_jax.model import make_decoder
from fuyu_jax.model.patch_loss import CELLS, ORIENTATIONS, SIZE, edge_histograms
from fuyu_jax.train import Trainer
from fuyu_jax.train.metrics import read_metrics


def slow_histogram(patch):
    """One patch [p, p, 3] in 0..255, pixel by pixel in float64."""
    p = len(patch)
    sums = np.zeros((CELLS, CELLS, ORIENTATIONS))
    for y in range(1, p - 1):
        for x in range(1, p - 1):
            dy = (patch[y + 1, x] - patch[y - 1, x]) / 510
            dx = (patch[y, x + 1] - patch[y, x - 1]) / 510
            c = int(np.argmax(dx**2 + dy**2))
            place = math.atan2(dy[c], dx[c]) % math.pi / math.pi * ORIENTATIONS
            low, part = int(place), place - int(place)
            cell = sums[y * CELLS // p, x * CELLS // p]
            cell[low % ORIENTATIONS] += (1 - part) * math.hypot(dy[c], dx[c])
            cell[(low + 1) % ORIENTATIONS] += part * math.hypot(dy[c], dx[c])
    return sums.ravel() / (np.linalg.norm(sums) + 0.02 * p)


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize("size", [5, 8])
def test_histograms_equal_those_made_pixel_by_pixel(size):
    patches = np.random.default_rng(size).integers(0, 256, (2, 3, size, size, 3))
    found = edge_histograms(jnp.asarray(patches.reshape(2, 3, -1), jnp.uint8), size)
    expected = [[slow_histogram(p.astype(float)) for p in row] for row in patches]
    # float32 sums of at most 36 gradients, each rounded at 6e-8 of its size.
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_blank_patch_has_no_edges_and_an_upright_edge_one_orientation():
    patch = np.full((8, 8, 3), 40, np.uint8)
    assert not np.asarray(edge_histograms(jnp.asarray(patch.reshape(1, 1, -1)), 8)).any()
    patch[:, 4:] = 200
    found = np.asarray(edge_histograms(jnp.asarray(patch.reshape(1, 1, -1)), 8))
    found = found.reshape(-1, ORIENTATIONS)
    assert (found[:, 0] > 0.3).all() and not found[:, 1:].any()


def test_only_real_patches_count_and_the_answer_states_do_not_change(tiny_model):
    config = config_lib.replace(
        tiny_model, {"vocab_size": 50, "patch_loss": "edges", "patch_loss_layer": 1}
    )
    model = make_decoder(config, image_id=3, newline_id=4)
    rng = np.random.default_rng(0)
    batch = PackedBatch.empty(2, 12, 6, config.patch_channels)
    batch.tokens[0] = [3, 3, 4, 3, 3, 4, 5, 6, 7, 0, 0, 0]
    batch.tokens[1] = [5, 3, 4, 6, 5, 7, 3, 4, 8, 9, 0, 0]
    batch.segment_ids[:] = batch.tokens > 0
    batch.positions[:] = np.arange(12)
    batch.patches[:] = rng.integers(0, 256, batch.patches.shape)
    hidden, loss = model.training_states(on_device(batch))
    np.testing.assert_array_equal(hidden, model(on_device(batch)))
    other = batch._replace(patches=batch.patches.copy())
    other.patches[0, 4:] = 7  # row 0 has four patches, row 1 two
    other.patches[1, 2:] = 9
    assert float(model.training_states(on_device(other))[1]) == float(loss)
    other.patches[1, 1] = 9
    assert float(model.training_states(on_device(other))[1]) != float(loss)


def test_the_plain_model_has_no_head_for_it():
    model = make_decoder(ModelConfig(vocab_size=50, patch_size=8), image_id=3, newline_id=4)
    assert model.patch_head is None


def test_training_reports_it_and_accumulation_does_not_change_it(tiny_config, tmp_path):
    values = []
    for name, rows, accumulate in (("a", 2, 1), ("b", 1, 2)):
        changes = {
            "workdir": str(tmp_path / name),
            "rows_per_batch": rows,
            "grad_accum": accumulate,
            "model.patch_loss": "edges",
        }
        run = Trainer(config_lib.replace(tiny_config, changes))
        run.run()
        values.append([x["patch_loss"] for x in read_metrics(tmp_path / name) if "loss" in x])
        assert jax.tree.leaves(run.state.params["patch_head"])[0].shape[-1] == SIZE
    assert len(values[0]) == 8 and values[0][-1] < values[0][0]
    # Sums over two rows in another order, eight steps of float32.
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)
