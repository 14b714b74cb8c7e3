"""Tokenizers of models without image tokens: a language model's own, and none at all."""

import os
from collections.abc import Sequence
from pathlib import Path

from fuyu_jax.errors import UserError
from fuyu_jax.tokenizer import Location, Tokenizer
from fuyu_jax.vocabulary import open_vocabulary


class TextTokenizer(Tokenizer):
    """A language model's tokenizer as it is; an id of -1 stands for a mark that is not there.

    Args:
      path: a sentencepiece `.model` file, a `tokenizer.json`, or a folder with one of them.
    """

    image_id = newline_id = eos_id = -1
    pad_id = 0
    bos_id = answer_id = None
    box_ids = point_ids = ()
    num_coordinates = 0

    def __init__(self, path: str | os.PathLike[str]):
        self._vocabulary = open_vocabulary(path)
        self.path = self._vocabulary.path
        self.vocab_size = self._vocabulary.size
        self.bos_id = self._vocabulary.bos
        self.pad_id = self._vocabulary.pad or 0
        if self._vocabulary.eos is not None:
            self.eos_id = self._vocabulary.eos

    def encode(self, text: str, scale: int | float = 1.0) -> list[int]:
        """Token ids of a text; markup stays text."""
        del scale
        return self._vocabulary.encode(text)

    def decode(self, tokens: Sequence[int], scale: int | float = 1.0) -> str:
        """Text of token ids, without begin, end and padding."""
        del scale
        hidden = {self.pad_id, self.bos_id, self.eos_id}
        kept = [int(t) for t in tokens if int(t) not in hidden and 0 <= int(t) < self.vocab_size]
        return self._vocabulary.decode(kept)

    def locations(self, tokens: Sequence[int], scale: int | float = 1.0) -> list[Location]:
        """None: there are no boxes."""
        del tokens, scale
        return []


_NEWLINES = {71011: 71019}  # by placeholder: Fuyu-8B's


class NoTokenizer(TextTokenizer):
    """In the place of a tokenizer that is not there: token ids can be taken, and no text; images
    where both of their marks are known.

    Args:
      folder: where none is.
      vocab_size: of the model.
      image_id: its placeholder, if it has one.
    """

    def __init__(self, folder: Path, vocab_size: int, image_id: int | None = None):
        self.path = folder
        self.vocab_size = vocab_size
        if image_id in _NEWLINES:
            self.image_id, self.newline_id = image_id, _NEWLINES[image_id]

    def encode(self, text: str, scale: int | float = 1.0) -> list[int]:
        del text, scale
        raise UserError(
            f"{self.path}: no tokenizer.json and no tokenizer.model in it, so texts cannot be "
            "taken; put one there, or give token ids"
        )

    def decode(self, tokens: Sequence[int], scale: int | float = 1.0) -> str:
        """Nothing: what the ids say is not known."""
        del tokens, scale
        return ""

    def piece(self, token: int) -> str:
        return str(token)
