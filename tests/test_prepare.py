"""Prepared sets hold what their source gives, however often writing them was stopped."""

import dataclasses
import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import test_sources_tfds
from conftest import write_llava
from PIL import Image as PilImage

from fuyu_jax.config import DataConfig, SourceConfig
from fuyu_jax.data import shards
from fuyu_jax.data.example import Example, Image, Text, Tokens
from fuyu_jax.data.layout import LayoutPolicy, lay_out
from fuyu_jax.data.mixture import Mixture, Part
from fuyu_jax.data.opening import open_source
from fuyu_jax.data.outline import read_outline
from fuyu_jax.data.packed import PackedData, Position
from fuyu_jax.data.plan import read_lengths
from fuyu_jax.data.prepare import prepare
from fuyu_jax.data.prepare.job import Settings
from fuyu_jax.data.sources import LlavaSource
from fuyu_jax.data.sources.array_record import ArrayRecordSource
from fuyu_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def part_of(kind, source, **fields):
    return SourceConfig("source", kind, str(source), str(source), str(source), **fields)


# --- Sets of every kind ---


def webdataset(folder, llava):
    with tarfile.open(folder / "a-0.tar", "w") as a, tarfile.open(folder / "a-1.tar", "w") as b:
        for at, record in enumerate(llava.records):
            members = {".json": json.dumps(record).encode()}
            if "image" in record:
                members[".png"] = (llava.image_dir / record["image"]).read_bytes()
            for suffix, data in members.items():
                info = tarfile.TarInfo(record["id"] + suffix)
                info.size = len(data)
                (a if at < 20 else b).addfile(info, io.BytesIO(data))
    return part_of("webdataset", folder / "a-{0,1}.tar")


def parquet(folder, llava):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for record in llava.records:
        image = record.get("image")
        cell = {"bytes": (llava.image_dir / image).read_bytes(), "path": image} if image else None
        rows.append({**record, "image": cell})
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=7)
    return part_of("parquet", folder / "a.parquet")


def interleaved(folder, llava):
    lines = []
    images = [r["image"] for r in llava.records if "image" in r]
    for at in range(0, len(images) - 3, 3):
        texts = ["One and", None, None, "two, Übung ∂ \U0001f600.", None]
        pictures = [None, images[at], images[at + 1], None, images[at + 2]]
        lines.append({"texts": texts, "images": pictures})
    lines.append({"texts": ["No image at all."], "images": [None], "id": "alone"})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return part_of("interleaved", folder / "a.jsonl", image_dir=str(llava.image_dir), max_images=2)


