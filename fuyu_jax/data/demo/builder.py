"""The demo set as a TFDS builder that needs no TensorFlow."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fuyu_jax.data.demo import questions, scenes
from fuyu_jax.data.demo.more import more_turns

DEFAULT_SIZES: Mapping[str, int] = {
    "train": 30_000,
    "validation": 800,
    "test": 1_600,
    "compositional": 700,
}
TRAIN_TURNS = 8

# What is drawn first takes precedence: a training image equal to one of these is drawn anew.
_ORDER = ("test", "compositional", "validation", "train")


class ShapesAndWords(tfds.core.GeneratorBasedBuilder):
    """Questions about drawn shapes and words; see `scenes` and `questions` for how they are made.

    Training records hold up to `TRAIN_TURNS` turns about one image, the others a single one.
    """

    VERSION = tfds.core.Version("2.0.0")
    # Nothing is downloaded, so there are no checksums. Looking for them, as TFDS would, imports
    # `importlib_resources`, which TFDS 4.9.10 does not install.
    url_infos = None

    def __init__(
        self,
        *,
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        progress: Callable[[int], object] = lambda step: None,
        **kwargs: Any,
    ) -> None:
        self._sizes = dict(DEFAULT_SIZES if sizes is None else sizes)
        if unknown := set(self._sizes) - set(_ORDER):
            raise ValueError(f"unknown splits {sorted(unknown)}; the demo set has {sorted(_ORDER)}")
        self._seed = seed
        self._progress = progress
        self._seen: set[bytes] = set()
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        turn = {"family": tfds.features.Text(), "question": tfds.features.Text()}
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "height": np.int32,
            "width": np.int32,
            "turns": tfds.features.Sequence({**turn, "answer": tfds.features.Text()}),
            "objects": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Visual questions about drawn shapes and words, free of language priors.",
            features=tfds.features.FeaturesDict(features),
            # The families take turns in the order written, so any prefix holds them evenly.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        self._seen.clear()
        return {
            split: self._generate_examples(split, self._sizes[split])
            for split in _ORDER
            if self._sizes.get(split)
        }

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
        drafts = questions.drafts(split, self._seed, compositional=split == "compositional")
        for index, draft in zip(range(size), drafts, strict=False):
            rng = random.Random(f"{self._seed}/{split}/{index}")
            scene, pixels = scenes.draw(draft.contents, rng)
            while (digest := _digest(pixels)) in self._seen:
                scene, pixels = scenes.draw(draft.contents, rng)
            self._seen.add(digest)
            turns = [draft.finish(scene)]
            if split == "train":
                turns += more_turns(scene, turns[0], TRAIN_TURNS - 1, rng)
            self._progress(1)
            yield (
                index,
                {
                    "id": f"{split}-{index:06d}",
                    "image": scenes.png(pixels),
                    "height": scene.height,
                    "width": scene.width,
                    "turns": [vars(turn) for turn in turns],
                    "objects": scene.to_json(),
                },
            )


def _digest(pixels: np.ndarray) -> bytes:
    shape = np.array(pixels.shape, np.int32).tobytes()
    return hashlib.blake2b(shape + pixels.tobytes(), digest_size=16).digest()
