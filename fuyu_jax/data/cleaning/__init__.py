"""Leaves examples out of a source before planning: by size, shape, text, and as duplicates.

Each rule that is on looks at every example, and an example left out counts once, under the first
rule that it breaks, in the order of `RULES`. Duplicates are of examples that broke no rule before,
and the first in the source's order stays.

Memory is O(N), of digests and hashes alone (some hundred bytes an example and a distinct image,
and eight more for each band of the near-duplicate search) and of the reasons for what is left
out. Pixels are held of one image a worker.

`python -m fuyu_jax.data.cleaning` tries rules on a file; in a run they are `data.cleaning`.
"""

from fuyu_jax.config import MAX_DISTANCE, CleaningConfig
from fuyu_jax.data.cleaning.apply import CleanedSource, CleaningReport, clean
from fuyu_jax.data.cleaning.near import near_matches
from fuyu_jax.data.cleaning.rules import RULES

__all__ = [
    "MAX_DISTANCE",
    "RULES",
    "CleanedSource",
    "CleaningConfig",
    "CleaningReport",
    "clean",
    "near_matches",
]
