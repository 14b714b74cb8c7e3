"""Text and boxes to token ids and back, over a vocabulary with Fuyu's special tokens.

The special pieces have the names of Fuyu-8B's vocabulary, so its own `tokenizer.model` or
`tokenizer.json` works as one trained here does: `|SPEAKER|` stands where a patch goes, `|NEWLINE|`
ends a row of patches, `<0x04>` begins an answer, `|ENDOFTEXT|` ends it, `<0x00>`..`<0x03>` enclose
a box and a point. A language model's vocabulary gets them by `fuyu_jax.tokenizer_extend`.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece as spm

from fuyu_jax.errors import UserError
from fuyu_jax.vocabulary import open_vocabulary

IMAGE_PIECE = "|SPEAKER|"
NEWLINE_PIECE = "|NEWLINE|"
EOS_PIECE = "|ENDOFTEXT|"
BOS_PIECE = "<s>"
ANSWER_PIECE = "<0x04>"
BOX_PIECES = ("<0x00>", "<0x01>")
POINT_PIECES = ("<0x02>", "<0x03>")
PAD_PIECE = "<pad>"
# A coordinate's piece: Fuyu's is its digits. One that a language model's vocabulary was extended by
# has marks around it, so that no number in a text becomes another token than before.
COORDINATE_PIECES = ("<|{}|>", "{}")
# Fuyu shrinks images to 1080 x 1920; half of the longer side is the largest coordinate.
MAX_COORDINATE = 960

_LARGEST_NUMBER = 1e6
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_MARKUP = re.compile(
    rf"<box>{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}</box>|<point>{_NUMBER},{_NUMBER}</point>"
)
_SURROGATE = re.compile("[\ud800-\udfff]")  # what is not a character
_CONTROL = re.compile("[\x00-\x04]")  # as bytes they would be Fuyu's box and answer marks


def coordinate_to_token_value(value: int | float, scale: int | float) -> int:
    """An image coordinate (pixels of the original) as Fuyu's integer: round-half-even(v/2·s)."""
    return round(value / 2 * scale)


def token_value_to_coordinate(value: int, scale: int | float) -> int:
    """Fuyu's integer back to pixels of the original image: 2·int(c/s)."""
    return 2 * int(value / scale)


class Location(NamedTuple):
    """A box (top, left, bottom, right) or a point (x, y), in pixels of the original image.

    start, stop: the tokens that it was read from.
    """

    kind: str
    values: tuple[int, ...]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"<{self.kind}>{', '.join(map(str, self.values))}</{self.kind}>"


