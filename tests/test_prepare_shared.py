"""Real receipts, tables and photographs, prepared from each format, come to the same rows."""

import itertools

import numpy as np
import pytest
from test_prepare import part_of, run, same_example, same_rows
from test_sources_shared import FOLDER, SETS, as_parquet, as_tars

from fuyu_jax.config import DataConfig
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.packed import PackedData, Position
from fuyu_jax.data.plan import read_lengths
from fuyu_jax.data.sources import LlavaSource
from fuyu_jax.data.sources.array_record import ArrayRecordSource
from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece

POLICY = LayoutPolicy(30, 540, 960)  # receipts are shrunk, which is decoding's hardest case
CONFIG = DataConfig(tokens_per_row=4096, patches_per_row=3584, prefetch_rows=2, threads=2)


@pytest.fixture(params=[name for name in SETS if "validation" not in name])
def llava(request):
    path = FOLDER / request.param
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return LlavaSource(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """With every coordinate, or the tokens of a box depend on how far its image is shrunk."""
    texts = ["What is the total of this receipt?", "Where is it? A cat, 12.50, <td>"] * 40
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return Tokenizer(train_sentencepiece(texts, path, 3000, max_coordinate=960))


def packed(source, tokenizer):
    return PackedData(source, tokenizer, POLICY, CONFIG, 0)


def test_prepared_from_each_format_the_rows_are_the_same(llava, tmp_path, tokenizer):
    (tmp_path / "tars").mkdir()
    (tmp_path / "parquet").mkdir()
    parts = {"llava": part_of("llava", llava.path)}
    as_tars(llava, tmp_path / "tars")
    parts["webdataset"] = part_of("webdataset", tmp_path / "tars" / "s-*.tar")
    as_parquet(llava, tmp_path / "parquet")
    parts["parquet"] = part_of("parquet", tmp_path / "parquet" / "*.parquet")
    original = packed(llava, tokenizer)
    count = min(original.plan(0).rows, 4)
    rows = list(itertools.islice(original.batches(1, Position(0, 0)), count))
    assert sum(len(ids) for batch in rows for ids in batch.ids) >= count
    tables = set()
    for kind, part in parts.items():
        out = tmp_path / f"out-{kind}"
        told = run(part, out, tokenizer, examples_per_shard=50)
        assert (told["examples"], told["bad"], told["empty"]) == (len(llava), 0, 0)
        tables.add((out / "lengths.csv").read_text())
        found = ArrayRecordSource(out)
        data = packed(found, tokenizer)
        assert data.plan(0).hash == original.plan(0).hash
        batches = list(itertools.islice(data.batches(1, Position(0, 0)), count))
        same_rows(batches, rows)
        assert [b.ids for b in batches] == [b.ids for b in rows]
        if kind == "llava":
            for i in range(len(llava)):
                same_example(found[i], llava[i])
    assert len(tables) == 1
    tokens, patches = read_lengths(out / "lengths.csv", 30, 540, 960)
    np.testing.assert_array_equal(patches, original.lengths[0].patches)
    np.testing.assert_array_equal(tokens, original.lengths[0].tokens)
