"""What an answer is worth: one file for each family of metrics, in pure Python and numpy (no JAX).

A family has plain functions on texts and numbers, and a `judge` that makes of records and
predictions the `Units` of `bootstrap`, from which scores and their standard errors come.
"""

from fuyu_jax.evals.metrics.bootstrap import Macro, Metric, Units, Verdict

__all__ = ["Macro", "Metric", "Units", "Verdict"]
