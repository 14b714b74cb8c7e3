"""Near duplicates: perceptual hashes of images, and the search for those that differ little."""

import itertools
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Int64, UInt64
from PIL import Image as PilImage
from tqdm import tqdm

from fuyu_jax.errors import UserError


def near_matches(
    hashes: Sequence[tuple[int, ...]], distance: int, *, progress: bool = False
) -> Int64[np.ndarray, "N"]:
    """The earliest kept example that each one looks like, or -1 where it is kept itself.

    Two examples look alike when they have as many images and the hashes of each pair of images, in
    order, differ in at most `distance` bits. An example is compared with kept ones before it only,
    so no two kept ones look alike, and a chain of small changes does not pull in its far end.

    Multi-index hashing (Norouzi et al., 2012): 64 bits are cut into `distance` + 1 bands; of two
    hashes that differ in fewer bits than there are bands, one band is equal. So it is enough, and
    exact, to compare with kept hashes that share a band.

    Args:
      hashes: 64-bit hashes of the images of each example; an example without any is kept.
      distance: bits, 0 to 63.
      progress: show a bar on standard error.
    """
    edges = [64 * band // (distance + 1) for band in range(distance + 2)]
    bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
    matches = np.full(len(hashes), -1, np.int64)
    groups: dict[int, list[int]] = defaultdict(list)
    for at, own in enumerate(hashes):
        if own:
            groups[len(own)].append(at)
    with tqdm(
        total=sum(map(len, groups.values())),
        desc="comparing images",
        unit="example",
        disable=not progress,
    ) as bar:
        for group in groups.values():
            table = np.asarray([hashes[at] for at in group], np.uint64)
            # Of the first image: where that differs too much, the others need no look.
            buckets: list[dict[int, array]] = [defaultdict(partial(array, "q")) for _ in bands]
            for row, at in enumerate(group):
                parts = [(hashes[at][0] >> low) & mask for low, mask in bands]
                shared = [b[part] for b, part in zip(buckets, parts, strict=True) if part in b]
                earlier = min(
                    (_first_near(table, row, rows, distance) for rows in shared), default=row
                )
                if earlier < row:
                    matches[at] = group[earlier]
                else:
                    for bucket, part in zip(buckets, parts, strict=True):
                        bucket[part].append(row)
                bar.update()
    return matches


def _first_near(table: UInt64[np.ndarray, "G images"], row: int, rows: array, distance: int) -> int:
    """The first of `rows` (rising) that is near `row` in every image; `row` if none is."""
    candidates = np.frombuffer(rows, np.int64)
    differ = np.bitwise_count(table[candidates] ^ table[row])
    near = np.flatnonzero((differ <= distance).all(1))
    return int(candidates[near[0]]) if len(near) else row


def perceptual_hash() -> Callable[[np.ndarray], int]:
    """RGB pixels → 64 bits."""
    try:
        import imagehash
    except ImportError:
        raise UserError(
            "near_duplicate_distance needs imagehash: pip install 'fuyu-jax[cleaning]'"
        ) from None

    def phash(pixels: np.ndarray) -> int:
        bits = imagehash.phash(PilImage.fromarray(pixels)).hash
        return int.from_bytes(np.packbits(bits).tobytes(), "big")

    return phash
