"""TFDS sets: tiny builders with the features of the catalogue's, read without TensorFlow."""

import contextlib
import io
import multiprocessing
import pickle
import sys
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image as PilImage

from fuyu_jax.data.example import BadImageError, Image
from fuyu_jax.data.sources import TfdsAdapter, TfdsSource
from fuyu_jax.errors import UserError

F = tfds.features


def picture(height, width, kind="JPEG"):
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


class _Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(self, records, **kwargs):
        self._records = records
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=F.FeaturesDict(self.FEATURES), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._records)


_OBJECT = {"id": np.int64, "area": np.int64, "bbox": F.BBoxFeature(), "label": np.int64}


class CocoCaptions(_Tiny):
    FEATURES: ClassVar = {
        "image": F.Image(encoding_format="jpeg"),
        "image/filename": F.Text(),
        "image/id": np.int64,
        "objects": F.Sequence(
            {**_OBJECT, "label": F.ClassLabel(num_classes=80), "is_crowd": np.bool_}
        ),
        "captions": F.Sequence({"text": np.str_, "id": np.int64}),
    }


class RefCoco(_Tiny):
    FEATURES: ClassVar = {
        "image": F.Image(encoding_format="jpeg"),
        "image/id": np.int64,
        "objects": F.Sequence(
            {
                **_OBJECT,
                "gt_box_index": np.int64,
                "mask": F.Image(encoding_format="png"),
                "refexp": F.Sequence({"refexp_id": np.int64, "raw": F.Text()}),
            }
        ),
        "coco_annotations": F.Sequence(_OBJECT),
    }


class Clevr(_Tiny):
    FEATURES: ClassVar = {
        "image": F.Image(),
        "file_name": F.Text(),
        "objects": F.Sequence(
            {
                "color": F.ClassLabel(names=["gray", "blue"]),
                "rotation": F.Tensor(shape=(), dtype=np.float32),
                "3d_coords": F.Tensor(shape=(3,), dtype=np.float32),
            }
        ),
        "question_answer": F.Sequence({"question": F.Text(), "answer": F.Text()}),
    }


class Labelled(_Tiny):
    FEATURES: ClassVar = {
        "image": F.Image(),
        "label": F.ClassLabel(names=["cat", "dog"]),
        "many": F.Sequence(F.Text()),
    }


def make(builder, folder, records, monkeypatch, file_format="array_record"):
    """Writes a set; TFDS asks TensorFlow for the dtype of lists in lists, which NumPy's serves."""
    from tensorflow_datasets.core.features import feature

    monkeypatch.setattr(feature.TensorInfo, "dtype", property(lambda self: self.np_dtype))
    made = builder(records, data_dir=folder, file_format=file_format)
    with contextlib.redirect_stdout(io.StringIO()):
        made.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return folder


def shape(example):
    return [
        (s.height, s.width) if isinstance(s, Image) else (s.text, s.train) for s in example.segments
    ]


def coco_record(n):
    return {
        "image": picture(20 + n, 30),
        "image/filename": f"COCO_{n}.jpg",
        "image/id": n,
        "objects": [],
        "captions": [{"text": f"Caption {n}.{k}", "id": k} for k in range(n)],
    }


def test_coco_captions(tmp_path, monkeypatch):
    make(CocoCaptions, tmp_path, [coco_record(n) for n in range(3)], monkeypatch)
    source = TfdsSource(tmp_path, "train")
    ask = ("Write a caption.", False)
    assert [shape(source[i]) for i in range(3)] == [
        [],  # no caption: nothing to learn
        [(21, 30), ask, ("Caption 1.0", True)],
        [(22, 30), ask, ("Caption 2.0", True), ask, ("Caption 2.1", True)],
    ]
    assert source[1].info == {"family": "coco_captions", "name": "COCO_1.jpg"}
    assert source.id(1) == source[1].id == "coco_captions-train-000001"
    assert source[1].images[0].encoded == coco_record(1)["image"]  # never decoded
    assert shape(TfdsSource(tmp_path, "train", turns="first")[2])[1:] == [
        ask, ("Caption 2.0", True),
    ]  # fmt: skip
    each = TfdsSource(tmp_path, "train", turns="each")
    assert [shape(each[i])[-1][0] for i in range(len(each))] == [
        "Caption 1.0", "Caption 2.0", "Caption 2.1",
    ]  # fmt: skip
    assert [each.id(i)[-8:] for i in range(3)] == ["000001:0", "000002:0", "000002:1"]
    assert each[2].id == each.id(2)
    assert len(TfdsSource(tmp_path, "train[1:]")) == 2
    assert list(source.texts())[:2] == ["Write a caption.", "Caption 1.0"]


