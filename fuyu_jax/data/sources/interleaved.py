"""Documents of texts and images in order, in JSON Lines, with an image folder. Two layouts:

* OBELICS: lists `texts` and `images` of one length; where one holds something the other has null.
* MMC4: `text_list`, and `image_info` of `{image_name, matched_text_index}`: an image comes right
  before the text it is matched with, images of one text in the order given.

Texts that follow one another are joined: OBELICS's paragraphs by an empty line, MMC4's sentences
by a space. An image is a path in the folder; the data sets' own addresses have to be fetched first.
"""

from pathlib import Path
from typing import Any

from fuyu_jax.data.sources import common
from fuyu_jax.data.sources.jsonl import DocumentSource, Piece
from fuyu_jax.errors import UserError


class InterleavedSource(DocumentSource):
    """Interleaved documents, all their text trained on as plain running text.

    Lines, ids, splitting and errors: see `DocumentSource`. A document without text is an example
    on which there is no loss; one without anything has no segments, and no row takes it.

    Args:
      files: path, `part-{00..12}.jsonl`, glob, or a list of these.
      image_dir: where image paths begin; the first file's own folder if empty.
      max_images: a document with more is split into examples that follow one another; 0: never.
      max_chars: the same for characters of text.

    Raises:
      UserError: no such file or folder; with a limit also a malformed line.
    """

    def __init__(
        self,
        files: common.Patterns,
        image_dir: str | Path = "",
        max_images: int = 0,
        max_chars: int = 0,
    ):
        first = common.expand(files, "JSON Lines files")[0]
        self.image_dir = Path(image_dir).expanduser() if image_dir else first.parent
        if not self.image_dir.is_dir():
            raise UserError(f"image folder {self.image_dir}: no such folder")
        super().__init__(files, max_images, max_chars)

    def pieces(self, record: dict[str, Any], where: str) -> list[Piece]:
        if "text_list" in record:
            return self._mmc4(record, where)
        if "texts" in record and "images" in record:
            return self._obelics(record, where)
        raise UserError(
            f'{where}: neither "texts" and "images" (OBELICS) nor "text_list" and "image_info" '
            "(MMC4); give one of the two"
        )

    def _obelics(self, record: dict[str, Any], where: str) -> list[Piece]:
        texts, images = record["texts"], record["images"]
        if not isinstance(texts, list) or not isinstance(images, list):
            raise UserError(f'{where}: "texts" and "images" are not both lists')
        if len(texts) != len(images):
            raise UserError(
                f'{where}: {len(texts)} "texts" for {len(images)} "images"; '
                "write null where the other list has something"
            )
        pieces: list[Piece] = []
        for at, (text, image) in enumerate(zip(texts, images, strict=True)):
            if text is not None and image is not None:
                raise UserError(f"{where}: place {at} holds a text and an image; set one to null")
            if image is not None:
                pieces.append(self._image(image, f'{where}, "images" {at}'))
            elif text is not None:
                _add(pieces, text, "\n\n", f'{where}, "texts" {at}')
        return pieces

    def _mmc4(self, record: dict[str, Any], where: str) -> list[Piece]:
        texts, infos = record["text_list"], record.get("image_info", [])
        if not isinstance(texts, list) or not isinstance(infos, list):
            raise UserError(f'{where}: "text_list" and "image_info" are not both lists')
        before: dict[int, list[Path]] = {}
        for at, info in enumerate(infos):
            here = f'{where}, "image_info" {at}'
            if not isinstance(info, dict):
                raise UserError(f"{here}: not an object {{...}}")
            image = self._image(info.get("image_name"), f'{here}, "image_name"')
            index = info.get("matched_text_index")
            if not isinstance(index, int) or not 0 <= index < len(texts):
                raise UserError(
                    f'{here}: "matched_text_index" is {index!r}, not one of the {len(texts)} texts'
                )
            before.setdefault(index, []).append(image)
        pieces: list[Piece] = []
        for at, text in enumerate(texts):
            pieces += before.get(at, [])
            _add(pieces, text, " ", f'{where}, "text_list" {at}')
        return pieces

    def _image(self, name: Any, where: str) -> Path:
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: not the path of an image")
        if "://" in name:
            raise UserError(
                f"{where}: the address {name}; fetch the images and write paths in {self.image_dir}"
            )
        return self.image_dir / name


def _add(pieces: list[Piece], text: Any, between: str, where: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{where}: not a text")
    if text and pieces and isinstance(pieces[-1], str):
        pieces[-1] += between + text
    elif text:
        pieces.append(text)
