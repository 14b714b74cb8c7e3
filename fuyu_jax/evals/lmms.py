"""What lmms-eval finds by the entry point `lmms_eval.models`; the model is in `lmms_model`."""

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `--model fuyu_jax`. Needs lmms-eval; imports no JAX."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("fuyu_jax", simple_class_path="fuyu_jax.evals.lmms_model.FuyuJax")
