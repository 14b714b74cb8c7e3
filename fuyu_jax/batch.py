"""The one thing that the model is fed: packed rows."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, UInt8

Array = jax.Array | np.ndarray


class PackedBatch(NamedTuple):
    """Rows that several examples share.

    The k-th image placeholder of a row is the k-th patch of that row.

      tokens: placeholders where patches go.
      segment_ids: 0 = padding, 1.. = the example in this row; contiguous.
      positions: restart at 0 in every segment.
      loss_weights: weight of predicting this token.
      patches: raw pixels, row, column, channel within a patch.
      patch_coords: row and column of the patch in its image; (0, 0) begins an image.
    """

    tokens: Int32[Array, "B S"]
    segment_ids: Int32[Array, "B S"]
    positions: Int32[Array, "B S"]
    loss_weights: Float32[Array, "B S"]
    patches: UInt8[Array, "B P C"]
    patch_coords: Int32[Array, "B P 2"]

    @classmethod
    def empty(cls, rows: int, tokens: int, patches: int, channels: int) -> "PackedBatch":
        """Rows of padding, in NumPy, to be filled."""
        return cls(
            tokens=np.zeros((rows, tokens), np.int32),
            segment_ids=np.zeros((rows, tokens), np.int32),
            positions=np.zeros((rows, tokens), np.int32),
            loss_weights=np.zeros((rows, tokens), np.float32),
            patches=np.zeros((rows, patches, channels), np.uint8),
            patch_coords=np.zeros((rows, patches, 2), np.int32),
        )
