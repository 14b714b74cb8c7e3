"""Rows and batches filled from a plan."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import write_llava
from PIL import Image as PilImage

from fuyu_jax.config import DataConfig
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.lengths import BadExamples
from fuyu_jax.data.packed import PackedData, Position
from fuyu_jax.data.sources.common import opened
from fuyu_jax.data.sources.llava import LlavaSource
from fuyu_jax.errors import TrainingStoppedError
from fuyu_jax.patches import grid_of, unpatchify

POLICY = LayoutPolicy(patch_size=8)
CONFIG = DataConfig(tokens_per_row=128, patches_per_row=96, prefetch_rows=4)


@pytest.fixture(scope="module")
def data(llava_json, tokenizer):
    return PackedData(LlavaSource(llava_json), tokenizer, POLICY, CONFIG, seed=0)


def take(data, count, start=(0, 0), rows=2):
    return list(itertools.islice(data.batches(rows, Position(*start)), count))


def test_every_example_is_in_one_row_and_whole(data, tokenizer):
    rows = data.plan(0).rows
    batches = take(data, rows, rows=1)
    ids = [id for b in batches for row in b.ids for id in row]
    source = data.mixture.parts[0].source
    index = {source.id(i): i for i in range(len(source))}
    assert sorted(ids) == sorted(index)
    for batch in batches:
        arrays = batch.rows
        patch_at = 0
        for segment, id in enumerate(batch.ids[0], start=1):
            here = arrays.segment_ids[0] == segment
            example = source[index[id]]
            count = here.sum()
            np.testing.assert_array_equal(arrays.positions[0][here], np.arange(count))
            for image in example.images:
                grid = grid_of(image.height, image.width, 8)
                patches = arrays.patches[0, patch_at : patch_at + grid.patches]
                np.testing.assert_array_equal(unpatchify(patches, grid, 8), image.decode())
                patch_at += grid.patches
        placeholders = (arrays.tokens[0] == tokenizer.image_id).sum()
        assert placeholders == patch_at
        assert arrays.loss_weights[0][arrays.segment_ids[0] == 0].sum() == 0


def test_batches_go_on_from_any_position_across_epochs(data):
    rows = data.plan(0).rows
    count = 2 * rows // 2 + 2  # past the end of the first epoch and into the third
    all_of_them = take(data, count)
    assert all_of_them[-1].after.epoch >= 1
    for k in (0, 1, rows // 2, count - 2):
        again = take(data, count - k - 1, start=all_of_them[k].after)
        for a, b in zip(again, all_of_them[k + 1 :], strict=True):
            assert a.ids == b.ids
            assert a.after == b.after
            for x, y in zip(a.rows, b.rows, strict=True):
                np.testing.assert_array_equal(x, y)


def test_threads_change_nothing(llava_json, tokenizer, data):
    import dataclasses

    threaded = PackedData(
        LlavaSource(llava_json), tokenizer, POLICY, dataclasses.replace(CONFIG, threads=4), seed=0
    )
    for a, b in zip(take(data, 6), take(threaded, 6), strict=True):
        assert a.ids == b.ids
        np.testing.assert_array_equal(a.rows.patches, b.rows.patches)


def test_epochs_are_shuffled_apart(data):
    first, second = data.plan(0), data.plan(1)
    assert sorted(first.examples) == sorted(second.examples)
    assert first.examples.tolist() != second.examples.tolist()


def test_an_image_that_breaks_late_leaves_its_row_neighbours(tmp_path, tokenizer, capsys):
    path = write_llava(tmp_path, 10)
    data = PackedData(LlavaSource(path), tokenizer, POLICY, CONFIG, seed=0)
    (tmp_path / "images" / "3.png").unlink()  # after its header was read
    batches = take(data, data.plan(0).rows, rows=1)
    ids = {id for b in batches for row in b.ids for id in row}
    assert ids == {f"r{i}" for i in range(10)} - {"r3"}
    assert "3.png" in data.bad.reasons["r3"]
    for b in batches:
        assert set(np.unique(b.rows.segment_ids)) <= set(range(len(b.ids[0]) + 1))


def test_too_many_bad_images_stop_it(tmp_path, tokenizer):
    import dataclasses

    path = write_llava(tmp_path, 10)
    for i in (0, 1, 2):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no image")
    config = dataclasses.replace(CONFIG, max_bad_examples=2)
    with pytest.raises(TrainingStoppedError, match="3 examples have missing or broken images"):
        PackedData(LlavaSource(path), tokenizer, POLICY, config, seed=0)


def test_oversize_examples_are_told_and_left_out(tmp_path, tokenizer):
    import dataclasses

    path = write_llava(tmp_path, 30)
    config = dataclasses.replace(CONFIG, patches_per_row=12)
    data = PackedData(LlavaSource(path), tokenizer, POLICY, config, seed=0)
    assert 0 < len(data.oversize) < 30
    assert f"{len(data.oversize)} examples fit no row" in data.report()
    assert data.oversize[0] in data.report()


def test_the_hash_holds_difficulties_where_they_order_the_rows(llava_json, tokenizer):
    class Harder(LlavaSource):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return dataclasses.replace(example, info={**example.info, "difficulty": 1 + index % 3})

    def hash_of(source, epochs):
        config = dataclasses.replace(CONFIG, easy_first_epochs=epochs)
        return PackedData(source(llava_json), tokenizer, POLICY, config, seed=0).hash

    assert hash_of(LlavaSource, 0) == hash_of(Harder, 0)
    assert hash_of(LlavaSource, 1) != hash_of(Harder, 1)


def test_an_image_that_has_grown_since_the_plan_ends_no_run(tmp_path, tokenizer):
    path = write_llava(tmp_path / "a", 12)
    config = dataclasses.replace(CONFIG, max_bad_examples=12)
    data = PackedData(LlavaSource(path), tokenizer, POLICY, config, seed=0)
    opened.cache_clear()
    for image in path.parent.rglob("*.png"):
        PilImage.new("RGB", (300, 300)).save(image)
    skipped = [s for r in range(data.plan(0).rows) for s in data.row_source(0)[r].skipped]
    opened.cache_clear()
    assert skipped and all("grown since the plan" in reason for _, reason in skipped)


def test_a_line_of_bad_examples_that_a_kill_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "bad_examples.jsonl"
    path.write_text('{"id": "a", "reason": "x"}\n{"id": "b", "rea')
    bad = BadExamples(5, quiet=True)
    bad.add("a", "x")
    bad.add("b", "y")
    bad.keep_in(path)
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and lines[2] == '{"id": "b", "reason": "y"}'
