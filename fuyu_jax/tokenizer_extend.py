"""Fuyu's special pieces added to a language model's vocabulary (Llama, Mistral, Qwen, ...).

What a vocabulary has already is used as it is: its own end of text in the place of `|ENDOFTEXT|`,
its own `<s>` (or none, where it has none), and of a vocabulary with byte pieces `<0x00>`..`<0x04>`,
which no text can hold (`Tokenizer.encode`). New ids follow the old ones, and no text gets other ids
than before: nothing that is added can be read out of a text.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from fuyu_jax.errors import UserError
from fuyu_jax.tokenizer import (
    ANSWER_PIECE,
    BOX_PIECES,
    COORDINATE_PIECES,
    EOS_PIECE,
    IMAGE_PIECE,
    MAX_COORDINATE,
    NEWLINE_PIECE,
    PAD_PIECE,
    POINT_PIECES,
    Tokenizer,
)
from fuyu_jax.vocabulary import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    JsonVocabulary,
    Vocabulary,
    import_tokenizers,
    open_vocabulary,
)


class Extended(NamedTuple):
    """A vocabulary with Fuyu's pieces.

    vocab_size: rows that an embedding needs. new_ids: of the added pieces, ascending. old_size: of
    the vocabulary before.
    """

    tokenizer: Tokenizer
    vocab_size: int
    new_ids: tuple[int, ...]
    old_size: int


def extend_tokenizer(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    max_coordinate: int = MAX_COORDINATE,
) -> Extended:
    """Adds the pieces that Fuyu needs and are not there; writes the file into a folder.

    Args:
      source: a language model's `tokenizer.json` or sentencepiece `.model`, or their folder.
      folder: where `tokenizer.json` (with a `tokenizer_config.json` that names its begin, end and
        padding) or `tokenizer.model` goes.
      max_coordinate: half of the longest image side.

    Raises:
      UserError: the source cannot be read, or the folder holds it.
    """
    vocabulary = open_vocabulary(source)
    folder = Path(folder)
    is_json = isinstance(vocabulary, JsonVocabulary)
    target = folder / (JSON_FILE if is_json else MODEL_FILE)
    if target.exists() and target.samefile(vocabulary.path):
        raise UserError(f"tokenizer {target}: is the one to be extended; give another folder")
    missing = _missing(vocabulary, max_coordinate)
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + f".partial{os.getpid()}")
    try:
        (_write_json if is_json else _write_sentencepiece)(vocabulary.path, partial, missing)
        if is_json:
            _write_config(vocabulary, folder)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    tokenizer = Tokenizer(target)
    new = tuple(range(vocabulary.size, tokenizer.vocab_size))
    return Extended(tokenizer, tokenizer.vocab_size, new, vocabulary.size)


def _missing(vocabulary: Vocabulary, max_coordinate: int) -> list[str]:
    wanted = [IMAGE_PIECE, NEWLINE_PIECE, *BOX_PIECES, *POINT_PIECES, ANSWER_PIECE]
    if vocabulary.eos is None:
        wanted.append(EOS_PIECE)
    if vocabulary.pad is None:
        wanted.append(PAD_PIECE)
    marked, bare = COORDINATE_PIECES
    coordinates = range(max_coordinate + 1)
    if any(vocabulary.find(bare.format(n)) is None for n in coordinates):
        wanted += [marked.format(n) for n in coordinates]
    return [piece for piece in wanted if vocabulary.find(piece) is None]


def _write_json(source: Path, target: Path, pieces: list[str]) -> None:
    tokenizers = import_tokenizers()
    fast = tokenizers.Tokenizer.from_file(str(source))
    added = [tokenizers.AddedToken(p, normalized=False, special=True) for p in pieces]
    fast.add_special_tokens(added)
    fast.save(str(target))


def _write_config(vocabulary: Vocabulary, folder: Path) -> None:
    """Of the source's configuration, what is read here: so the file means the same elsewhere."""
    names = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.pad,
    }
    config: dict[str, str | None] = {
        name: None if token is None else vocabulary.piece(token) for name, token in names.items()
    }
    config["eos_token"] = config["eos_token"] or EOS_PIECE
    config["pad_token"] = config["pad_token"] or PAD_PIECE
    # What transformers opens any tokenizer.json with.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _write_sentencepiece(source: Path, target: Path, pieces: list[str]) -> None:
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError:
        raise UserError("extending a sentencepiece model needs `pip install protobuf`") from None
    model = proto.ModelProto()
    model.ParseFromString(source.read_bytes())
    for piece in pieces:
        # A control piece is never read out of a text.
        model.pieces.add(piece=piece, score=0.0, type=proto.ModelProto.SentencePiece.CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    target.write_bytes(model.SerializeToString())
