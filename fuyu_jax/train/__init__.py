"""Training: the jitted step, the optimizer, checkpoints, and the loop that ties them.

`Trainer(config).run()` is what `train.py` calls; it resumes by itself and ends with a summary.
"""

from fuyu_jax.train.loop import Trainer

__all__ = ["Trainer"]
