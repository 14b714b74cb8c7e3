"""Any TensorFlow Datasets set that is prepared as array_record, read without TensorFlow."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fuyu_jax.data.example import Example, open_image
from fuyu_jax.data.sources import common
from fuyu_jax.errors import UserError, nearest


@dataclass(frozen=True)
class TfdsAdapter:
    """Where a set keeps what. A feature within another is written `objects.refexp.raw`.

    Questions and answers that are lists go together one by one; one that stands above the other
    (a box of an object that has several expressions) goes with each of them. Class labels are
    written by name.

    Args:
      image: the image.
      question: questions; none if empty, for captions.
      answer: answers, or captions.
      box: instead of `answer`: TFDS boxes (ymin, xmin, ymax, xmax, of 0 to 1), which become
        `<box>top, left, bottom, right</box>` in pixels.
      name: what to call the image in messages and in `info["name"]`.
      question_template: `{}` is the question; asked as it is where there is none.
      answer_template: `{}` is the answer.
    """

    image: str = "image"
    question: str = ""
    answer: str = ""
    box: str = ""
    name: str = ""
    question_template: str = "{}"
    answer_template: str = "{}"


# By the builders' names.
ADAPTERS: Mapping[str, TfdsAdapter] = {
    "coco_captions": TfdsAdapter(
        answer="captions.text", name="image/filename", question_template="Write a caption."
    ),
    "ref_coco": TfdsAdapter(
        question="objects.refexp.raw",
        box="objects.bbox",
        name="image/id",
        question_template='Where is "{}"?',
    ),
    "clevr": TfdsAdapter(
        question="question_answer.question", answer="question_answer.answer", name="file_name"
    ),
}


_reading = 0  # the process that has begun to read array_record


class TfdsSource:
    """One split of a prepared set.

    Args:
      directory: holds `dataset_info.json`, itself or a folder within it (as `clevr/3.1.0`).
      split: as TFDS writes it, `train[:10%]` too.
      adapter: where the set keeps what; that of the builder's name if None.
      turns: "all" of a record in one example; only the "first"; or an example for "each" (then all
        records are read at the start, to count them).

    array_record's threads do not outlive a fork: a process that was forked after its parent has
    read gets an error instead of waiting for ever. Start workers by spawn, as grain does.

    Turns with an empty answer are left out. An id is `SET-SPLIT-RECORD`, with `:TURN` for "each".

    Raises:
      UserError: not a prepared set, or not as array_record; no such split, feature or adapter.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        adapter: TfdsAdapter | None = None,
        turns: str = "all",
    ):
        if turns not in ("all", "first", "each"):
            raise UserError(f'turns "{turns}"{nearest(turns, ("all", "first", "each"))}')
        self.directory = _find(Path(directory).expanduser())
        self.split = split
        builder = tfds.builder_from_directory(self.directory)
        self.name: str = builder.name
        if adapter is None and self.name not in ADAPTERS:
            raise UserError(
                f"{self.directory}: no adapter for {self.name}{nearest(self.name, ADAPTERS)}; "
                "give a TfdsAdapter"
            )
        self.adapter = adapter or ADAPTERS[self.name]
        if bool(self.adapter.answer) == bool(self.adapter.box):
            raise UserError("a TfdsAdapter needs either answer or box")
        features = builder.info.features
        for path in (getattr(self.adapter, field) for field in ("image", "box", "name")):
            _feature(features, path, self.directory)
        self._labels = {
            path: getattr(_feature(features, path, self.directory), "names", None)
            for path in (self.adapter.question, self.adapter.answer)
        }
        self._decoders = _keep_encoded(features)
        self._pid, self._open_data = 0, None
        self._length = len(self._data)
        self._turns = turns
        self._places: list[tuple[int, int]] = []
        if turns == "each":
            self._places = [
                (at, turn)
                for at in range(self._length)
                for turn in range(len(self._pairs(self._record(at), at, (1, 1))))
            ]

    def __len__(self) -> int:
        return len(self._places) if self._turns == "each" else self._length

    def id(self, index: int) -> str:
        record, turn = self._place(index)
        id = f"{self.name}-{self.split}-{record:06d}"
        return id if turn is None else f"{id}:{turn}"

    def __getitem__(self, index: int) -> Example:
        at, turn = self._place(index)
        record = self._record(at)
        name = _text(_at(record, self.adapter.name)) if self.adapter.name else ""
        where = f"{self.directory}, {self.split} record {at}" + (f" ({name})" if name else "")
        image = open_image(bytes(_at(record, self.adapter.image)), where)
        pairs = self._pairs(record, at, (image.height, image.width))
        if turn is not None:
            pairs = pairs[turn : turn + 1]
        elif self._turns == "first":
            pairs = pairs[:1]
        info = {"family": self.name} | ({"name": name} if name else {})
        return Example(self.id(index), common.asked([image], pairs), info)

    def texts(self) -> Iterator[str]:
        """All texts, for a tokenizer; boxes are of an image of one pixel."""
        for at in range(self._length):
            for pair in self._pairs(self._record(at), at, (1, 1)):
                yield from (text for text in pair if text)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pid": 0, "_open_data": None}

    @property
    def _data(self) -> Any:
        """The records; every process opens the files for itself."""
        if self._open_data is None or self._pid != os.getpid():
            builder = tfds.builder_from_directory(self.directory)
            if self.split.partition("[")[0] not in builder.info.splits:
                known = nearest(self.split, builder.info.splits)
                raise UserError(f'{self.directory}: no split "{self.split}"{known}')
            try:
                data = builder.as_data_source(self.split, decoders=self._decoders)
            except (NotImplementedError, ValueError) as error:
                reason = str(error).split("\n")[0]
                raise UserError(
                    f"{self.directory}: cannot be read by index ({reason}); prepare it with "
                    "file_format=array_record"
                ) from None
            self._open_data, self._pid = data, os.getpid()
        return self._open_data

    def _record(self, at: int) -> Any:
        global _reading
        if _reading not in (0, os.getpid()):
            raise UserError(
                f"{self.directory}: array_record cannot be read in a forked process after its "
                "parent has read from it; start workers by spawn"
            )
        _reading = os.getpid()
        return self._data[at]

    def _place(self, index: int) -> tuple[int, int | None]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._places[index] if self._turns == "each" else (index, None)

    def _pairs(
        self, record: dict[str, Any], at: int, size: tuple[int, int]
    ) -> list[tuple[str, str]]:
        """(question, answer) turns of a record with an image of that size."""
        adapter = self.adapter
        answers = (
            _boxes(_at(record, adapter.box), size) if adapter.box else _at(record, adapter.answer)
        )
        questions = _at(record, adapter.question) if adapter.question else ""
        try:
            pairs = list(_together(questions, answers))
        except ValueError:
            raise UserError(
                f"{self.directory}, {self.split} record {at}: unequal numbers of "
                f"{adapter.question} and {adapter.answer or adapter.box}"
            ) from None
        asked, given = self._labels[adapter.question], self._labels[adapter.answer]
        turns = [(_text(q, asked), _text(a, given)) for q, a in pairs]
        return [
            (adapter.question_template.replace("{}", q), adapter.answer_template.replace("{}", a))
            for q, a in turns
            if a
        ]