def text(folder, llava):
    lines = [{"text": f"Line {i} says something.", "family": "x"} for i in range(30)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return part_of("text", folder / "t.jsonl", max_chars=15)


def tfds(folder, llava, monkeypatch):
    records = [test_sources_tfds.coco_record(n + 1) for n in range(5)]
    test_sources_tfds.make(test_sources_tfds.CocoCaptions, folder, records, monkeypatch)
    return part_of("tfds", f"{folder}:train[1:]")


def llava(folder, llava):
    return part_of("llava", llava.path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return LlavaSource(write_llava(tmp_path_factory.mktemp("small"), 40))


def run(part, out, tokenizer=None, **options):
    names = {f.name for f in dataclasses.fields(Settings)}
    settings = {k: options.pop(k) for k in list(options) if k in names}
    settings = {"examples_per_shard": 9} | settings
    path = str(tokenizer.path) if tokenizer else ""
    settings = Settings(part, settings.pop("split", "train"), path, **settings)
    return prepare(settings, str(out), **{"workers": 1, **options})


def start(*flags, **options):
    command = [sys.executable, "-m", "fuyu_jax.data.prepare", *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **options)


def same_example(a, b):
    assert (a.id, a.info, len(a.segments)) == (b.id, b.info, len(b.segments))
    for x, y in zip(a.segments, b.segments, strict=True):
        if isinstance(y, Image):
            assert (x.height, x.width, x.name) == (y.height, y.width, y.name)
            assert x.read() == y.read()
        else:
            assert x == y


def batches(part, tokenizer, count=6):
    policy = LayoutPolicy(8)
    mixture = Mixture([Part("all", open_source(part, "train"), 1.0, policy)], 3)
    config = DataConfig(tokens_per_row=160, patches_per_row=128, prefetch_rows=2)
    data = PackedData(mixture, tokenizer, policy, config, 3)
    return list(itertools.islice(data.batches(2, Position(0, 0)), count)), data


def same_rows(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.after == y.after
        for left, right in zip(x.rows, y.rows, strict=True):
            np.testing.assert_array_equal(left, right)


def tree(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


# --- The same examples, the same rows ---


@pytest.mark.parametrize("make", [llava, webdataset, parquet, interleaved, text, tfds])
def test_every_kind_gives_the_same_examples_and_rows(make, small, tmp_path, tokenizer, monkeypatch):
    (tmp_path / "source").mkdir()
    more = (monkeypatch,) if make is tfds else ()
    part = make(tmp_path / "source", small, *more)
    told = run(part, tmp_path / "out", tokenizer)
    source, found = open_source(part, "train"), ArrayRecordSource(tmp_path / "out")
    assert len(found) == len(source) == told["examples"] > 3
    assert told["shards"] == -(-len(source) // 9) and told["bad"] == told["empty"] == 0
    for i in range(len(source)):
        same_example(found[i], source[i])
        assert found.id(i) == source.id(i)
    assert told["images"] == sum(len(source[i].images) for i in range(len(source)))
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names[:2] == ["info.json", "lengths.csv"] and len(names) == 2 + 2 * told["shards"]
    assert names[2] == f"train-00000-of-{told['shards']:05d}.array_record"

    prepared = part_of("array_record", tmp_path / "out")
    (ours, data), (theirs, _) = (batches(p, tokenizer) for p in (prepared, part))
    same_rows(ours, theirs)
    assert [b.ids for b in ours] == [b.ids for b in theirs]
    if make in (llava, webdataset, interleaved):
        assert sum(b.rows.patches.any() for b in ours) and len(data.lengths[0].outline.sizes) > 9


def test_a_prepared_set_may_be_prepared_again(small, tmp_path):
    run(part_of("llava", small.path), tmp_path / "a")
    told = run(part_of("array_record", tmp_path / "a"), tmp_path / "b", examples_per_shard=30)
    assert told["shards"] == 2 and told["kind"] == "array_record"
    again = ArrayRecordSource(tmp_path / "b")
    for i in range(40):
        same_example(again[i], small[i])
    assert list(again.texts()) == [
        s.text for i in range(40) for s in small[i].segments if isinstance(s, Text)
    ]


def test_records_keep_all_that_an_example_holds():
    image = Image(b"\x00\xff" * 9, 7, 5, "näme")
    info = {"family": "f", "difficulty": 0.1 + 0.2, "answers": ["a", ""], "part": 0, "n": None}
    segments = (Text(""), image, Text("\ud800 ü", True), image, Text("plain", True, True))
    example = Example("é", segments, info)
    record, lengths = shards.encode(example)
    assert shards.decode(record) == example and lengths == [18, 18]
    for bad in ({"a": {1, 2}}, {"a": (1, 2)}, {"a": float("nan")}, {"a": {1: 2}}):
        with pytest.raises(UserError, match="example é: its info"):
            shards.encode(Example("é", segments, bad))
    with pytest.raises(UserError, match="Tokens cannot be kept"):
        shards.encode(Example("é", (Tokens((1, 2)),)))


# --- Sidecars ---


def test_sidecars_say_what_the_headers_do(small, tmp_path, tokenizer):
    (tmp_path / "source").mkdir()
    part = interleaved(tmp_path / "source", small)
    out = tmp_path / "out"
    run(part, out, tokenizer)
    found, source = ArrayRecordSource(out), open_source(part, "train")
    outline = found.outline(tokenizer)
    policy = LayoutPolicy(8, 24, 24)
    for i in range(len(source)):
        example = source[i]
        with_pillow = [PilImage.open(s.encoded).size[::-1] for s in example.images]
        assert outline.images(i).tolist() == [list(size) for size in with_pillow]
        layout = lay_out(example, tokenizer, policy)
        of_images = sum(g.rows * (g.columns + 1) for g in layout.grids)
        assert outline.text_tokens[i] == len(layout.tokens) - of_images
    assert np.diff(outline.starts).max() == 2 and np.diff(outline.starts).min() == 0
    theirs = read_outline(source, tokenizer, lambda *bad: pytest.fail(str(bad)))
    for field in dataclasses.fields(outline):
        np.testing.assert_array_equal(getattr(outline, field.name), getattr(theirs, field.name))

    at = 0
    for name in sorted(out.glob("*.npz")):
        sidecar = shards.Sidecar.loads(name.read_bytes(), name)
        for k, index in enumerate(sidecar.index.tolist()):
            example = source[index]
            assert index == at and sidecar.ids[k] == example.id
            texts = [s.text for s in example.segments if isinstance(s, Text)]
            assert sidecar.text_bytes[k] == len("".join(texts).encode())
            images = sidecar.image_bytes[sidecar.starts[k] : sidecar.starts[k + 1]]
            assert images.tolist() == [s.encoded.stat().st_size for s in example.images]
            assert sidecar.record_bytes[k] > images.sum() + sidecar.text_bytes[k]
            at += 1
    assert at == len(source)

    tokens, patches = read_lengths(out / "lengths.csv", 8, 24, 24)  # the planner's own arithmetic
    layouts = [lay_out(source[i], tokenizer, policy) for i in range(len(source))]
    assert patches.tolist() == [x.num_patches for x in layouts]
    for i, layout in enumerate(layouts):
        no_text = not any(isinstance(s, Text) for s in source[i].segments)
        assert tokens[i] == len(layout.tokens) + 2 * no_text


def test_an_outline_is_that_of_one_tokenizer(small, tmp_path, tokenizer, monkeypatch):
    from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece

    part = part_of("llava", small.path)
    run(part, tmp_path / "without")
    run(part, tmp_path / "with", tokenizer)
    copy = tmp_path / "copy.model"
    copy.write_bytes(tokenizer.path.read_bytes())
    other = train_sentencepiece(["something else entirely"] * 9, tmp_path / "other.model", 400)
    found = ArrayRecordSource(tmp_path / "with")
    assert found.outline(Tokenizer(copy)) is not None
    assert found.outline(Tokenizer(other)) is None
    assert ArrayRecordSource(tmp_path / "without").outline(tokenizer) is None
    assert not (tmp_path / "without" / "lengths.csv").exists()

    opened = []
    monkeypatch.setattr(ArrayRecordSource, "__getitem__", lambda self, i: opened.append(i))
    policy = LayoutPolicy(8)
    config = DataConfig(tokens_per_row=160, patches_per_row=128)
    data = PackedData(found, tokenizer, policy, config, 0)
    assert data.plan(0).rows and not opened  # lengths and plan without one record


class Hard:
    """Says how hard its examples are, as the demo set does."""

    def __len__(self):
        return 3

    def id(self, index):
        return str(index)

    def __getitem__(self, index):
        info = {"difficulty": 1.5 * index} if index else {}
        return Example(str(index), (Text("a"), Text("b", True)), info)


def test_difficulty_is_kept(tmp_path, tokenizer):
    path = tmp_path / "a.array_record"
    sidecar = shards.write_records(path, Hard(), range(3), "plan", tokenizer)
    np.testing.assert_array_equal(sidecar.difficulty, np.float32([np.nan, 1.5, 3]))
    again = shards.Sidecar.loads(sidecar.dumps(), path)
    np.testing.assert_array_equal(again.difficulty, sidecar.difficulty)
    assert again.ids == ["0", "1", "2"] and again.about == sidecar.about


# --- Reading ---


def test_reading_by_pickle_fork_and_many_shards(small, tmp_path, monkeypatch):
    run(part_of("llava", small.path), tmp_path / "out", examples_per_shard=2)
    monkeypatch.setattr("fuyu_jax.data.sources.array_record._OPEN_SHARDS", 3)
    found = ArrayRecordSource(tmp_path / "out")
    order = np.random.default_rng(0).permutation(40)
    for i in order.tolist():
        same_example(found[i], small[i])
    assert len(found._readers) == 3
    same_example(pickle.loads(pickle.dumps(found))[7], small[7])
    child = os.fork()
    if not child:
        signal.alarm(10)
        os._exit(0 if found[5].id == "r5" and found[39].id == "r39" else 1)
    assert os.waitpid(child, 0)[1] == 0
    for index in (-1, 40):
        with pytest.raises(IndexError):
            found[index]


def test_broken_sets_are_one_line(small, tmp_path):
    out = tmp_path / "out"
    run(part_of("llava", small.path), out)
    shard = out / "train-00001-of-00005.array_record"
    data = bytearray(shard.read_bytes())
    data[200:60_000] = bytes(59_800)
    shard.write_bytes(data)
    found = ArrayRecordSource(out)
    with pytest.raises(UserError, match=r"train-00001-of-00005\.array_record, record 1: broken"):
        found[9]
    info = json.loads((out / "info.json").read_text())
    for change, message in (
        ({**info, "version": 99}, "version 99 of prepared sets"),
        ({"name": "x"}, "not that of a prepared set"),
        ([], "not that of a prepared set"),
    ):
        (out / "info.json").write_text(json.dumps(change))
        with pytest.raises(UserError, match=message) as error:
            ArrayRecordSource(out)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such folder"):
        ArrayRecordSource(tmp_path / "nowhere")
