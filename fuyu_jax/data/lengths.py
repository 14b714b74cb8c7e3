"""How long examples are, from headers alone; and the examples that cannot be read."""

import contextlib
import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from fuyu_jax.config import DataConfig
from fuyu_jax.data.layout import Visit, lay_out
from fuyu_jax.data.mixture import Part
from fuyu_jax.data.outline import Outline, read_outline, static_lengths, visit_lengths
from fuyu_jax.errors import TrainingStoppedError
from fuyu_jax.tokenizer import Tokenizer


class BadExamples:
    """Counts examples whose images failed, each once, and stops when there are too many.

    Args:
      limit: how many may fail.
      path: a JSON Lines file that each is added to, if one is wanted.
      quiet: count, but print nothing.
    """

    def __init__(self, limit: int, path: Path | None = None, quiet: bool = False):
        self.limit = limit
        self.path = path
        self.quiet = quiet
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    @classmethod
    def under(cls, config: DataConfig, total: int, *, quiet: bool = False) -> "BadExamples":
        """With the limit that a run sets for so many examples."""
        limit = max(config.max_bad_examples, int(config.max_bad_share * total))
        return cls(limit, quiet=quiet)

    def add(self, id: str, reason: str) -> None:
        """Notes a bad example.

        Raises:
          TrainingStoppedError: this one is over the limit.
        """
        with self._lock:
            if id not in self.reasons:
                self.reasons[id] = reason
                if not self.quiet:
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
                text = path.read_text(encoding="utf-8")
                for line in text.split("\n"):
                    with contextlib.suppress(ValueError, KeyError):  # cut short by a kill
                        known.add(json.loads(line)["id"])
                if text and not text.endswith("\n"):
                    path.write_text(text + "\n", encoding="utf-8")
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
    empty: int
    outline: Outline


def measure(part: Part, tokenizer: Tokenizer, bad: BadExamples, label: str = "") -> Lengths:
    """Lengths of every example of a source as it is without chance.

    `label` goes before the ids of bad examples.
    """
    outline = read_outline(
        part.source, tokenizer, lambda i, reason: bad.add(label + part.source.id(i), reason)
    )
    tokens, patches, resized = static_lengths(outline, part.policy)
    for index in np.flatnonzero(outline.varies):
        layout = lay_out(part.source[int(index)], tokenizer, part.policy)
        tokens[index], patches[index] = len(layout.tokens), layout.num_patches
    silent = np.isnan(outline.difficulty)
    difficulty = np.where(silent, tokens, outline.difficulty).astype(np.float32)
    # Without a token of its own an example has no text, without patches no image.
    empty = int(((tokens == 0) & (outline.text_tokens == 0)).sum())
    return Lengths(tokens, patches, difficulty, len(outline.sizes), resized, empty, outline)


def measure_visit(
    part: Part, lengths: Lengths, tokenizer: Tokenizer, visit: Visit
) -> tuple[int, int]:
    """(tokens, patches) of an example whose lengths depend on when it is met."""
    if lengths.outline.varies[visit.index]:
        layout = lay_out(part.source[visit.index], tokenizer, part.policy, visit=visit)
        return len(layout.tokens), layout.num_patches
    return visit_lengths(lengths.outline, part.policy, visit)
