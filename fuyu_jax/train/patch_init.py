"""A patch projection that begins by whitening: every kind of detail enters with equal strength.

Raw patches are ill-conditioned: the brightness of the background has hundreds of times the
variance of an edge, so a random projection shows the decoder brightness and little else, and
gradient descent finds edges last. The remedy is old for convolutions (Coates & Ng 2012,
"Learning Feature Representations with K-means"): project on the principal components of training
patches, each scaled to the same variance. It changes where training starts, not the model.
"""

import numpy as np
from jaxtyping import Float32, UInt8

from fuyu_jax.patches import normalise


def whitening(
    patches: UInt8[np.ndarray, "N C"], dim: int, std: float, floor: float = 1e-4, seed: int = 0
) -> tuple[Float32[np.ndarray, "C D"], Float32[np.ndarray, " D"]]:
    """Kernel and bias that map patches to decorrelated features of standard deviation `std`, around
    a random vector of the same size.

    Args:
      patches: a sample of training patches.
      dim: D. Where C < D the features are mixed by a random orthogonal map; else the D components
        of largest variance are kept.
      std: of each feature.
      floor: variances below this share of the total count as this share, so that noise is not
        blown up.
      seed: of the orthogonal map.
    """
    x = normalise(patches).astype(np.float64)
    mean = x.mean(axis=0)
    variances, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    order = np.argsort(variances)[::-1][:dim]
    variances, vectors = variances[order], vectors[:, order]
    scale = std / np.sqrt(variances + floor * variances.sum())
    kernel = vectors * scale
    # An orthogonal map keeps the features white and spreads them over all D channels.
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(rng.normal(size=(dim, dim)))[0][: kernel.shape[1]]
    kernel = kernel @ mix
    # Without a direction of its own a blank patch would be next to nothing, and the norm before the
    # first block would blow that up to noise as strong as an object.
    own = std * rng.normal(size=dim)
    return kernel.astype(np.float32), (own - mean @ kernel).astype(np.float32)
