"""Real records, where they are at hand: as WebDataset and parquet they give what LLaVA's JSON does.

The folder is that of FUYU_JAX_SHARED_DATA, or `../shared/data` beside the repository.
"""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fuyu_jax.data.example import Image
from fuyu_jax.data.sources import LlavaSource, ParquetSource, WebDatasetSource

_GIVEN = os.environ.get("FUYU_JAX_SHARED_DATA")
FOLDER = Path(_GIVEN) if _GIVEN else Path(__file__).parents[2] / "shared" / "data"
SETS = (
    "coco_photos18/llava.json",
    "pubtabnet_tables20/llava.json",
    "sroie_receipts40/llava_train.json",
    "sroie_receipts40/llava_validation.json",
)
SHARD = 100


@pytest.fixture(params=SETS)
def llava(request):
    path = FOLDER / request.param
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return LlavaSource(path)


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def as_tars(llava, folder):
    records = llava.records
    for at in range(0, len(records), SHARD):
        with tarfile.open(folder / f"s-{at // SHARD:03d}.tar", "w") as tar:
            for record in records[at : at + SHARD]:
                path = Path(record["image"])
                add(tar, record["id"] + path.suffix, (llava.image_dir / path).read_bytes())
                add(tar, record["id"] + ".json", json.dumps(record).encode())
    return WebDatasetSource(str(folder / f"s-{{000..{(len(records) - 1) // SHARD:03d}}}.tar"))


def as_parquet(llava, folder):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for record in llava.records:
        data = (llava.image_dir / record["image"]).read_bytes()
        rows.append({**record, "image": {"bytes": data, "path": record["image"]}})
    for at in range(0, len(rows), SHARD):
        table = pa.Table.from_pylist(rows[at : at + SHARD])
        pq.write_table(table, folder / f"{at // SHARD:03d}.parquet", row_group_size=16)
    return ParquetSource(str(folder / "*.parquet"))


@pytest.mark.parametrize("write", [as_tars, as_parquet])
def test_other_forms_give_the_same_examples(llava, write, tmp_path):
    found = write(llava, tmp_path)
    assert len(found) == len(llava) > 7
    compared = set()
    for i in range(len(llava)):
        want, got = llava[i], found[i]
        assert got.id == want.id == found.id(i)
        assert got.info == want.info
        assert len(got.segments) == len(want.segments)
        for a, b in zip(got.segments, want.segments, strict=True):
            if not isinstance(b, Image):
                assert a == b
                continue
            assert (a.height, a.width) == (b.height, b.width)
            if b.encoded not in compared:  # many records share an image
                np.testing.assert_array_equal(a.decode(), b.decode())
                compared.add(b.encoded)
    assert compared
    assert list(found.texts()) == list(llava.texts())
