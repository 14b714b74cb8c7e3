"""However often preparing is stopped, and by what, the same command ends with the same bytes."""

import json
import resource
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import write_llava
from test_prepare import part_of, run, start, tree

from fuyu_jax.data.prepare.__main__ import main
from fuyu_jax.data.prepare.folder import LocalFolder
from fuyu_jax.data.sources import LlavaSource
from fuyu_jax.data.sources.array_record import ArrayRecordSource
from fuyu_jax.errors import UserError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return LlavaSource(write_llava(tmp_path_factory.mktemp("small"), 40))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_at_any_file_it_goes_on_to_the_same_bytes(
    when, small, tmp_path, tokenizer, monkeypatch
):
    part, out = part_of("llava", small.path), tmp_path / "out"
    run(part, tmp_path / "whole", tokenizer)
    whole = tree(tmp_path / "whole")
    replace = Path.replace
    stop = 0  # at the first file, then at the second, ...
    writes = []

    def dying(self, target):
        if Path(target).parent == out:
            writes.append(target)
            if len(writes) > stop:
                if when == "after":
                    replace(self, target)
                raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    for at in range(1, 100):
        stop = at
        writes.clear()
        try:
            told = run(part, out, tokenizer)
            break
        except Killed:
            assert writes  # something was being written
        assert (when, "info.json" in tree(out)) != ("before", True)
        (out / ".train-00001-of-00005.array_record.123.partial").write_bytes(b"half")
    # Each time at least one more file stays, and shards that are there are not written again.
    assert 2 < stop < 15 and told["written"] < 40
    assert tree(out) == whole


def test_killed_processes_leave_nothing_and_the_rest_is_done(tmp_path, tokenizer):
    path = write_llava(tmp_path / "source", 400)
    out = tmp_path / "out"
    flags = [path, out, "--workers=2", "--examples_per_shard=4", f"--tokenizer={tokenizer.path}"]
    for already, how in ((1, signal.SIGKILL), (30, signal.SIGINT), (60, signal.SIGKILL)):
        process = start(*flags)
        deadline = time.time() + 60
        while len(list(out.glob("*.npz"))) < already:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.005)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.send_signal(how)
        _, errors = process.communicate(timeout=30)
        if how == signal.SIGINT:
            assert process.returncode == 130
            lines = errors.strip().splitlines()
            assert len(lines) == 2 and "the same command goes on" in lines[0]
            assert lines[1] == "interrupted" and not list(out.glob(".*.partial"))
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive  # no orphan goes on writing
        assert not (out / "info.json").exists()
        with pytest.raises(UserError, match="not finished"):
            ArrayRecordSource(out)
    printed, errors = start(*flags).communicate(timeout=60)
    told = json.loads(printed)
    assert told["examples"] == 400 and told["shards"] == 100
    assert 0 < told["written"] < 400 and told["out"] == str(out)
    part = part_of("llava", path)
    once = run(part, tmp_path / "once", tokenizer, examples_per_shard=4)
    assert {k: once[k] for k in ("bytes", "images")} == {k: told[k] for k in ("bytes", "images")}
    assert tree(out) == tree(tmp_path / "once")  # by two processes and by one
    again = run(part, out, tokenizer, examples_per_shard=4)
    assert again["written"] == 0 and again["examples"] == 400
    assert tree(out) == tree(tmp_path / "once")


