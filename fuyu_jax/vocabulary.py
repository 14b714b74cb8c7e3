"""Vocabularies in the two file formats there are: plain text to ids and back, no markup.

sentencepiece `.model` files through `sentencepiece`, `tokenizer.json` through `tokenizers` (of the
extra `interop`). `fuyu_jax.tokenizer.Tokenizer` puts Fuyu's marks and boxes on top of either.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import sentencepiece as spm

from fuyu_jax.errors import UserError

JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MODEL_FILE = "tokenizer.model"

# Where a file does not say what ends and what begins a text.
_KNOWN_ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<eos>")
_KNOWN_BEGINS = ("<|begin_of_text|>", "<bos>")


@runtime_checkable
class Vocabulary(Protocol):
    """What a tokenizer needs of a file.

    size: one more than the largest id. bos, eos, pad: ids, where the file has them. has_bytes:
    `<0x00>`..`<0xFF>` are its pieces for single bytes.
    """

    path: Path
    size: int
    bos: int | None
    eos: int | None
    pad: int | None
    has_bytes: bool

    def find(self, piece: str) -> int | None: ...
    def piece(self, token: int) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


def open_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Opens a file of either format (told apart by content), or a folder with one.

    In a folder `tokenizer.json` goes before `tokenizer.model`: it is what Hugging Face's own
    processor reads, and pieces that were added to a model later stand only there. To have the
    other, name the file.

    Raises:
      UserError: missing, unreadable, or `tokenizers` is not installed.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (JSON_FILE, MODEL_FILE) if (path / name).is_file()]
        if not found:
            raise UserError(
                f"tokenizer {path}: neither {JSON_FILE} nor {MODEL_FILE} in this folder"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"tokenizer {path}: no such file; give a sentencepiece .model or {JSON_FILE}"
        )
    with path.open("rb") as file:
        head = file.read(64)
    if head.lstrip().startswith(b"{"):
        return JsonVocabulary(path)
    return SentencePieceVocabulary(path)


class SentencePieceVocabulary:
    """A sentencepiece `.model` file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._sp = spm.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {path}: not a sentencepiece model ({error})") from None
        self.size: int = self._sp.vocab_size()
        bos, eos = self._sp.bos_id(), self._sp.eos_id()
        self.bos = bos if bos >= 0 else None
        self.eos = eos if eos >= 0 else None
        self.pad: int | None = 0  # <unk> or <pad>
        byte = self.find("<0x04>")
        self.has_bytes = byte is not None and self._sp.is_byte(byte)

    def find(self, piece: str) -> int | None:
        """The id of a piece, if there is such a piece."""
        token = self._sp.piece_to_id(piece)
        return None if token == self._sp.unk_id() else token

    def piece(self, token: int) -> str:
        return self._sp.id_to_piece(token)

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._sp.decode(list(tokens))


def import_tokenizers() -> Any:
    """The `tokenizers` library.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"{JSON_FILE} needs `pip install 'fuyu-jax[interop]'` (or a sentencepiece .model)"
        ) from None
    return tokenizers


class JsonVocabulary:
    """A `tokenizer.json`, with the `tokenizer_config.json` beside it where there is one.

    Special pieces that someone writes in a text are text here, not marks.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fast = import_tokenizers().Tokenizer.from_file(str(path))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(str(error).split())
            raise UserError(f"tokenizer {path}: not a {JSON_FILE} ({reason})") from None
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        ids = self._fast.get_vocab(with_added_tokens=True)
        self.size: int = max(ids.values(), default=-1) + 1
        config = _read_config(path.with_name(CONFIG_FILE))
        self.bos = self._named(config.get("bos_token"), _KNOWN_BEGINS)
        self.eos = self._named(config.get("eos_token"), _KNOWN_ENDS)
        self.pad = self._padding(config)
        self.has_bytes = all(f"<0x{n:02X}>" in ids for n in range(256))

    def _named(self, token: Any, known: Sequence[str]) -> int | None:
        # A configuration gives a string, or an object with the string in it.
        names = [token.get("content") if isinstance(token, dict) else token, *known]
        found = (self.find(name) for name in names if isinstance(name, str))
        return next((i for i in found if i is not None), None)

    def _padding(self, config: dict[str, Any]) -> int | None:
        """0 as Fuyu has it, unless that is a piece of text."""
        special = self._fast.get_added_tokens_decoder()
        first = self._fast.id_to_token(0) or ""
        named = first.startswith("<") and first.endswith(">") and len(first) > 2
        if self.eos != 0 and (0 in special or named):
            return 0
        pad = self._named(config.get("pad_token"), ("<pad>",))
        return self.find("<pad>") if pad == self.eos else pad

    def find(self, piece: str) -> int | None:
        """The id of a piece, if there is such a piece."""
        return self._fast.token_to_id(piece)

    def piece(self, token: int) -> str:
        return self._fast.id_to_token(token) or ""

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._fast.decode(list(tokens), skip_special_tokens=True)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {path}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"tokenizer {path}: not a JSON object")
    return config
