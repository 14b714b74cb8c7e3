"""Work of a train step in floating-point operations, as pure arithmetic; and what a chip can do.

Only what training needs counts: real tokens and patches, no padding; attention by the pairs of
query and key inside segments (about Σ len² / 2); logits where there is a loss; nothing for what
is computed again in the backward pass.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from fuyu_jax.config import ModelConfig
from fuyu_jax.parallel.chips import CHIPS

_FOURIER = 48  # features of a patch's row and column, and edges told of it: as in `model/`
_EDGES = 32


class Work(NamedTuple):
    """What the rows of a step hold, over all hosts.

    pairs: of a query and a key that it sees. loss_tokens: positions with a loss weight.
    """

    tokens: float
    pairs: float
    loss_tokens: float
    patches: float


class Flops(NamedTuple):
    """Of one train step, forward and backward."""

    layers: float
    attention: float
    head: float
    patches: float

    @property
    def total(self) -> float:
        return sum(self)


def segment_lengths(segment_ids: Int32[np.ndarray, "*any S"]) -> np.ndarray:
    """Lengths of all segments of all rows; padding (0) is none."""
    rows = segment_ids.reshape(-1, segment_ids.shape[-1]).astype(np.int64)
    size = int(rows.max(initial=0)) + 1
    counts = np.bincount((rows + size * np.arange(len(rows))[:, None]).ravel())
    return counts[(counts > 0) & (np.arange(len(counts)) % size > 0)]


def attended_pairs(lengths: np.ndarray, window: int = 0) -> int:
    """Pairs of query and key under causal attention, Σ len · (len + 1) / 2; with a window less.

    (Images that see themselves both ways have some more; they are not counted.)
    """
    n = np.asarray(lengths, np.int64)
    seen = np.minimum(n, window) if window else n
    return int((seen * (seen + 1) // 2 + (n - seen) * seen).sum())


def matmul_parameters(model: ModelConfig) -> int:
    """Numbers in the kernels that every token goes through: the layers', without the head."""
    heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_dim
    mlp = (2 if model.mlp == "relu2" else 3) * model.mlp_dim
    return model.num_layers * model.dim * (heads + mlp)


def model_flops(model: ModelConfig, work: Work, vocab_size: int = 0) -> Flops:
    """Operations of a train step: 2 a number of a kernel forward, 4 backward.

    Attention has two products of 2·H·E operations a pair (scores, and values) and twice as many
    backward. Pixels need no gradient, so the patch projection has 4 in all.

    Args:
      model: sizes.
      work: what the step's rows hold.
      vocab_size: where the model's is 0.
    """
    d, vocab = model.dim, model.vocab_size or vocab_size
    patch = 4 * d * model.patch_channels
    if model.image_positions == "fourier":
        patch += 4 * d * _FOURIER
    if model.patch_loss == "edges":
        patch += 6 * d * _EDGES
    return Flops(
        layers=6.0 * matmul_parameters(model) * work.tokens,
        attention=12.0 * model.num_layers * model.num_heads * model.head_dim * work.pairs,
        head=6.0 * d * vocab * work.loss_tokens,
        patches=float(patch) * work.patches,
    )


# Dense bfloat16 FLOP/s of what JAX calls one device, by the beginning of its kind; NVIDIA's from
# its data sheets (half of the figure "with sparsity"). The first that matches counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v4", CHIPS["v4"].flops),
    ("TPU v5 lite", CHIPS["v5e"].flops),
    ("TPU v5e", CHIPS["v5e"].flops),
    ("TPU v5", CHIPS["v5p"].flops),
    ("TPU v6", CHIPS["v6e"].flops),
    ("TPU7x", CHIPS["tpu7x"].share(2).flops),
    ("NVIDIA H200", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA B200", 2250e12),
)


def peak_flops(device_kind: str, given: float = 0.0) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None where it is not known (a CPU).

    Args:
      device_kind: as JAX names it.
      given: the configuration's own, which goes before the table.
    """
    if given:
        return given
    kind = device_kind.lower()
    return next((peak for name, peak in _PEAKS if kind.startswith(name.lower())), None)
