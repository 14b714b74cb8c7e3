"""The whitening start of the patch projection."""

import numpy as np
import pytest

from fuyu_jax import config as config_lib
from fuyu_jax.patches import normalise
from fuyu_jax.train import Trainer
from fuyu_jax.train.patch_init import whitening


def smooth_patches(count=4000, size=6, seed=0):
    """Patches as images have them: bright or dark as a whole, with little detail."""
    rng = np.random.default_rng(seed)
    level = rng.normal(128, 50, (count, 1, 1, 1))
    slope = rng.normal(0, 3, (count, 1, 1, 3)) * np.arange(size)[None, :, None, None]
    noise = rng.normal(0, 4, (count, size, size, 3))
    return (level + slope + noise).clip(0, 255).astype(np.uint8).reshape(count, -1)


@pytest.mark.parametrize("dim", [24, 108, 160])
def test_features_are_white_whatever_the_patches(dim):
    patches = smooth_patches()
    kernel, bias = whitening(patches, dim, std=0.5, floor=1e-9)
    features = normalise(patches) @ kernel + bias
    covariance = np.cov(features.T, bias=True)
    kept = min(dim, patches.shape[1])
    # An orthogonal map of `kept` white directions: eigenvalues std² so many times, else 0.
    eigenvalues = np.sort(np.linalg.eigvalsh(covariance))[::-1]
    np.testing.assert_allclose(eigenvalues[:kept], 0.25, rtol=0.01)
    np.testing.assert_allclose(eigenvalues[kept:], 0, atol=1e-5)


def test_the_mean_patch_has_a_direction_of_its_own():
    patches = smooth_patches()
    kernel, bias = whitening(patches, 64, std=0.5)
    middle = normalise(patches).mean(axis=0) @ kernel + bias
    assert 0.3 < middle.std() < 0.7


def test_the_floor_keeps_noise_small():
    patches = smooth_patches()
    kernel, _ = whitening(patches, 108, std=1.0, floor=0.1)
    variances = np.linalg.eigvalsh(np.cov((normalise(patches) @ kernel).T, bias=True))
    assert variances.max() < 1.0
    assert np.median(variances) < 0.05


def test_a_run_starts_whitened_and_resumes_what_it_learnt(tiny_config):
    config = config_lib.replace(tiny_config, {"model.patch_init": "whiten"})
    first = Trainer(config)
    before = np.asarray(first.state.params["patch_projection"]["kernel"][...])
    plain = Trainer(config_lib.replace(tiny_config, {"workdir": tiny_config.workdir + "_plain"}))
    assert np.abs(before - plain.state.params["patch_projection"]["kernel"][...]).max() > 0.01
    # Stopped before its first checkpoint, it begins again from the same start.
    begun = np.asarray(Trainer(config).state.params["patch_projection"]["kernel"][...])
    np.testing.assert_array_equal(begun, before)
    first.run(stop_after=2)
    learnt = np.asarray(first.state.params["patch_projection"]["kernel"][...])
    again = Trainer(config)
    assert again.resume() == 2
    np.testing.assert_array_equal(again.state.params["patch_projection"]["kernel"][...], learnt)
