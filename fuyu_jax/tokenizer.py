"""Text and boxes to token ids and back, over a sentencepiece model with Fuyu's special tokens.

The special pieces have the names of Fuyu-8B's vocabulary, so its own `tokenizer.model` works as
one trained here does: `|SPEAKER|` stands where a patch goes, `|NEWLINE|` ends a row of patches,
`<0x04>` begins an answer, `|ENDOFTEXT|` ends it, `<0x00>`..`<0x03>` enclose a box and a point.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece as spm

from fuyu_jax.errors import UserError

IMAGE_PIECE = "|SPEAKER|"
NEWLINE_PIECE = "|NEWLINE|"
EOS_PIECE = "|ENDOFTEXT|"
BOS_PIECE = "<s>"
ANSWER_PIECE = "<0x04>"
BOX_PIECES = ("<0x00>", "<0x01>")
POINT_PIECES = ("<0x02>", "<0x03>")
# Fuyu shrinks images to 1080 x 1920; half of the longer side is the largest coordinate.
MAX_COORDINATE = 960

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_MARKUP = re.compile(
    rf"<box>{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}</box>|<point>{_NUMBER},{_NUMBER}</point>"
)
_CONTROL = re.compile("[\x00-\x04]")  # as bytes they would be Fuyu's box and answer marks


def coordinate_to_token_value(value: int | float, scale: int | float) -> int:
    """An image coordinate (pixels of the original) as Fuyu's integer: round-half-even(v/2·s)."""
    return round(value / 2 * scale)


def token_value_to_coordinate(value: int, scale: int | float) -> int:
    """Fuyu's integer back to pixels of the original image: 2·int(c/s)."""
    return 2 * int(value / scale)


