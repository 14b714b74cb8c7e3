"""Parquet with images in a column: kinds of columns, row groups, and what can be wrong."""

import io
import multiprocessing
import pickle
import sys
import threading

import numpy as np
import pytest
from PIL import Image as PilImage

from fuyu_jax.data.example import BadImageError, Image
from fuyu_jax.data.sources import ParquetSource
from fuyu_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(height, width):
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def cell(height, width, path=None):
    return {"bytes": picture(height, width), "path": path}


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def shape(example):
    return [
        (s.height, s.width) if isinstance(s, Image) else (s.text, s.train, s.plain)
        for s in example.segments
    ]


ASK, GIVE = (False, False), (True, False)


def test_conversations(tmp_path):
    talk = [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "no"}]
    rows = [
        {"id": "p", "images": [cell(2, 3), cell(4, 5)], "conversations": talk, "family": "f"},
        {"id": "q", "images": [], "conversations": talk[1:] * 2, "family": "g"},
        {"id": "p", "images": None, "conversations": None, "family": "g"},
    ]
    source = ParquetSource(write(tmp_path / "x.parquet", rows))
    assert [source.id(i) for i in range(3)] == ["p", "q", "p#2"] and source.repeated_ids == 1
    assert shape(source[0]) == [
        ("Is", *ASK), (2, 3), (" like", *ASK), (4, 5), ("?", *ASK), ("no", *GIVE),
    ]  # fmt: skip
    assert source[0].info == {"family": "f"}
    with pytest.raises(UserError, match=r"x\.parquet, row 1: nothing is asked"):
        source[1]
    assert source[2].segments == ()
    assert list(source.texts()) == ["Is like?", "no", "no", "no"]


def test_conversations_as_json_text(tmp_path):
    talk = '[{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]'
    rows = [{"image": cell(2, 3), "conversations": t} for t in (talk, "{")]
    source = ParquetSource(write(tmp_path / "x.parquet", rows))
    assert shape(source[0]) == [(2, 3), ("a?", *ASK), ("b", *GIVE)]
    with pytest.raises(UserError, match=r'x\.parquet, row 1, "conversations": not JSON'):
        source[1]


def test_turns_of_user_and_assistant(tmp_path):
    turns = [
        {"user": "a?", "assistant": "b", "source": "s"},
        {"user": "c?", "assistant": "", "source": "s"},
        {"user": "e?", "assistant": "f", "source": "s"},
    ]
    source = ParquetSource(
        write(tmp_path / "x.parquet", [{"images": [cell(2, 3)], "texts": turns, "caption": "no"}])
    )
    assert shape(source[0]) == [
        (2, 3), ("a?", *ASK), ("b", *GIVE), ("e?", *ASK), ("f", *GIVE),
    ]  # fmt: skip
    assert list(source.texts()) == ["a?", "b", "c?", "e?", "f"]


def test_questions_and_captions(tmp_path):
    rows = [{"image": cell(2, 3), "question": "q?", "answers": ["x", "y"], "caption": "c"}]
    path = write(tmp_path / "x.parquet", rows)
    source = ParquetSource(path)
    assert source.id(0) == source[0].id == "x:0"
    assert shape(source[0]) == [(2, 3), ("q?", *ASK), ("x", *GIVE)]
    assert source[0].info == {"family": "all", "answers": ["x", "y"]}
    by_name = ParquetSource(path, caption="caption", prompt="Say.")
    assert shape(by_name[0]) == [(2, 3), ("Say.", *ASK), ("c", *GIVE)]
    assert list(by_name.texts()) == ["c", "Say."]
    other = [{"photo": cell(4, 5), "ask": ["a?", "b?"], "give": ["1", "2"], "key": 7}]
    path = write(tmp_path / "y.parquet", other)
    source = ParquetSource(path, image="photo", question="ask", answer="give", id="key")
    assert source.id(0) == "7"
    assert shape(source[0]) == [
        (4, 5), ("a?", *ASK), ("1", *GIVE), ("b?", *ASK), ("2", *GIVE),
    ]  # fmt: skip


def test_plain_text_without_images(tmp_path):
    source = ParquetSource(write(tmp_path / "x.parquet", [{"text": "run"}]), prompt="Say.")
    assert shape(source[0]) == [("run", True, True)]


def test_images_as_bytes_and_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(6, 7))
    write(tmp_path / "bytes.parquet", [{"image": picture(2, 3), "text": "x"}])
    write(tmp_path / "paths.parquet", [{"image": "a.png", "text": "x"}])
    write(
        tmp_path / "both.parquet",
        [
            {"image": {"bytes": None, "path": "a.png"}, "text": "x"},
            {"image": {"bytes": b"junk", "path": "b.png"}, "text": "x"},
            {"image": {"bytes": None, "path": None}, "text": "x"},
            {"image": {"bytes": None, "path": "gone.png"}, "text": "x"},
            {"image": None, "text": "x"},
        ],
    )
    assert shape(ParquetSource(tmp_path / "bytes.parquet")[0])[0] == (2, 3)
    assert shape(ParquetSource(tmp_path / "paths.parquet")[0])[0] == (6, 7)
    source = ParquetSource(tmp_path / "both.parquet")
    assert shape(source[0])[0] == (6, 7)
    assert shape(source[4]) == [("x", True, True)]
    for row, message in (
        (1, r"both\.parquet, row 1, 'image' \(b\.png\): cannot be read"),
        (2, r"both\.parquet, row 2, 'image': neither bytes nor a path"),
        (3, r"row 3, 'image' \(gone\.png\): no such file"),
    ):
        with pytest.raises(BadImageError, match=message):
            source[row]