class Tokenizer:
    """A vocabulary with the special tokens above.

    Args:
      path: a sentencepiece `.model` file, a `tokenizer.json`, or a folder with one of them.

    pad_id, image_id, newline_id, eos_id, answer_id, box_ids, point_ids: special tokens. bos_id:
    None where a language model has no `<s>`; then none is put into a layout. eos_id: `|ENDOFTEXT|`,
    or what ends a text in the language model.

    Raises:
      UserError: the file is missing, unreadable, or lacks one of the special pieces.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._vocabulary = open_vocabulary(path)
        self.path = self._vocabulary.path
        self.vocab_size: int = self._vocabulary.size
        self.image_id = self._special(IMAGE_PIECE)
        self.newline_id = self._special(NEWLINE_PIECE)
        self.eos_id = self._special(EOS_PIECE, self._vocabulary.eos)
        bos = self._vocabulary.find(BOS_PIECE)
        self.bos_id = self._vocabulary.bos if bos is None else bos
        self.pad_id = self._special(PAD_PIECE, self._vocabulary.pad, own_first=False)
        self.answer_id = self._special(ANSWER_PIECE)
        self.box_ids = tuple(self._special(p) for p in BOX_PIECES)
        self.point_ids = tuple(self._special(p) for p in POINT_PIECES)
        self._marks = {self.image_id, self.newline_id, self.eos_id, self.answer_id}
        self._marks |= {*self.box_ids, *self.point_ids}
        if self.bos_id is not None:
            self._marks.add(self.bos_id)
        named = (re.escape(self.piece(t)) for t in sorted(self._marks))
        self._first_of_mark = re.compile(rf"(?={'|'.join(named)})(.)", re.DOTALL)
        marked, bare = COORDINATE_PIECES
        self._marked = self._vocabulary.find(marked.format(0)) is not None
        self._token_of: dict[int, int] = {}
        for n in range(MAX_COORDINATE + 1):
            token = self._vocabulary.find((marked if self._marked else bare).format(n))
            if token is None:
                break
            self._token_of[n] = token
        self._coordinate_of = {token: n for n, token in self._token_of.items()}

    def _special(self, piece: str, other: int | None = None, own_first: bool = True) -> int:
        found = self._vocabulary.find(piece)
        token = other if found is None or (other is not None and not own_first) else found
        if token is None:
            raise UserError(
                f"tokenizer {self.path}: no piece {piece!r}; train one with this project, or "
                "extend a language model's (fuyu_jax.tokenizer_extend)"
            )
        return token

    @property
    def num_coordinates(self) -> int:
        """How many integer coordinates (0, 1, ...) have a token of their own."""
        return len(self._coordinate_of)

    def encode(self, text: str, scale: int | float = 1.0) -> list[int]:
        """Token ids of a text; `<box>` and `<point>` markup becomes marks and integers.

        A malformed box stays text, and so does one whose coordinates have no token. Characters
        U+0000 to U+0004 become spaces, since as bytes they would pass for Fuyu's marks. So that no
        text can hold a mark, a space parts its name where the vocabulary would read one
        (`| SPEAKER|`; one trained here needs none).

        Args:
          text: any text. Boxes are `<box>top, left, bottom, right</box>` in original pixels.
          scale: size of the image as the model sees it over its original size.
        """
        text = _SURROGATE.sub("\ufffd", _CONTROL.sub(" ", text))
        tokens: list[int] = []
        at = 0
        for match in _MARKUP.finditer(text):
            numbers = [float(g) for g in match.groups() if g is not None]
            if max(map(abs, numbers)) > _LARGEST_NUMBER:
                continue
            values = [coordinate_to_token_value(n, scale) for n in numbers]
            if not all(v in self._token_of for v in values):
                continue
            opened, closed = self.box_ids if len(values) == 4 else self.point_ids
            tokens += self._encode_plain(text[at : match.start()])
            tokens += [opened, *(self._token_of[v] for v in values), closed]
            at = match.end()
        return tokens + self._encode_plain(text[at:])

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        tokens = self._vocabulary.encode(text)
        if self._marks.isdisjoint(tokens):
            return tokens
        tokens = self._vocabulary.encode(self._first_of_mark.sub(r"\1 ", text))
        return [t for t in tokens if t not in self._marks]

    def decode(self, tokens: Sequence[int], scale: int | float = 1.0) -> str:
        """Text of token ids; a well-formed box or point becomes markup in original pixels.

        Placeholders, padding, `<s>`, `|ENDOFTEXT|` and ids outside the vocabulary are left out. A
        malformed box never raises: its marks are dropped and its integers stay text.
        """
        hidden = self._marks | {self.pad_id}
        parts: list[str] = []
        run: list[int] = []
        at = 0
        while at < len(tokens):
            token = int(tokens[at])
            if found := self._location_at(tokens, at, scale):
                parts += [self._vocabulary.decode(run), str(found)]
                run, at = [], found.stop
                continue
            if self._marked and token in self._coordinate_of:
                parts += [self._vocabulary.decode(run), str(self._coordinate_of[token])]
                run = []
            elif token not in hidden and 0 <= token < self.vocab_size:
                run.append(token)
            at += 1
        return "".join([*parts, self._vocabulary.decode(run)])

    def locations(self, tokens: Sequence[int], scale: int | float = 1.0) -> list[Location]:
        """Well-formed boxes and points among token ids, in order."""
        found, at = [], 0
        while at < len(tokens):
            location = self._location_at(tokens, at, scale)
            if location:
                found.append(location)
            at = location.stop if location else at + 1
        return found

    def _location_at(self, tokens: Sequence[int], at: int, scale: int | float) -> Location | None:
        for (opened, closed), count, kind in (
            (self.box_ids, 4, "box"),
            (self.point_ids, 2, "point"),
        ):
            inner, end = tokens[at + 1 : at + 1 + count], at + 1 + count
            if (
                tokens[at] == opened
                and len(tokens) > end
                and tokens[end] == closed
                and all(int(t) in self._coordinate_of for t in inner)
            ):
                values = (
                    token_value_to_coordinate(self._coordinate_of[int(t)], scale) for t in inner
                )
                return Location(kind, tuple(values), at, end + 1)
        return None

    def piece(self, token: int) -> str:
        """The vocabulary entry of a token, for people to read."""
        return self._vocabulary.piece(int(token))


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
