"""The planner: every example once, within both budgets, a pure function of its inputs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuyu_jax.data.plan import (
    MAX_WAIT,
    Plan,
    main,
    make_plan,
    read_lengths,
    recommend_patches,
)
from fuyu_jax.errors import UserError


def plan_of(tokens, patches, **settings):
    options = {"tokens_per_row": 256, "patches_per_row": 128, "seed": 0, "epoch": 0} | settings
    return make_plan(np.asarray(tokens, np.int32), np.asarray(patches, np.int32), **options)


def lengths(count, seed=0):
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 60, count)
    return patches + rng.integers(5, 60, count), patches


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 150)), min_size=0, max_size=200),
    st.integers(1, 64),
    st.integers(0, 3),
)
def test_every_example_once_and_both_budgets_kept(pairs, block, epoch):
    tokens = [t for t, _ in pairs]
    patches = [p for _, p in pairs]
    plan = plan_of(tokens, patches, block=block, epoch=epoch)
    fits = [i for i, (t, p) in enumerate(pairs) if t <= 256 and p <= 128]
    assert sorted(plan.examples.tolist()) == fits
    assert sorted(plan.oversize.tolist()) == sorted(set(range(len(pairs))) - set(fits))
    for r in range(plan.rows):
        row = plan.row(r)
        assert len(row) > 0
        assert sum(tokens[i] for i in row) <= 256
        assert sum(patches[i] for i in row) <= 128
    assert plan.max_wait_blocks <= MAX_WAIT + 1


def test_it_is_a_function_of_seed_and_epoch():
    tokens, patches = lengths(500)
    same = plan_of(tokens, patches), plan_of(tokens, patches)
    np.testing.assert_array_equal(same[0].examples, same[1].examples)
    np.testing.assert_array_equal(same[0].offsets, same[1].offsets)
    for other in (plan_of(tokens, patches, epoch=1), plan_of(tokens, patches, seed=1)):
        assert not np.array_equal(same[0].examples, other.examples)


@pytest.mark.parametrize("patch_budget", [160, 64])
def test_little_padding_in_the_budget_that_binds(patch_budget):
    tokens, patches = lengths(5000)
    plan = plan_of(tokens, patches, patches_per_row=patch_budget, block=1024)
    used_tokens = np.sum(tokens) / (plan.rows * 256)
    used_patches = np.sum(patches) / (plan.rows * patch_budget)
    assert max(used_tokens, used_patches) > 0.975  # FFD on random lengths: 2.5 % is the bound
    np.testing.assert_allclose(plan.token_padding, 1 - used_tokens, atol=1e-12)
    np.testing.assert_allclose(plan.patch_padding, 1 - used_patches, atol=1e-12)


def test_easy_first_goes_from_easy_to_hard_and_loses_none():
    tokens, patches = lengths(4000)
    difficulty = np.random.default_rng(1).uniform(1, 16, 4000).astype(np.float32)
    plan = plan_of(tokens, patches, block=256, difficulty=difficulty)
    assert sorted(plan.examples.tolist()) == list(range(4000))
    quarters = np.array_split(difficulty[plan.examples], 4)
    means = [q.mean() for q in quarters]
    assert means == sorted(means)
    assert means[0] < 5.5 < 12 < means[-1]
    assert plan.token_padding < 0.05  # small blocks


def test_text_alone_needs_no_patches():
    plan = plan_of([100, 100, 50], [0, 0, 0], patches_per_row=0)
    assert plan.rows == 1
    tokens = lengths(3000)[0]
    none, some = (plan_of(tokens, tokens * 0, patches_per_row=p, block=256) for p in (0, 1))
    assert none.hash == some.hash and none.max_wait_blocks > 0  # rows are recycled all the same


def test_rows_keep_their_examples_when_they_are_put_in_order():
    tokens, patches = (np.asarray(x) for x in lengths(3000))
    plain, balanced = (plan_of(tokens, patches, block=512, balance_rows=n) for n in (0, 8))
    rows = [sorted(p.row(r).tolist() for r in range(p.rows)) for p in (plain, balanced)]
    assert sorted(sorted(r) for r in rows[0]) == sorted(sorted(r) for r in rows[1])
    held = np.array([patches[balanced.row(r)].sum() for r in range(balanced.rows // 8 * 8)])
    unordered = np.array([patches[plain.row(r)].sum() for r in range(len(held))])
    spread = [np.ptp(h.reshape(-1, 8), axis=1).mean() for h in (held, unordered)]
    assert spread[0] < spread[1] / 4


def test_ordered_blocks_stay_where_they_are():
    tokens, patches = lengths(4000)
    plan = plan_of(tokens, patches, block=500, ordered=True)
    assert sorted(plan.examples.tolist()) == list(range(4000))
    # A row's examples come from its block and from those that have waited.
    at = np.repeat(np.arange(plan.rows) / plan.rows, np.diff(plan.offsets))
    assert np.abs(at - plan.examples / 4000).max() < (MAX_WAIT + 1) * 500 / 4000
    quarters = [q.mean() for q in np.array_split(plan.examples, 4)]
    assert quarters == sorted(quarters) and quarters[0] < 1000 < 3000 < quarters[-1]


def test_the_recommended_patch_budget_costs_next_to_nothing():
    tokens, patches = (np.asarray(x, np.int32) for x in lengths(4000))
    budget = recommend_patches(tokens, patches, tokens_per_row=256, multiple=8)
    assert budget % 8 == 0 and budget >= patches.max()
    free = plan_of(tokens, patches, patches_per_row=256)
    within = plan_of(tokens, patches, patches_per_row=budget)
    assert within.token_padding <= free.token_padding + 0.0005
    assert budget < 256
    assert recommend_patches(tokens, patches * 0, tokens_per_row=256) == 0


def write_csv(path, rows, header="height,width,text_tokens"):
    text = "\n".join([header, *(",".join(map(str, r)) for r in rows)]) + "\n"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def test_the_command_prints_one_json_object(tmp_path, capsys, monkeypatch):
    rows = [(60, 90, 10), (0, 0, 40), (61, 30, 5), (2000, 100, 3), (30, 30, 700)]
    path = write_csv(tmp_path / "lengths.csv", rows)
    # By hand, patches of 30: 2x3, none, 3x1, (1080, 54) = 36x2, 1x1; a newline for every row of
    # patches, <s> and the end for every example.
    tokens = [2 * 4 + 12, 42, 3 * 2 + 7, 36 * 3 + 5, 2 + 702]
    found = read_lengths(path, 30)
    assert found[0].tolist() == tokens and found[1].tolist() == [6, 0, 3, 72, 1]
    flags = ["--tokens=256", "--patches=128", f"--lengths={path}", f"--out={tmp_path / 'p.npz'}"]
    monkeypatch.setattr("sys.argv", ["plan", *flags])
    main()
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 1 and report["examples"] == 4 and report["oversize"] == 1
    assert report["token_padding"] == pytest.approx(1 - sum(tokens[:4]) / 256)
    assert report["patch_padding"] == pytest.approx(1 - 81 / 128)
    assert report["microseconds_per_example"] > 0 and report["max_wait_blocks"] == 0
    assert Plan.load(tmp_path / "p.npz").hash == report["hash"]


@pytest.mark.parametrize(
    "rows, header, flags, message",
    [
        ([(1, 2)], "height,width,text_tokens", [], "line 2: '1,2' is not"),
        ([(1, 0, 5)], "height,width,text_tokens", [], "0,0 for no image"),
        ([(1, 1, "x")], "height,width,text_tokens", [], "line 2"),
        ([(1, 1, 1)], "h,w,t", [], "first line"),
        ([(1, 1, 1), (480, 640, 2**31)], "height,width,text_tokens", [], "line 3"),
        ([(1, 1, "9" * 200_000)], "height,width,text_tokens", [], "line 2"),
        ([(1, 1, 1)], "\udcff,width", [], "first line"),
        ([(1, 1, 1)], "height,width,text_tokens", ["--seed=-1"], "--seed=-1: must be 0"),
        ([(1, 1, 1)], "height,width,text_tokens", ["--epoch=-1"], "--epoch=-1: must be 0"),
        ([(1, 1, 1)], "height,width,text_tokens", ["--out=/no/folder/x.npz"], "--out=/no/folder"),
        ([(1, 1, 1)], "height,width,text_tokens", ["--tokens=0"], "--tokens=0"),
        ([(1, 1, 1)], "height,width,text_tokens", ["--patches=-1"], "--patches=-1"),
        ([(1, 1, 1)], "height,width,text_tokens", ["--token=5"], 'did you mean "--tokens"'),
    ],
)
def test_bad_input_to_the_command_is_one_line(tmp_path, monkeypatch, rows, header, flags, message):
    path = write_csv(tmp_path / "lengths.csv", rows, header)
    flags = [f"--lengths={path}", "--tokens=256", "--patches=128", *flags]
    monkeypatch.setattr("sys.argv", ["plan", *flags])
    with pytest.raises(UserError) as error:
        main()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_mark_that_spreadsheets_write_is_passed_over(tmp_path):
    path = write_csv(tmp_path / "x.csv", [(60, 90, 10)], "\ufeffheight,width,text_tokens")
    assert read_lengths(path, 30)[1].tolist() == [6]


def test_a_plan_that_is_cut_short_is_one_line(tmp_path):
    plan_of([5], [1]).save(tmp_path / "p.npz")
    whole = (tmp_path / "p.npz").read_bytes()
    for size in (0, 100, len(whole) - 30):
        (tmp_path / "p.npz").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot be read"):
            Plan.load(tmp_path / "p.npz")


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_lengths(tmp_path / "none.csv", 30)


SHARED = Path(
    os.environ.get("FUYU_JAX_SHARED_DATA")
    or Path(__file__).resolve().parents[2] / "shared" / "data"
)


@pytest.mark.skipif(not (SHARED / "lengths").is_dir(), reason=f"no {SHARED / 'lengths'}")
@pytest.mark.parametrize(
    "tokens_per_row, patches_per_row, most", [(8192, 7168, 0.001), (4096, 3584, 0.002)]
)
def test_padding_of_12_000_mixed_sizes(tokens_per_row, patches_per_row, most):
    tokens, patches = read_lengths(SHARED / "lengths" / "mixture_12k.csv", 30)
    budgets = {"tokens_per_row": tokens_per_row, "patches_per_row": patches_per_row}
    for seed in range(3):
        plan = plan_of(tokens, patches, **budgets, seed=seed, block=4096)
        assert sorted(plan.examples.tolist()) == list(range(12_000))
        used = np.sort([tokens[plan.row(r)].sum() for r in range(plan.rows)])[3:]
        assert 1 - used.mean() / tokens_per_row <= most  # three tail rows aside
        assert plan.max_wait_blocks <= MAX_WAIT