@pytest.fixture
def files(tmp_path):
    """Three files of 7 rows in groups of 3, captions counted through."""
    for n in range(3):
        (tmp_path / str(n)).mkdir()
        rows = [{"image": cell(10 + n, 10 + i), "caption": f"c{7 * n + i}"} for i in range(7)]
        write(tmp_path / str(n) / "train.parquet", rows, row_group_size=3)
    return str(tmp_path / "{0..2}" / "train.parquet")


def test_random_access_over_files_and_row_groups(files):
    source = ParquetSource(files)
    assert len(source) == 21
    for i in np.random.default_rng(0).permutation(21):
        example = source[int(i)]
        assert shape(example) == [(10 + i // 7, 10 + i % 7), (f"c{i}", *GIVE)]
        assert example.id == source.id(int(i))
    assert [source.id(i) for i in (0, 6, 7, 20)] == ["train:0", "train:6", "train#2:0", "train#3:6"]
    assert list(source.texts()) == [f"c{i}" for i in range(21)]
    with pytest.raises(IndexError):
        source[21]


def test_memory_for_row_groups_is_bounded(files, monkeypatch):
    reads = []
    honest = pq.ParquetFile.read_row_group

    def counted(self, group, *args, **kwargs):
        reads.append(group)
        return honest(self, group, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    large = ParquetSource(files)
    for _ in range(2):
        for i in range(21):
            large[i]
    assert len(reads) == 9  # each group once
    kept = large._cache.nbytes
    assert kept > 2000
    reads.clear()
    small = ParquetSource(files, cache_bytes=kept // 2)
    for i in [*range(21), 20, 20]:
        small[i]
        assert small._cache.nbytes <= kept // 2
    assert len(reads) == 9
    small[0]
    assert len(reads) == 10  # was dropped as the oldest
    sizes = [table.nbytes for table in large._cache._kept.values()]
    twice = ParquetSource(files, cache_bytes=sizes[0] + sizes[1])
    reads.clear()
    for i in (0, 3, 0, 6, 0):  # three groups, of which two fit
        twice[i]
    assert len(reads) == 3  # the one used again was not dropped
    reads.extend([0] * 7)
    least = ParquetSource(files, cache_bytes=1)
    least[0], least[1]
    assert len(reads) == 11 and len(least._cache._kept) == 1


def test_threads_share_a_row_group(files, monkeypatch):
    source = ParquetSource(files)
    found = {}

    def read(start):
        for i in range(start, 21, 4):
            found[i] = source[i].segments[1].text

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"c{i}" for i in range(21)}


def _caption(source, queue):
    queue.put(source[20].segments[1].text)


def test_pickle_and_fork(files):
    source = ParquetSource(files)
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3] and len(copy._cache._kept) == 1
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    with source._cache._lock:  # as if another thread was reading at the fork
        child = fork.Process(target=_caption, args=(source, queue))
        child.start()
    assert queue.get(timeout=30) == "c20"
    child.join()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "imge"}, r'no column "imge" to take as image; did you mean "image"\?'),
        ({"question": "q"}, r'give "question" and "answer" columns together'),
    ],
)
def test_columns_that_are_not_there(tmp_path, options, message):
    path = write(tmp_path / "x.parquet", [{"image": cell(2, 2), "caption": "c", "q": "q"}])
    with pytest.raises(UserError, match=message):
        ParquetSource(path, **options)


def test_files_that_are_not(tmp_path, monkeypatch):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"broken\.parquet: not a parquet file") as caught:
        ParquetSource(tmp_path / "broken.parquet")
    assert "\n" not in str(caught.value)
    good = write(tmp_path / "good.parquet", [{"image": cell(2, 2), "caption": "c"}])
    textless = write(tmp_path / "textless.parquet", [{"image": cell(2, 2), "label": 3}])
    with pytest.raises(UserError, match=r"no column of texts \(image, label\)"):
        ParquetSource(textless)
    with pytest.raises(UserError, match=r"textless\.parquet: no column 'caption', which .*good"):
        ParquetSource([good, textless])
    wrong = write(tmp_path / "wrong.parquet", [{"image": cell(2, 2), "texts": ["x"]}])
    with pytest.raises(UserError, match=r'wrong\.parquet, row 0: "texts" is not a list'):
        ParquetSource(wrong)[0]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'fuyu-jax\[parquet\]'"):
        ParquetSource(good)


def test_a_row_group_that_broke_later_is_named(tmp_path):
    path = write(tmp_path / "x.parquet", [{"image": cell(40, 40), "caption": "c"}])
    source = ParquetSource(path)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.parquet, row group 0: broken"):
        source[0]