class Tokenizer:
    """A sentencepiece model with the special tokens above.

    Args:
      path: a sentencepiece `.model` file.

    Raises:
      UserError: the file is missing, unreadable, or lacks one of the special pieces.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"tokenizer {self.path}: no such file; give a sentencepiece .model")
        try:
            self._sp = spm.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {self.path}: not a sentencepiece model ({error})") from None
        self.vocab_size: int = self._sp.vocab_size()
        self.pad_id = 0
        self.image_id = self._special(IMAGE_PIECE)
        self.newline_id = self._special(NEWLINE_PIECE)
        self.eos_id = self._special(EOS_PIECE)
        self.bos_id = self._special(BOS_PIECE)
        self.answer_id = self._special(ANSWER_PIECE)
        self.box_ids = tuple(self._special(p) for p in BOX_PIECES)
        self.point_ids = tuple(self._special(p) for p in POINT_PIECES)
        self._coordinate_of = {}
        for n in range(MAX_COORDINATE + 1):
            token = self._sp.piece_to_id(str(n))
            if token == self._sp.unk_id():
                break
            self._coordinate_of[token] = n
        self._token_of = {n: token for token, n in self._coordinate_of.items()}

    def _special(self, piece: str) -> int:
        token = self._sp.piece_to_id(piece)
        if token == self._sp.unk_id():
            raise UserError(
                f"tokenizer {self.path}: no piece {piece!r}; train one with this project"
            )
        return token

    @property
    def num_coordinates(self) -> int:
        """How many integer coordinates (0, 1, ...) have a token of their own."""
        return len(self._coordinate_of)

    def encode(self, text: str, scale: int | float = 1.0) -> list[int]:
        """Token ids of a text; `<box>` and `<point>` markup becomes marks and integers.

        A malformed box stays text, and so does one whose coordinates have no token. Characters
        U+0000 to U+0004 become spaces, since as bytes they would pass for Fuyu's marks.

        Args:
          text: any text. Boxes are `<box>top, left, bottom, right</box>` in original pixels.
          scale: size of the image as the model sees it over its original size.
        """
        text = _CONTROL.sub(" ", text)
        tokens: list[int] = []
        at = 0
        for match in _MARKUP.finditer(text):
            numbers = [float(g) for g in match.groups() if g is not None]
            values = [coordinate_to_token_value(n, scale) for n in numbers]
            if not all(v in self._token_of for v in values):
                continue
            opened, closed = self.box_ids if len(values) == 4 else self.point_ids
            tokens += self._sp.encode(text[at : match.start()])
            tokens += [opened, *(self._token_of[v] for v in values), closed]
            at = match.end()
        return tokens + self._sp.encode(text[at:])

    def decode(self, tokens: Sequence[int], scale: int | float = 1.0) -> str:
        """Text of token ids; a well-formed box or point becomes markup in original pixels.

        Placeholders, padding, `<s>` and `|ENDOFTEXT|` are left out. A malformed box never raises:
        its marks are dropped and its integers stay text.
        """
        hidden = {self.pad_id, self.image_id, self.newline_id, self.eos_id, self.bos_id}
        hidden |= {self.answer_id, *self.box_ids, *self.point_ids}
        parts: list[str] = []
        run: list[int] = []
        at = 0
        while at < len(tokens):
            markup, used = self._markup_at(tokens, at, scale)
            if markup:
                parts += [self._sp.decode(run), markup]
                run = []
            elif tokens[at] not in hidden:
                run.append(int(tokens[at]))
            at += used
        return "".join([*parts, self._sp.decode(run)])

    def _markup_at(self, tokens: Sequence[int], at: int, scale: int | float) -> tuple[str, int]:
        for (opened, closed), count, name in (
            (self.box_ids, 4, "box"),
            (self.point_ids, 2, "point"),
        ):
            inner = tokens[at + 1 : at + 1 + count]
            if (
                tokens[at] == opened
                and len(tokens) > at + 1 + count
                and tokens[at + 1 + count] == closed
                and all(int(t) in self._coordinate_of for t in inner)
            ):
                values = [
                    token_value_to_coordinate(self._coordinate_of[int(t)], scale) for t in inner
                ]
                return f"<{name}>{', '.join(map(str, values))}</{name}>", count + 2
        return "", 1

    def piece(self, token: int) -> str:
        """The vocabulary entry of a token, for people to read."""
        return self._sp.id_to_piece(int(token))


def train_sentencepiece(
    texts: Iterable[str],
    model_path: str | os.PathLike[str],
    vocab_size: int,
    *,
    max_coordinate: int = 80,
    phrases: bool = False,
    words: Sequence[str] = (),
) -> Path:
    """Trains a sentencepiece model (BPE, byte fallback) with Fuyu's special tokens.

    The vocabulary holds 256 bytes, the special pieces and one piece for each integer coordinate
    0..max_coordinate before any learnt piece; it comes out smaller than `vocab_size` where the
    texts do not hold that many. Box markup is taken out of the texts first: boxes are encoded by
    marks and integers.

    Args:
      texts: training texts.
      model_path: where the `.model` file goes; written whole or not at all.
      vocab_size: the most pieces.
      max_coordinate: half of the longest image side (Fuyu's coordinates count two pixels).
      phrases: let a piece span several words, which shortens text made from templates.
      words: words that are pieces of their own (alone and after a space), never part of a phrase.

    Raises:
      UserError: `vocab_size` has no room for the pieces that must be there.
    """
    model_path = Path(model_path)
    coordinates = [str(n) for n in range(max_coordinate + 1)]
    own = [piece for word in words for piece in (f"\u2581{word}", word)]
    needed = 256 + 5 + len(coordinates) + len(own)
    if vocab_size < needed + 32:
        raise UserError(
            f"vocab_size {vocab_size}: {needed} pieces are taken by bytes, special tokens and "
            f"coordinates 0..{max_coordinate} and given words; give at least {needed + 32}"
        )
    cleaned = [t for t in (_CONTROL.sub(" ", _MARKUP.sub(" ", t)).strip() for t in texts) if t]
    if not cleaned:
        raise UserError("no text to train a tokenizer on: every record's text is empty")
    model_path.parent.mkdir(parents=True, exist_ok=True)
    partial = model_path.with_name(model_path.name + f".partial{os.getpid()}")
    try:
        with partial.open("wb") as sink:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(cleaned),
                model_writer=sink,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                hard_vocab_limit=False,
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                control_symbols=[IMAGE_PIECE, NEWLINE_PIECE, EOS_PIECE],
                user_defined_symbols=[*coordinates, *own],
                split_by_whitespace=not phrases,
                max_sentencepiece_length=48 if phrases else 16,
                pad_id=0,
                bos_id=1,
                unk_id=2,
                eos_id=-1,
                minloglevel=2,
                num_threads=1,  # the same texts give the same model
            )
        os.replace(partial, model_path)
    finally:
        partial.unlink(missing_ok=True)
    return model_path
