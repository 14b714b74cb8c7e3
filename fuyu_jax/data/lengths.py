"""How long examples are, from headers alone; and the examples that cannot be read."""

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from fuyu_jax.data.example import BadImageError
from fuyu_jax.data.layout import Visit, lay_out
from fuyu_jax.data.mixture import Mixture, Part
from fuyu_jax.errors import TrainingStoppedError
from fuyu_jax.tokenizer import Tokenizer


class BadExamples:
    """Counts examples whose images failed, each once, and stops when there are too many.

    Args:
      limit: how many may fail.
      path: a JSON Lines file that each is added to, if one is wanted.
    """

    def __init__(self, limit: int, path: Path | None = None):
        self.limit = limit
        self.path = path
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, id: str, reason: str) -> None:
        """Notes a bad example.

        Raises:
          TrainingStoppedError: this one is over the limit.
        """
        with self._lock:
            if id not in self.reasons:
                self.reasons[id] = reason
                print(f"skipped example {id}: {reason}", flush=True)
                self._write({id: reason})
            if len(self.reasons) > self.limit:
                raise TrainingStoppedError(
                    f"{len(self.reasons)} examples have missing or broken images, above the limit "
                    f"of {self.limit} (data.max_bad_examples, data.max_bad_share); the last: "
                    f"{reason}"
                )

    def keep_in(self, path: Path) -> None:
        """From now on, and what was found before, into this file."""
        with self._lock:
            self.path = path
            known = set()
            if path.is_file():
                known = {json.loads(x)["id"] for x in path.read_text().splitlines() if x.strip()}
            self._write({k: v for k, v in self.reasons.items() if k not in known})

    def _write(self, reasons: dict[str, str]) -> None:
        if self.path is not None and reasons:
            with self.path.open("a", encoding="utf-8") as file:
                for id, reason in reasons.items():
                    file.write(json.dumps({"id": id, "reason": reason}) + "\n")


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Token and patch lengths of examples; 0 tokens: left out as bad.

    difficulty: what the source says of an example, its tokens where it says nothing. empty:
    examples without anything in them.
    """

    tokens: Int32[np.ndarray, "N"]
    patches: Int32[np.ndarray, "N"]
    difficulty: Float32[np.ndarray, "N"]
    images: int
    resized: int
    empty: int = 0


def measure(part: Part, tokenizer: Tokenizer, bad: BadExamples, label: str = "") -> Lengths:
    """Lays out every example of a source as it is without chance.

    `label` goes before the ids of bad examples.
    """
    size = len(part.source)
    tokens, patches = np.zeros(size, np.int32), np.zeros(size, np.int32)
    difficulty = np.ones(size, np.float32)
    images = resized = empty = 0
    for i in range(size):
        try:
            example = part.source[i]
            layout = lay_out(example, tokenizer, part.policy)
        except BadImageError as error:
            bad.add(label + part.source.id(i), str(error))
            continue
        empty += not example.segments
        difficulty[i] = example.info.get("difficulty", len(layout.tokens))
        tokens[i], patches[i] = len(layout.tokens), layout.num_patches
        images += len(layout.grids)
        resized += layout.resized
    return Lengths(tokens, patches, difficulty, images, resized, empty)


def measure_visit(mixture: Mixture, part: int, tokenizer: Tokenizer, visit: Visit):
    """(tokens, patches) of an example whose lengths depend on when it is met."""
    where = mixture.parts[part]
    layout = lay_out(where.source[visit.index], tokenizer, where.policy, visit=visit)
    return len(layout.tokens), layout.num_patches
