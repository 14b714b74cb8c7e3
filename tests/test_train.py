"""Training: learns, resumes bit for bit, stops as it should, and keeps what it has."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_llava

from fuyu_jax import config as config_lib
from fuyu_jax.checkpoint import Checkpoints
from fuyu_jax.errors import TrainingStoppedError, UserError
from fuyu_jax.parallel import flops
from fuyu_jax.parallel.mesh import paths
from fuyu_jax.train import Trainer
from fuyu_jax.train.metrics import read_metrics


def at(config, path, **changes):
    return config_lib.replace(config, {"workdir": str(path), **changes})


def losses(workdir):
    return {x["step"]: x["loss"] for x in read_metrics(Path(workdir)) if "loss" in x}


def saved(workdir, step, like):
    checkpoints = Checkpoints(Path(workdir))
    try:
        return checkpoints.restore(step, like.params, like.opt_state)
    finally:
        checkpoints.close()


def test_resume_equals_an_uninterrupted_run_bit_for_bit(tiny_config, tmp_path):
    whole = Trainer(at(tiny_config, tmp_path / "whole"))
    whole.run()
    broken = at(tiny_config, tmp_path / "broken")
    assert Trainer(broken).run(stop_after=3) is None
    second = Trainer(broken)
    assert second.resume() == 3
    second.run()
    ours, theirs = losses(tmp_path / "broken"), losses(tmp_path / "whole")
    assert list(theirs) == list(range(1, 9))
    assert ours == theirs
    a = saved(tmp_path / "whole", 8, whole.state)
    b = saved(tmp_path / "broken", 8, second.state)
    for x, y in zip(
        jax.tree.leaves((a.params, a.opt_state)),
        jax.tree.leaves((b.params, b.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    same = ("hash", "epoch", "row", "tokens", "places")
    assert [a.data[k] for k in same] == [b.data[k] for k in same]
    # What is on disk is what was in memory at the end, not a buffer that a later step reused.
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(whole.state.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_checkpoint_in_the_middle_is_not_touched_by_later_steps(tiny_config, tmp_path):
    """Buffers are donated to the next step while the save goes on."""
    run = at(tiny_config, tmp_path / "a", checkpoint_every=2, keep_checkpoints=10)
    whole = Trainer(run)
    whole.run()
    short = Trainer(at(tiny_config, tmp_path / "b"))
    short.run(stop_after=2)
    a = saved(tmp_path / "a", 2, whole.state)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(short.state.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_learns_and_accumulation_changes_memory_only(tiny_config, tmp_path):
    plain = at(tiny_config, tmp_path / "a", rows_per_batch=2, num_steps=30)
    halved = at(tiny_config, tmp_path / "b", rows_per_batch=1, grad_accum=2, num_steps=30)
    Trainer(plain).run()
    Trainer(halved).run()
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert a[30] < 0.5 * a[1]
    # The same rows and weights, summed in another order; the early steps show it before chaos does.
    for step in range(1, 6):
        np.testing.assert_allclose(b[step], a[step], rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_with_a_checkpoint(tiny_config, tmp_path):
    config = at(tiny_config, tmp_path / "run", checkpoint_every=100)
    trainer = Trainer(config)
    original = trainer.step_fn
    calls = []
    seen = {}

    def poisoned(state, batch):
        calls.append(1)
        if len(calls) == 3:
            seen["params"] = jax.tree.map(np.array, state.params)
            batch = batch._replace(loss_weights=batch.loss_weights * jnp.nan)
        return original(state, batch)

    trainer.step_fn = poisoned
    with pytest.raises(TrainingStoppedError, match=r"step 3: loss nan.*checkpoint 2"):
        trainer.run()
    record = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert record["step"] == 3
    assert record["examples"]
    assert set(record["examples"]) <= {f"r{i}" for i in range(40)}
    kept = saved(tmp_path / "run", 2, trainer.state)
    for x, y in zip(jax.tree.leaves(kept.params), jax.tree.leaves(seen["params"]), strict=True):
        np.testing.assert_array_equal(x, y)
    # Taken up again, the run does the step that failed, with the batch that failed.
    whole = Trainer(at(tiny_config, tmp_path / "whole"))
    whole.run()
    again = Trainer(config)
    assert again.resume() == 2
    again.run()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_work_folder_of_another_config_is_refused(tiny_config):
    Trainer(tiny_config).run(stop_after=1)
    other = config_lib.replace(tiny_config, {"optim.peak_lr": "1e-4"})
    with pytest.raises(UserError, match=r"optim\.peak_lr is 0\.003 there, 0\.0001 here"):
        Trainer(other)
    Trainer(config_lib.replace(tiny_config, {"log_every": 3}))  # changes nothing that is learnt


def test_a_folder_with_other_files_is_refused_and_left_alone(tiny_config, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not of a run"):
        Trainer(at(tiny_config, folder))
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


def test_bad_input_leaves_no_work_folder(tiny_config, tmp_path):
    run = tmp_path / "new"
    bad = at(tiny_config, run, **{"data.tokens_per_row": 3})
    with pytest.raises(UserError, match="fits a row"):
        Trainer(bad)
    with pytest.raises(UserError, match="no such file"):
        Trainer(at(tiny_config, run, **{"data.train_json": str(tmp_path / "none.json")}))
    with pytest.raises(UserError, match="no parameter matches"):
        changed = dataclasses.replace(tiny_config.optim, lr_multipliers=(("nonesuch", 2.0),))
        Trainer(dataclasses.replace(at(tiny_config, run), optim=changed))
    assert not run.exists()


def test_changed_data_refuses_to_resume(tiny_config, tmp_path):
    path = write_llava(tmp_path / "set", 12)
    config = at(
        tiny_config,
        tmp_path / "run",
        **{"data.train_json": str(path), "data.validation_json": ""},
    )
    Trainer(config).run(stop_after=1)
    records = json.loads(path.read_text())
    records[0]["conversations"][0]["value"] = "<image>\nA much longer question than before?"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match="made with other data"):
        Trainer(config).run()


def test_a_checkpoint_of_another_shape_names_the_parameter(tiny_config, tmp_path):
    Trainer(tiny_config).run(stop_after=1)
    trainer = Trainer(at(tiny_config, tmp_path / "other", **{"model.mlp_dim": 48}))
    checkpoints = Checkpoints(Path(tiny_config.workdir))
    try:
        with pytest.raises(
            UserError, match=r"layers/mlp/down/kernel is 2×64×32 there and 2×48×32 in the config"
        ):
            checkpoints.restore_params(1, trainer.state.params, trainer.mesh)
    finally:
        checkpoints.close()


def test_broken_images_are_counted_and_end_the_run_over_the_limit(tiny_config, tmp_path, capsys):
    path = write_llava(tmp_path / "set", 15)
    (tmp_path / "set" / "images" / "0.png").unlink()
    good = (tmp_path / "set" / "images" / "1.png").read_bytes()
    (tmp_path / "set" / "images" / "1.png").write_bytes(
        good[: len(good) // 2]
    )  # its header is whole
    changes = {
        "data.train_json": str(path),
        "data.validation_json": "",
        "data.max_bad_examples": 2,
    }
    trainer = Trainer(at(tiny_config, tmp_path / "run", **changes))
    trainer.run()
    assert set(trainer.data.bad.reasons) == {"r0", "r1"}
    told = capsys.readouterr().out
    assert told.count("skipped example r0") == told.count("skipped example r1") == 1
    assert str(tmp_path / "set" / "images" / "0.png") in told
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_examples"] == 2
    changes["data.max_bad_examples"] = 1
    with pytest.raises(TrainingStoppedError, match=r"limit of 1 \(data\.max_bad_examples.*1\.png"):
        Trainer(at(tiny_config, tmp_path / "strict", **changes)).run()


def test_summary_and_pictures(tiny_config, tmp_path):
    config = at(
        tiny_config,
        tmp_path / "run",
        **{"eval.summary": True, "eval.every": 4, "eval.examples": 8, "eval.final_examples": 10},
    )
    summary = Trainer(config).run()
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    for key in (
        "exact_match",
        "by_family",
        "blind_exact_match",
        "train_seconds",
        "peak_rss_bytes",
        "token_padding",
        "parameters",
    ):
        assert key in summary
    rows = [x for x in read_metrics(tmp_path / "run") if "tokens_per_second" in x]
    padding = np.mean([x["token_padding"] for x in rows])
    np.testing.assert_allclose(summary["token_padding"], padding, atol=1e-9)
    for name in ("loss.png", "accuracy.png", "eval/test/sheet.png", "eval/test_blind/sheet.png"):
        assert (tmp_path / "run" / name).stat().st_size > 5000
    lines = (tmp_path / "run" / "eval" / "test" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 10
    assert {"id", "prompt", "answer", "expected", "correct"} <= set(json.loads(lines[0]))


def test_a_broken_validation_image_is_told_and_left_out(tiny_config, tmp_path, capsys):
    folder = tmp_path / "validation"
    path = write_llava(folder, 6, seed=1)
    (folder / "images" / "2.png").write_bytes(b"no picture")
    changes = {"data.validation_json": str(path), "eval.every": 8}
    run = Trainer(at(tiny_config, tmp_path / "run", **changes))
    assert [e.id for e in run.validation] == ["r0", "r1", "r3", "r4", "r5"]
    told = capsys.readouterr().out
    assert "validation: 1 examples cannot be read" in told and "2.png" in told


def test_freezing_measurement_and_a_trace(tiny_config, tmp_path, capsys):
    config = at(
        tiny_config,
        tmp_path / "run",
        **{
            "optim.freeze": "^(embedding|layers/attention)",
            "peak_flops": 1e12,
            "profile_steps": "3:5",
        },
    )
    trainer = Trainer(config)
    before = jax.tree.map(np.array, trainer.state.params)
    trainer.run()
    moved = {
        path: bool((np.asarray(x) != np.asarray(y)).any())
        for path, x, y in zip(
            paths(before),
            jax.tree.leaves(before),
            jax.tree.leaves(trainer.state.params),
            strict=True,
        )
    }
    frozen = [p for p in moved if p == "embedding" or p.startswith("layers/attention")]
    assert len(frozen) > 4 and not any(moved[p] for p in frozen)
    assert moved["head/kernel"] and moved["layers/mlp/up/kernel"]
    count = sum(x.size for p, x in zip(moved, jax.tree.leaves(before), strict=True) if p in frozen)
    told = capsys.readouterr().out
    assert f"parameters ({count:,} frozen, {trainer.parameters - count:,} learn)" in told
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    lines = [x for x in read_metrics(tmp_path / "run") if "mfu" in x]
    assert len(lines) == 8
    for line in lines:
        # By step: tokens a second times operations a token is operations a second.
        assert line["mfu"] == pytest.approx(line["tflops_per_device"])
        assert line["mfu"] > 0 and line["tokens_per_second"] > 0
    each = [
        x["tflops_per_device"] * 1e12 * jax.device_count() / x["tokens_per_second"] for x in lines
    ]
    matmuls = flops.matmul_parameters(config.model)
    assert all(6 * matmuls < n < 12 * (matmuls + 32 * 400 + 32 * 192) for n in each)
