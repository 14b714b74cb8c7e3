"""WebDataset tars: members to samples, the index beside the tar, and what can be wrong."""

import io
import json
import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image as PilImage

from fuyu_jax.data.example import BadImageError, Image, Span, Text
from fuyu_jax.data.sources import WebDatasetSource, common
from fuyu_jax.errors import UserError


def picture(height, width, kind="PNG", **options):
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shape(example):
    return [
        (s.height, s.width) if isinstance(s, Image) else (s.text, s.train, s.plain)
        for s in example.segments
    ]


def test_members_of_a_key_become_one_example(tmp_path):
    talk = [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "no"}]
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("a.jpg", picture(20, 30, "JPEG")),
            ("a.json", {"caption": "A."}),
            ("b.2.png", picture(5, 6)),
            ("b.10.png", picture(7, 8)),
            ("b.json", {"conversations": talk, "family": "two"}),
            ("c.webp", picture(9, 4, "WEBP")),
            ("c.txt", b" See. \n"),
            ("dir.x/d.png", picture(3, 3)),
            ("dir.x/d.json", {"question": "Why?", "answers": ["So.", "Thus."]}),
            ("e.json", {"text": "Alone."}),
            ("f.png", picture(2, 2)),
            ("g.png", picture(2, 3)),
            ("g.json", {"caption": None, "url": "x"}),
            ("g.txt", b"From txt"),
            ("h.png", picture(2, 4)),
            ("h.json", {"caption": ""}),
            ("._a.json", b"mac"),
            ("a.cls", b"3"),
        ],
    )
    source = WebDatasetSource(path, prompt="Say.")
    ids = [source.id(i) for i in range(len(source))]
    assert ids == ["a", "b", "c", "dir.x/d", "e", "g", "h"]
    assert [source[i].id for i in range(len(source))] == ids
    prompt = ("Say.", False, False)
    assert shape(source[0]) == [(20, 30), prompt, ("A.", True, False)]
    assert shape(source[1]) == [
        ("Is", False, False), (5, 6), (" like", False, False), (7, 8), ("?", False, False),
        ("no", True, False),
    ]  # fmt: skip
    assert source[1].info == {"family": "two"}
    assert shape(source[2]) == [(9, 4), prompt, ("See.", True, False)]
    assert shape(source[3]) == [(3, 3), ("Why?", False, False), ("So.", True, False)]
    assert shape(source[4]) == [("Alone.", True, True)]
    assert shape(source[5])[-1] == ("From txt", True, False)
    assert source[6].segments == ()
    assert (source.without_text, source.without_image, source.repeated_ids) == (1, 1, 0)
    assert list(source.texts()) == [
        "A.", "Is like?", "no", "See.", "Why?", "So.", "Alone.", "From txt", "Say.",
    ]  # fmt: skip


def test_pixels_come_from_the_span(tmp_path):
    data = picture(40, 31)
    path = write_tar(tmp_path / "s.tar", [("x.txt", b"x"), ("x.png", data), ("y.txt", b"y")])
    image = WebDatasetSource(path)[0].images[0]
    assert isinstance(image.encoded, Span) and image.encoded.length == len(data)
    assert image.read() == data
    np.testing.assert_array_equal(image.decode(), PilImage.open(io.BytesIO(data)))


def test_only_the_head_of_a_large_jpeg_is_read_for_its_size(tmp_path, monkeypatch):
    data = picture(400, 500, "JPEG", quality=95)
    exif = PilImage.Exif()
    exif[0x0112] = 6  # turned
    turned = picture(300, 500, "PNG", exif=exif)
    at = turned.index(b"eXIf") - 4
    chunk = turned[at : at + 12 + int.from_bytes(turned[at : at + 4], "big")]
    turned = turned.replace(chunk, b"")[:-12] + chunk + turned[-12:]  # behind the pixels
    assert min(len(data), len(turned)) > 1 << 16
    members = [("a.jpg", data), ("a.txt", b"a"), ("b.png", turned), ("b.txt", b"b")]
    source = WebDatasetSource(write_tar(tmp_path / "s.tar", members))
    read = []
    honest = os.pread
    monkeypatch.setattr(os, "pread", lambda f, n, at: read.append(n) or honest(f, n, at))
    assert (source[0].images[0].height, source[0].images[0].width) == (400, 500)
    assert max(read) == 1 << 16
    assert (source[1].images[0].height, source[1].images[0].width) == (500, 300)
    assert source[1].images[0].decode().shape == (500, 300, 3)


def test_shards_and_repeated_keys(tmp_path):
    for n in range(9, 12):
        write_tar(tmp_path / f"s-{n:03d}.tar", [("k.txt", f"{n}".encode()), (f"{n}.txt", b"z")])
    source = WebDatasetSource(str(tmp_path / "s-{009..011}.tar"))
    assert [source.id(i) for i in range(6)] == ["k", "9", "k#2", "10", "k#3", "11"]
    assert source.repeated_ids == 2
    assert [shape(source[i])[0][0] for i in (0, 2, 4)] == ["9", "10", "11"]
    by_glob = WebDatasetSource(str(tmp_path / "*.tar"))
    by_list = WebDatasetSource([tmp_path / "s-011.tar", str(tmp_path / "s-{009,010}.tar")])
    assert by_glob.paths == source.paths
    assert [p.name for p in by_list.paths] == ["s-011.tar", "s-009.tar", "s-010.tar"]
    with pytest.raises(UserError, match=r"s-012\.tar: no such file"):
        WebDatasetSource(str(tmp_path / "s-{009..012}.tar"))
    with pytest.raises(UserError, match="given twice"):
        WebDatasetSource([tmp_path / "s-009.tar", str(tmp_path / "*.tar")])


