"""Global batches do not depend on hosts, workers, or where a run was taken up again."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import write_llava

from fuyu_jax.config import DataConfig
from fuyu_jax.data import packed
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.mixture import Mixture, Part
from fuyu_jax.data.packed import PackedData, Position
from fuyu_jax.data.plan import Plan
from fuyu_jax.data.resolution import Resolution, TokenDrop
from fuyu_jax.data.sources.llava import LlavaSource
from fuyu_jax.errors import TrainingStoppedError, UserError

CONFIG = DataConfig(tokens_per_row=128, patches_per_row=96, prefetch_rows=4)
ROWS = 4  # of a global batch


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tokenizer):
    """Two sources, one with sampled sizes and dropped patches: the hardest case."""

    def make(**changes):
        parts = [
            Part("plain", first, 0.7, LayoutPolicy(8)),
            Part(
                "chance",
                second,
                0.3,
                LayoutPolicy(
                    8,
                    resolution=Resolution("sampled", min_side=8, max_side=40),
                    drop=TokenDrop(((0, 0.5), (2, 0.1))),
                ),
            ),
        ]
        config = dataclasses.replace(CONFIG, **changes)
        return PackedData(Mixture(parts, 5), tokenizer, LayoutPolicy(8), config, 5)

    folder = tmp_path_factory.mktemp("mixed")
    first = LlavaSource(write_llava(folder / "a", 40))
    second = LlavaSource(write_llava(folder / "b", 15, seed=1))
    return make


def take(data, count, start=(0, 0), **hosts):
    return list(itertools.islice(data.batches(ROWS, Position(*start), **hosts), count))


def same(a, b):
    assert a.ids == b.ids and a.after == b.after and a.dropped == b.dropped
    for x, y in zip(a.rows, b.rows, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def reference(mixed):
    data = mixed()
    count = 3 * data.plan(0).rows // ROWS + 1  # into the fourth epoch
    batches = take(data, count)
    assert batches[-1].after.epoch >= 2
    assert sum(b.dropped for b in batches) > 0
    return batches


def test_every_draw_of_an_epoch_is_in_one_row(mixed):
    data = mixed()
    plan = data.plan(0)
    ids = [id for r in range(plan.rows) for id in data.row_source(0)[r].ids]
    assert len(ids) == data.mixture.epoch_draws
    parts = [id.split("/")[0] for id in ids]
    assert parts.count("plain") == 40 and len(set(ids)) == 55


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batches(mixed, reference, hosts):
    shares = [take(mixed(), len(reference), host=h, hosts=hosts) for h in range(hosts)]
    for number, whole in enumerate(reference):
        parts = [s[number] for s in shares]
        assert all(p.after == whole.after for p in parts)
        assert sum((p.ids for p in parts), ()) == whole.ids
        for k, array in enumerate(whole.rows):
            np.testing.assert_array_equal(np.concatenate([p.rows[k] for p in parts]), array)


@pytest.mark.parametrize("workers", [1, 4])
def test_worker_processes_change_nothing(mixed, reference, workers):
    found = take(mixed(workers=workers), len(reference))
    for a, b in zip(found, reference, strict=True):
        same(a, b)


def test_workers_are_started_anew_after_so_many_rows(mixed, reference, monkeypatch):
    """Two runs of epochs, each with workers of its own, give the same rows."""
    data = mixed(workers=1)
    rows = data.plan(0).rows
    monkeypatch.setattr(packed, "_ROWS_OF_WORKERS", rows + 1)
    read, sizes = data._read, []
    monkeypatch.setattr(data, "_read", lambda p: (sizes.append(len(p)), read(p))[1])
    for a, b in zip(take(data, len(reference)), reference, strict=True):
        same(a, b)
    assert len(sizes) >= 2 and sizes[0] == rows + data.plan(1).rows


def test_a_run_goes_on_at_any_batch_with_another_number_of_hosts(mixed, reference):
    for at in range(len(reference) - 1):
        start = reference[at].after
        rest = reference[at + 1 : at + 3]
        for a, b in zip(take(mixed(), len(rest), start), rest, strict=True):
            same(a, b)
        halves = [take(mixed(), 1, start, host=h, hosts=2)[0] for h in (0, 1)]
        assert halves[0].ids + halves[1].ids == rest[0].ids


def test_a_batch_that_does_not_divide_is_one_line(mixed):
    with pytest.raises(UserError, match="rows_per_batch=4 does not divide over 3 hosts"):
        take(mixed(), 1, host=0, hosts=3)


def test_the_plan_is_saved_and_its_settings_named(mixed, tmp_path):
    data = mixed()
    data.save_plan(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.npz"]
    found, plan = Plan.load(tmp_path / "plan.npz"), data.plan(0)
    np.testing.assert_array_equal(found.examples, plan.examples)
    np.testing.assert_array_equal(found.offsets, plan.offsets)
    assert found.hash == plan.hash and found.token_padding == plan.token_padding
    other = mixed(tokens_per_row=256)
    assert other.hash != data.hash
    changed = {k for k in data.settings if data.settings[k] != other.settings[k]}
    assert changed == {"tokens_per_row", "first_plan"}
    (tmp_path / "plan.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        Plan.load(tmp_path / "plan.npz")


def test_memory_is_that_of_the_rows_in_flight(mixed, monkeypatch):
    """No more rows are made ahead than asked for, however slowly they are taken."""
    made = []
    data = mixed(prefetch_rows=3, threads=1)
    original = type(data.row_source(0)).__getitem__

    def counted(self, index):
        made.append(index)
        return original(self, index)

    monkeypatch.setattr(type(data.row_source(0)), "__getitem__", counted)
    batches = data.batches(1, Position(0, 0))
    for taken in range(1, 7):
        next(batches)
        # Those prefetched, the one being made and the one that waits to be put into the buffer.
        assert len(made) <= taken + 3 + 2


def test_bad_images_are_named_in_a_file_and_above_a_share_it_stops(tmp_path, tokenizer):
    path = write_llava(tmp_path / "a", 40)
    source = LlavaSource(path)
    config = dataclasses.replace(CONFIG, max_bad_examples=1, max_bad_share=0.05)  # 2 of 40
    data = PackedData(source, tokenizer, LayoutPolicy(8), config, seed=0)
    data.bad.keep_in(tmp_path / "bad.jsonl")
    for i in (2, 7):
        (tmp_path / "a" / "images" / f"{i}.png").write_bytes(b"broken")
    batches = list(itertools.islice(data.batches(1, Position(0, 0)), data.plan(0).rows))
    ids = {id for b in batches for row in b.ids for id in row}
    assert ids == {f"r{i}" for i in range(40)} - {"r2", "r7"}
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"r2"' in "".join(lines) and "7.png" in "".join(lines)
    (tmp_path / "a" / "images" / "10.png").write_bytes(b"broken")
    with pytest.raises(TrainingStoppedError, match=r"3 examples .* limit of 2 "):
        list(itertools.islice(data.batches(1, Position(0, 0)), data.plan(0).rows))


def test_balanced_batches_have_rows_of_like_patch_counts(tokenizer, tmp_path):
    source = LlavaSource(write_llava(tmp_path / "a", 200))
    spread = []
    for balance in (0, ROWS):
        config = dataclasses.replace(CONFIG, tokens_per_row=256, patches_per_row=256)
        data = PackedData(source, tokenizer, LayoutPolicy(8), config, seed=0, balance_rows=balance)
        batches = take(data, data.plan(0).rows // ROWS)
        counts = [(b.rows.tokens == tokenizer.image_id).sum(axis=1) for b in batches]
        spread.append(np.mean([c.max() - c.min() for c in counts]))
        ids = [id for r in range(data.plan(0).rows) for id in data.row_source(0)[r].ids]
        assert sorted(ids) == sorted(source.id(i) for i in range(200))
    assert spread[1] < spread[0] / 2


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"plan_block": 0}, "data.plan_block=0: give 1 or more"),
        ({"pad_value": 300}, "data.pad_value=300: give 0 to 255"),
        ({"tokens_per_row": 0}, "data.tokens_per_row=0: give 1 or more"),
    ],
)
def test_numbers_that_mean_nothing_are_one_line(mixed, changes, told):
    with pytest.raises(UserError, match=told):
        mixed(**changes)


def test_the_hash_knows_ids_and_the_planner(mixed, monkeypatch):
    """Rows in another order never pass for the same run."""
    before = mixed(plan_block=20).settings
    other = mixed(plan_block=20)
    monkeypatch.setattr(LlavaSource, "id", lambda self, i: f"new {i}")
    changed = {k for k, v in other.settings.items() if before[k] != v}
    assert changed == {"plain.ids", "chance.ids"}
    monkeypatch.undo()
    monkeypatch.setattr("fuyu_jax.data.plan.GOOD_FILL", 0.5)
    third = mixed(plan_block=20)
    assert {k for k, v in third.settings.items() if before[k] != v} == {"first_plan"}