def test_a_damaged_shard_is_written_again(small, tmp_path, monkeypatch):
    part, out = part_of("llava", small.path), tmp_path / "out"
    run(part, out)
    whole = tree(out)
    damaged = out / "train-00002-of-00005.array_record"
    damaged.write_bytes(whole[damaged.name][:-1000])
    (out / "train-00003-of-00005.lengths.npz").write_bytes(b"nothing")
    (out / "train-00004-of-00005.lengths.npz").unlink()
    with pytest.raises(UserError, match="prepare the set again"):
        ArrayRecordSource(out)

    def dying(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("fuyu_jax.data.shards.write_records", dying)
        run(part, out)
    with pytest.raises(UserError, match="not finished"):  # not a set with a hole
        ArrayRecordSource(out)
    assert run(part, out)["written"] == 8 + 8 + 8
    assert tree(out) == whole


def test_a_shard_of_another_set_is_written_again(small, tmp_path):
    part = part_of("llava", small.path)
    for name, limit in (("a", 256), ("b", 255)):
        run(part, tmp_path / name, shard_size_mb=limit)
    whole = tree(tmp_path / "a")
    for name in ("train-00001-of-00005.array_record", "train-00001-of-00005.lengths.npz"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    assert run(part, tmp_path / "a")["written"] == 8
    assert tree(tmp_path / "a") == whole


def test_another_source_or_setting_is_refused(tmp_path, tokenizer):
    path = write_llava(tmp_path / "source", 20)
    part, out = part_of("llava", path), tmp_path / "out"
    run(part, out, tokenizer)
    whole = tree(out)
    for options, message in (
        ({"examples_per_shard": 7}, "examples_per_shard=9, now 7"),
        ({"tokenizer": None}, "tokenizer="),
        ({"split": "validation"}, "split='train', now 'validation'"),
        ({"check": "decode"}, "check="),
    ):
        with pytest.raises(UserError) as error:
            run(part, out, **{"tokenizer": tokenizer, **options})
        assert message in str(error.value) and "\n" not in str(error.value)
    records = json.loads(path.read_text())
    records[3]["conversations"][1]["value"] = "mauve"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"train\.json has changed since"):
        run(part, out, tokenizer)
    assert tree(out) == whole
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("Dear all")
    with pytest.raises(UserError, match=r"letter\.txt"):
        run(part, tmp_path / "other")
    folder = LocalFolder(tmp_path / "new")
    with folder.begin(), pytest.raises(UserError, match="another process"):
        run(part, tmp_path / "new")


def test_a_full_disk_is_one_line_and_the_rest_is_done_later(small, tmp_path):
    out = tmp_path / "out"
    limit = (50_000, 50_000)  # bytes of a file
    process = start(
        small.path,
        out,
        "--workers=1",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.count("\n") == 1
    assert f"{out}: a shard cannot be written (" in errors
    assert [p.name for p in out.iterdir()] == [".prepare.json"]
    main([str(small.path), str(out), "--workers=1"])
    assert len(ArrayRecordSource(out)) == 40


# --- Bad examples ---


def spoil(path, count, how):
    images = sorted((path.parent / "images").iterdir())
    for image in images[1 : 1 + count]:
        data = image.read_bytes()
        image.unlink() if how == "missing" else image.write_bytes(data[: 60 if how else 5])


@pytest.mark.parametrize("how, check", [("missing", "header"), ("", "header"), ("cut", "decode")])
def test_bad_images_are_named_counted_and_left_out(how, check, tmp_path):
    path = write_llava(tmp_path / "source", 40)
    spoil(path, 4, how)
    part, out = part_of("llava", path), tmp_path / "out"
    told = run(part, out, check=check, workers=2)
    lines = [json.loads(x) for x in (out / "bad_examples.jsonl").read_text().splitlines()]
    assert told["bad"] == len(lines) > 0 and told["examples"] == 40 - told["bad"]
    source, found = LlavaSource(path), ArrayRecordSource(out)
    kept = [found.id(i) for i in range(len(found))]
    bad = [line["id"] for line in lines]
    assert sorted(kept + bad) == sorted(source.id(i) for i in range(40))
    gone = {f"images/{p.name}" for p in sorted((path.parent / "images").iterdir())}
    if how == "missing":
        want = [r["id"] for r in source.records if "image" in r and r["image"] not in gone]
        assert bad == want and all("no such file" in line["reason"] for line in lines)
    assert [found[i].id for i in range(len(found))] == kept


def test_too_many_bad_images_stop_it(tmp_path):
    path = write_llava(tmp_path / "source", 40)
    spoil(path, 14, "missing")
    part, out = part_of("llava", path), tmp_path / "out"
    with pytest.raises(UserError, match=r"11 examples cannot be read, above the limit of 10 of 40"):
        run(part, out, examples_per_shard=1)
    assert len((out / "bad_examples.jsonl").read_text().splitlines()) == 11
    assert not (out / "info.json").exists()
    told = run(part, out, examples_per_shard=1, max_bad_share=0.5)  # not another set
    gone = [r for r in LlavaSource(path).records if not (path.parent / r.get("image", "")).exists()]
    assert told["examples"] + told["bad"] == 40 and told["bad"] == len(gone) > 10
    assert ArrayRecordSource(out)[len(ArrayRecordSource(out)) - 1].id == "r39"


def test_empty_examples_are_counted_and_left_out(tmp_path):
    lines = [{"text": "" if i % 3 == 0 else f"line {i}"} for i in range(10)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = run(part_of("text", tmp_path / "t.jsonl"), tmp_path / "out")
    assert told["empty"] == 4 and told["examples"] == 6 and told["bad"] == 0
    assert [s.text for s in ArrayRecordSource(tmp_path / "out")[0].segments] == ["line 1"]
    (tmp_path / "e.jsonl").write_text('{"text": ""}')
    with pytest.raises(UserError, match="not one example"):
        run(part_of("text", tmp_path / "e.jsonl"), tmp_path / "none")