def test_unique_never_gives_an_id_twice():
    ids, changed = common.unique(["a", "a", "a#2", "a", "b"])
    assert len(set(ids)) == 5 and ids[0] == "a" and ids[4] == "b" and changed == 3


def test_the_index_is_kept_and_made_anew_when_the_tar_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"one")])
    assert len(WebDatasetSource(path)) == 1
    kept = tmp_path / "s.tar.index.json"
    assert json.loads(kept.read_text())["samples"][0][0] == "a"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar", "s.tar.index.json"]
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # read again, it would fail
        assert shape(WebDatasetSource(path)[0]) == [("one", True, True)]
    write_tar(path, [("a.txt", b"two"), ("b.txt", b"more")])
    assert [shape(WebDatasetSource(path)[i])[0][0] for i in range(2)] == ["two", "more"]
    kept.write_text("{broken")
    assert len(WebDatasetSource(path)) == 2


def test_a_folder_that_cannot_be_written_needs_no_index(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"one")])

    def refuse(**_):
        raise PermissionError("read-only")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert len(WebDatasetSource(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s.tar"]


def test_indices_may_go_to_a_folder_of_their_own(tmp_path, monkeypatch):
    tars = []
    for name, text in (("one", b"of one"), ("two", b"of two")):
        (tmp_path / name).mkdir()
        tars.append(write_tar(tmp_path / name / "s.tar", [("a.txt", text)]))
    folder = tmp_path / "cache" / "indices"
    assert len(WebDatasetSource(tars[0], index_dir=folder)) == 1
    monkeypatch.setenv("FUYU_JAX_INDEX_DIR", str(folder))
    source = WebDatasetSource(tars)
    assert [shape(source[i])[0][0] for i in range(2)] == ["of one", "of two"]
    # Two tars of one name, two indices, and none beside them.
    assert len(list(folder.glob("s.tar.*.index.json"))) == 2
    assert [p.name for p in sorted(tmp_path.glob("*/s.*"))] == ["s.tar", "s.tar"]
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # read again, it would fail
        assert len(WebDatasetSource(tars)) == 2
    (tmp_path / "file").write_text("")  # no folder can be made there
    assert len(WebDatasetSource(tars, index_dir=tmp_path / "file" / "x")) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.json", b"{")], r"s\.tar, member a\.json: not JSON"),
        ([("a.json", b"[1]")], r"member a\.json: JSON, but no object"),
        ([("a.json", {"url": "x"})], r'member a\.json: no "conversations", "question"'),
        ([("a.txt", b"\xff\xfe")], r"member a\.txt: not UTF-8"),
        ([("a.json", {"question": "x"})], r'member a\.json: a "question" without "answer"'),
        ([("a.json", {"caption": {"x": 1}})], r'member a\.json: "caption" is neither'),
        (
            [("a.json", {"conversations": [{"from": "human", "value": "<image>"}]})],
            r"member a\.json: 1 <image> marks for 0 images",
        ),
    ],
)
def test_malformed_texts_are_named_when_read(tmp_path, members, message):
    source = WebDatasetSource(write_tar(tmp_path / "s.tar", members))
    with pytest.raises(UserError, match=message) as caught:
        source[0]
    assert "\n" not in str(caught.value)
    if members[0][1] != {"url": "x"}:  # it has no texts, rather than bad ones
        with pytest.raises(UserError, match=message):
            list(source.texts())


def test_broken_images_are_named_when_read(tmp_path):
    members = [("a.png", b"nothing"), ("a.txt", b"x")]
    source = WebDatasetSource(write_tar(tmp_path / "s.tar", members))
    with pytest.raises(BadImageError, match=r"s\.tar, member a\.png: cannot be read"):
        source[0]
    whole = write_tar(tmp_path / "t.tar", [("a.txt", b"x"), ("a.png", picture(30, 30))])
    image = WebDatasetSource(whole)[0].images[0]
    with whole.open("r+b") as file:
        file.truncate(image.encoded.offset + 100)
    with pytest.raises(BadImageError, match=r"t\.tar, member a\.png: .*too early"):
        image.decode()


def test_broken_tars_are_named(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"x"), ("b.png", bytes(2000))])
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:2048])
    (tmp_path / "odd.tar").write_bytes(path.read_bytes()[:1100])
    (tmp_path / "none.tar").write_bytes(b"x" * 1024)
    for name in ("cut", "odd", "none"):
        with pytest.raises(UserError, match=rf"{name}\.tar: not a tar, or cut short"):
            WebDatasetSource(tmp_path / f"{name}.tar")
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as tar:
        tar.add(path, "a.txt")
    with pytest.raises(UserError, match=r"z\.tar\.gz: compressed; unpack"):
        WebDatasetSource(tmp_path / "z.tar.gz")
    with pytest.raises(UserError, match=r"member a\.txt is there twice"):
        WebDatasetSource(write_tar(tmp_path / "d.tar", [("a.txt", b"x"), ("a.txt", b"y")]))
    with pytest.raises(UserError, match="no sample with"):
        WebDatasetSource(write_tar(tmp_path / "e.tar", [("a.png", picture(2, 2))]))


def _pixels(source, queue):
    queue.put(source[0].images[0].decode().tobytes())


def test_pickle_and_fork(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.png", picture(4, 5)), ("a.txt", b"x")])
    source = WebDatasetSource(path)
    want = source[0].images[0].decode().tobytes()
    assert pickle.loads(pickle.dumps(source))[0] == source[0]
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=_pixels, args=(source, queue))
    child.start()
    assert queue.get(timeout=30) == want
    child.join()


def test_text_says_whether_it_is_an_answer():
    kinds = [Text("x"), Text("x", train=True), Text("x", train=True, plain=True)]
    assert [t.is_answer for t in kinds] == [False, True, False]
