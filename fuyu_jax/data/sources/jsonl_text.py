"""Plain text in JSON Lines: `{"text": "..."}` a line, with an `id` if you like."""

from typing import Any

from fuyu_jax.data.sources import common
from fuyu_jax.data.sources.jsonl import DocumentSource, Piece
from fuyu_jax.errors import UserError, nearest


class JsonlTextSource(DocumentSource):
    """Texts of JSON Lines files, trained on as plain running text.

    Lines, ids, splitting and errors: see `DocumentSource`. An empty text makes an example without
    segments, which no row takes.

    Args:
      files: path, `part-{00..12}.jsonl`, glob, or a list of these.
      max_chars: a longer text is split into examples that follow one another; 0: never.
      field: which one holds the text.
    """

    def __init__(self, files: common.Patterns, max_chars: int = 0, field: str = "text"):
        self.field = field
        super().__init__(files, max_chars=max_chars)

    def pieces(self, record: dict[str, Any], where: str) -> list[Piece]:
        text = record.get(self.field)
        if not isinstance(text, str):
            texts = [name for name, value in record.items() if isinstance(value, str)]
            hint = nearest(self.field, texts) if texts else f'; give {{"{self.field}": "..."}}'
            raise UserError(f'{where}: no text "{self.field}"{hint}')
        return [text] if text else []
