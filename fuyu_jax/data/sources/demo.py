"""The demo set (`fuyu_jax.data.demo`) as a source of examples."""

import json
from collections.abc import Iterator
from pathlib import Path

from fuyu_jax.data import demo
from fuyu_jax.data.example import Example, Image, Text


class DemoSource:
    """One split of a prepared demo set.

    Args:
      directory: what `demo.prepare` returned.
      split: "train", "validation", "test" or "compositional".
    """

    def __init__(self, directory: str | Path, split: str):
        self.split = split
        self.records = demo.load(directory, split)

    def __len__(self) -> int:
        return len(self.records)

    def id(self, index: int) -> str:
        return _text(self.records[index]["id"])

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        id = _text(record["id"])
        size = int(record["height"]), int(record["width"])
        segments: list[Text | Image] = [Image(bytes(record["image"]), *size, name=id)]
        families = []
        for family, question, answer in demo.turns(record):
            segments += [Text(question), Text(answer, train=True)]
            families.append(family)
        objects = _text(record["objects"])
        # More things to tell apart, more image to find them in.
        things = len(json.loads(objects))
        difficulty = max(things, 1) * (3 + size[0] * size[1] / 256)
        info = {"family": families[-1], "objects": objects, "difficulty": difficulty}
        return Example(id, tuple(segments), info)

    def texts(self) -> Iterator[str]:
        """All texts, for a tokenizer."""
        for index in range(len(self)):
            for _, question, answer in demo.turns(self.records[index]):
                yield question
                yield answer


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
