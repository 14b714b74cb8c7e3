"""Generation: prompts in, answers out, with a KV cache.

`Engine` takes examples without their answers, lays them out as training does, and decodes
greedily in batches of few shapes.
"""

from fuyu_jax.generate.engine import Answer, Engine

__all__ = ["Answer", "Engine"]
