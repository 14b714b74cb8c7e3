"""Generation: prompts in, answers and likelihoods out.

`Engine` takes examples without their answers and lays them out as training does; a `Session` runs
them over a paged cache of keys and values. `opening.load` gives a `PretrainedModel`, for users.
"""

from fuyu_jax.generate.engine import Answer, Engine

__all__ = ["Answer", "Engine"]
