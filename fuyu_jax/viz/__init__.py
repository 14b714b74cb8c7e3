"""Pictures for people: what the model is fed, what it may see, and where it looks.

Every function takes arrays and returns a matplotlib `Figure` that belongs to no window or backend.
The notebook calls them; nothing else in the project depends on them.
"""

from fuyu_jax.viz.attention import draw_attention, draw_masks, patch_attention
from fuyu_jax.viz.patches import draw_patches
from fuyu_jax.viz.rows import draw_row

__all__ = ["draw_attention", "draw_masks", "draw_patches", "draw_row", "patch_attention"]