class _KeepEncoded(tfds.decode.SkipDecoding):
    """TFDS's own does not know lists of images (the masks of ref_coco) without TensorFlow."""

    def decode_batch_example_np(self, examples: Any) -> Any:
        return examples

    decode_ragged_example_np = decode_batch_example_np


def _keep_encoded(feature: Any) -> Any:
    """Decoders that leave all images of a feature encoded; {} where there is none."""
    if isinstance(feature, tfds.features.Sequence):
        return _keep_encoded(feature.feature)
    if isinstance(feature, tfds.features.FeaturesDict):
        inner = {name: _keep_encoded(feature[name]) for name in feature}
        return {name: decoder for name, decoder in inner.items() if decoder}
    return _KeepEncoded() if isinstance(feature, tfds.features.Image) else {}


def _find(directory: Path) -> str:
    """The folder with `dataset_info.json`, here or up to three levels below."""
    found = [
        path.parent
        for depth in range(4)
        for path in sorted(directory.glob("*/" * depth + "dataset_info.json"))
    ]
    if len(found) == 1:
        return str(found[0])
    if found:
        names = ", ".join(str(path) for path in found[:5])
        raise UserError(f"{directory}: holds {len(found)} prepared sets; give one of {names}")
    raise UserError(
        f"{directory}: no dataset_info.json in it; prepare the set there with TFDS, "
        "file_format=array_record"
    )


def _feature(features: Any, path: str, directory: str) -> Any:
    """The feature at a path, without the lists around it; None for no path."""
    if not path:
        return None
    for part in path.split("."):
        while isinstance(features, tfds.features.Sequence):
            features = features.feature
        names = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
        if part not in names:
            known = nearest(part, names) if names else ""
            raise UserError(f'{directory}: no feature "{path}", for want of "{part}"{known}')
        features = features[part]
    while isinstance(features, tfds.features.Sequence):
        features = features.feature
    return features


def _at(record: Any, path: str) -> Any:
    for part in path.split("."):
        record = record[part]
    return record


def _boxes(value: Any, size: tuple[int, int]) -> Any:
    """Normalised boxes, however nested, as markup in pixels."""
    if len(value) == 4 and np.ndim(value[0]) == 0:
        sides = zip(value, (*size, *size), strict=True)
        numbers = ", ".join(str(round(float(share) * side)) for share, side in sides)
        return f"<box>{numbers}</box>"
    return [_boxes(inner, size) for inner in value]


def _together(questions: Any, answers: Any) -> Iterator[tuple[Any, Any]]:
    """Nested lists as pairs.

    Raises:
      ValueError: two lists of unequal length.
    """
    many = [isinstance(value, list | np.ndarray) for value in (questions, answers)]
    if all(many):
        for question, answer in zip(questions, answers, strict=True):
            yield from _together(question, answer)
    elif many[0]:
        for question in questions:
            yield from _together(question, answers)
    elif many[1]:
        for answer in answers:
            yield from _together(questions, answer)
    else:
        yield questions, answers


def _text(value: Any, labels: list[str] | None = None) -> str:
    if labels is not None and not isinstance(value, str | bytes):
        return labels[int(value)] if int(value) >= 0 else ""  # -1: not known
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