def test_ref_coco_boxes_in_pixels(tmp_path, monkeypatch):
    height, width = 60, 90
    boxes = [(7, 12, 31, 88), (0, 0, 60, 90)]  # top, left, bottom, right

    def thing(n, box):
        top, left, bottom, right = box
        common = {
            "id": n,
            "area": 5,
            "label": 1,
            "bbox": F.BBox(top / height, left / width, bottom / height, right / width),
        }
        said = [{"refexp_id": 10 * n + k, "raw": f"thing {n}{'ab'[k]}"} for k in range(n + 1)]
        mask = io.BytesIO(picture(height, width, "PNG"))
        return common | {"gt_box_index": n, "mask": mask, "refexp": said}

    things = [thing(n, box) for n, box in enumerate(boxes)]
    record = {"image": picture(height, width), "image/id": 42, "objects": things}
    record["coco_annotations"] = [{k: t[k] for k in _OBJECT} for t in things]
    empty = record | {"image/id": 43, "objects": [], "coco_annotations": []}
    make(RefCoco, tmp_path, [record, empty], monkeypatch)
    source = TfdsSource(tmp_path, "train")
    assert shape(source[0]) == [
        (60, 90),
        ('Where is "thing 0a"?', False), ("<box>7, 12, 31, 88</box>", True),
        ('Where is "thing 1a"?', False), ("<box>0, 0, 60, 90</box>", True),
        ('Where is "thing 1b"?', False), ("<box>0, 0, 60, 90</box>", True),
    ]  # fmt: skip
    assert source[0].info["name"] == "42"
    assert shape(source[1]) == []
    each = TfdsSource(tmp_path, "train", turns="each")
    assert [shape(each[i])[1:] for i in range(3)] == [
        shape(source[0])[n : n + 2] for n in (1, 3, 5)
    ]
    assert len(each) == 3


def test_clevr(tmp_path, monkeypatch):
    talk = [{"question": "How many?", "answer": "2"}, {"question": "Why?", "answer": ""}]
    record = {
        "image": picture(32, 48, "PNG"),
        "file_name": "CLEVR_0.png",
        "objects": [{"color": "blue", "rotation": 1.0, "3d_coords": [1.0, 2.0, 3.0]}],
        "question_answer": talk,
    }
    make(Clevr, tmp_path, [record], monkeypatch)
    source = TfdsSource(tmp_path, "train")
    assert shape(source[0]) == [(32, 48), ("How many?", False), ("2", True)]
    assert len(TfdsSource(tmp_path, "train", turns="each")) == 1
    assert list(source.texts()) == ["How many?", "2"]
    want = PilImage.open(io.BytesIO(record["image"]))
    np.testing.assert_array_equal(source[0].images[0].decode(), want)
    assert "tensorflow" not in sys.modules


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    records = [
        {"image": picture(8, 9, "PNG"), "label": "dog", "many": ["a", "b"]},
        {"image": b"junk", "label": "cat", "many": []},
    ]
    return make(Labelled, tmp_path, records, monkeypatch)


def test_labels_by_name_and_templates(labelled):
    adapter = TfdsAdapter(answer="label", question_template="What?", answer_template="A {}.")
    source = TfdsSource(labelled, "train", adapter)
    assert shape(source[0]) == [(8, 9), ("What?", False), ("A dog.", True)]
    with pytest.raises(BadImageError, match=r"labelled.*, train record 1: cannot be read"):
        source[1]
    assert source.id(1) == "labelled-train-000001"
    wrong = TfdsAdapter(question="many", answer="many")
    assert shape(TfdsSource(labelled, "train", wrong)[0])[1:] == [
        ("a", False), ("a", True), ("b", False), ("b", True),
    ]  # fmt: skip


def _first(source, queue):
    try:
        queue.put(source[0])
    except UserError as error:
        queue.put(str(error))


def _in_fork(source):
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=_first, args=(source, queue))
    child.start()
    found = queue.get(timeout=60)
    child.join()
    return found


def test_pickle_spawn_and_fork(labelled):
    source = TfdsSource(labelled, "train", TfdsAdapter(answer="label"))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        in_spawn = pool.apply(source.__getitem__, (0,))
    want = source[0]
    assert in_spawn == want
    copy = pickle.loads(pickle.dumps(source))
    assert copy._open_data is None and copy[0] == want
    assert "start workers by spawn" in _in_fork(source)


def test_what_can_be_wrong(labelled, tmp_path, monkeypatch):
    answer = TfdsAdapter(answer="label")
    for adapter, message in (
        (None, "no adapter for labelled"),
        (TfdsAdapter(), "needs either answer or box"),
        (TfdsAdapter(answer="lable"), r'no feature "lable".*did you mean "label"'),
        (TfdsAdapter(answer="many.text"), r'no feature "many.text", for want of "text"'),
    ):
        with pytest.raises(UserError, match=message):
            TfdsSource(labelled, "train", adapter)
    with pytest.raises(UserError, match=r'no split "trian"; did you mean "train"'):
        TfdsSource(labelled, "trian", answer)
    with pytest.raises(UserError, match=r'turns "frist"; did you mean "first"'):
        TfdsSource(labelled, "train", answer, turns="frist")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no dataset_info\.json in it"):
        TfdsSource(tmp_path / "none", "train", answer)
    make(CocoCaptions, tmp_path, [coco_record(1)], monkeypatch)
    with pytest.raises(UserError, match="holds 2 prepared sets"):
        TfdsSource(tmp_path, "train", answer)
    # The same folder, as if it had been written as TFRecord.
    info = next((tmp_path / "labelled").rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="file_format=array_record"):
        TfdsSource(tmp_path / "labelled", "train", answer)


def test_unequal_lists_are_named(tmp_path, monkeypatch):
    class Uneven(_Tiny):
        FEATURES: ClassVar = {
            "image": F.Image(),
            "q": F.Sequence(F.Text()),
            "a": F.Sequence(F.Text()),
        }

    record = {"image": picture(3, 3, "PNG"), "q": ["x", "y"], "a": ["z"]}
    make(Uneven, tmp_path, [record], monkeypatch)
    source = TfdsSource(tmp_path, "train", TfdsAdapter(question="q", answer="a"))
    with pytest.raises(UserError, match="train record 0: unequal numbers of q and a"):
        source[0]
