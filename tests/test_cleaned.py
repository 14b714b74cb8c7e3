"""Cleaning in a run: which examples stay, what is told of the others, and what is remembered."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fuyu_jax import config as config_lib
from fuyu_jax.config import CleaningConfig, TrainConfig
from fuyu_jax.data import cleaned
from fuyu_jax.data.cleaned import CACHE_FILE, EXAMPLES_FILE
from fuyu_jax.data.opening import open_sources
from fuyu_jax.data.report import report
from fuyu_jax.data.sources import LlavaSource
from fuyu_jax.errors import TrainingStoppedError, UserError
from fuyu_jax.train import Trainer

# Of ten records: 2 is tiny, 5 is a twin of 1 in another file format, 7 and 8 have one image and one
# text, 9's image is not there.
LEFT_OUT = {
    "r2": ("min_image_side", "4×30 pixels, shorter side under 8"),
    "r5": ("exact_duplicate", "same texts and pixels as example r1"),
    "r8": ("exact_duplicate", "same texts and pixels as example r7"),
    "r9": ("unreadable", "no such file"),
}
RULES = {"data.cleaning.min_image_side": 8, "data.cleaning.drop_exact_duplicates": True}
LINE = (
    "cleaning: 4 of 10 training examples are left out (unreadable 1, min_image_side 1, "
    "max_aspect_ratio 0, min_text_chars 0, max_text_chars 0, exact_duplicate 2, near_duplicate 0)"
)


def write_set(folder):
    folder.mkdir(parents=True)
    names = [f"{i}.png" for i in range(10)]
    names[5], names[8] = "5.bmp", "7.png"
    for i, name in enumerate(names[:9]):
        pixels = np.full((4 if i == 2 else 16 + i, 30, 3), 20 * (1 if i == 5 else i), np.uint8)
        if i == 5:
            pixels = pixels[:17]  # as 1
        Image.fromarray(pixels).save(folder / name)
    turns = [
        {"from": "human", "value": "<image>\nWhat grey is it?"},
        {"from": "gpt", "value": "some grey"},
    ]
    records = [
        {"id": f"r{i}", "image": name, "conversations": turns} for i, name in enumerate(names)
    ]
    (folder / "set.json").write_text(json.dumps(records))
    return folder / "set.json"


@pytest.fixture
def path(tmp_path):
    return write_set(tmp_path / "set")


@pytest.fixture
def config(path, tiny_config):
    changes = {"data.train_json": str(path), "data.validation_json": str(path)}
    return config_lib.replace(tiny_config, {**changes, **RULES, "num_steps": 2})


def named(folder):
    lines = [json.loads(x) for x in (folder / EXAMPLES_FILE).read_text().splitlines()]
    return {x["id"]: (x["rule"], x["reason"]) for x in lines}


def check_named(found, label=""):
    assert found.keys() == {label + id for id in LEFT_OUT}
    for id, (rule, reason) in LEFT_OUT.items():
        assert found[label + id][0] == rule
        assert found[label + id][1].endswith(reason)


def test_a_run_leaves_out_what_the_rules_say_and_tells_it(config, tmp_path, capsys):
    run = Trainer(config)
    run.run()
    shown = sorted(id for row in run.data.row_source(0) for id in row.ids)
    assert shown == ["r0", "r1", "r3", "r4", "r6", "r7"]
    told = capsys.readouterr().out
    assert told.splitlines().count(LINE) == 1
    assert told.count("skipped example r9") == 1
    folder = tmp_path / "run"
    check_named(named(folder))
    # The unreadable one is a bad example too; what the other rules leave out is none.
    bad = [json.loads(x)["id"] for x in (folder / "bad_examples.jsonl").read_text().splitlines()]
    assert bad == ["r9"]
    assert not list(folder.glob("*.partial*"))
    settings = json.loads((folder / "plan.json").read_text())["settings"]
    assert settings["llava.cleaning.min_image_side"] == 8
    assert settings["llava.examples"] == 6
    assert len(run.sources.open("validation")) == 10  # not cleaned
    assert len(run.sources.open("train")) == 6


def test_without_rules_nothing_is_opened_or_written(config, tmp_path, monkeypatch, capsys):
    config = config_lib.replace(
        config,
        {"data.cleaning.min_image_side": 0, "data.cleaning.drop_exact_duplicates": "false"},
    )
    monkeypatch.setattr("fuyu_jax.data.opening.open_source", None)
    sources = open_sources(config.data)
    assert sources.clean(tmp_path) is sources and sources.cleaning_line() == ""
    monkeypatch.undo()
    run = Trainer(config)
    assert "cleaning" not in run.describe()
    assert not any(x.startswith("llava.cleaning") for x in run.data.settings)
    assert not {CACHE_FILE, EXAMPLES_FILE} & {p.name for p in (tmp_path / "run").iterdir()}


def test_a_resumed_run_decodes_nothing_again(config, tmp_path, monkeypatch, capsys):
    first = Trainer(config)
    first.run(stop_after=1)
    (tmp_path / "run" / EXAMPLES_FILE).unlink()
    capsys.readouterr()
    monkeypatch.setattr(cleaned, "clean", None)  # looked for again, it would fail
    again = Trainer(config)
    assert again.data.hash == first.data.hash
    again.run()
    told = capsys.readouterr().out
    assert "resumed from step 1" in told and LINE in told
    assert set(again.data.bad.reasons) == {"r9"}  # remembered, and counted as before
    check_named(named(tmp_path / "run"))


@pytest.mark.parametrize("stale", ["text", "id", "rules", "broken", "cut"])
def test_a_stale_or_broken_memory_is_not_taken(config, path, tmp_path, stale, monkeypatch):
    sources = open_sources(config.data).clean(tmp_path, progress=False)
    sources.keep_cleaning(tmp_path)
    calls = []
    clean = cleaned.clean
    monkeypatch.setattr(cleaned, "clean", lambda *a, **k: calls.append(1) or clean(*a, **k))
    assert len(open_sources(config.data).clean(tmp_path).open("train")) == 6 and not calls
    expected = 6
    if stale in ("text", "id"):
        records = json.loads(path.read_text())
        if stale == "text":  # no twin any more; the file's size and the ids are the same
            records[8]["conversations"][1]["value"] = "more grey"
            expected = 7
        else:
            records[0]["id"] = "rx"
        state = path.stat()
        path.write_text(json.dumps(records))
        if stale == "id":
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        else:
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif stale == "rules":
        config = config_lib.replace(config, {"data.cleaning.min_image_side": 17})
        expected = 5  # r0 has 16 rows of pixels
    elif stale == "broken":
        (tmp_path / CACHE_FILE).write_bytes(b"PK no archive")
    else:
        data = (tmp_path / CACHE_FILE).read_bytes()
        (tmp_path / CACHE_FILE).write_bytes(data[: len(data) // 2])
    again = open_sources(config.data).clean(tmp_path, progress=False)
    assert calls == [1]
    assert len(again.open("train")) == expected


def test_hosts_with_and_without_a_memory_come_to_the_same(config, tmp_path):
    one = open_sources(config.data).clean(tmp_path / "a", progress=False)
    (tmp_path / "b").mkdir()
    one.keep_cleaning(tmp_path / "b")
    two = open_sources(config.data).clean(tmp_path / "b", progress=False)
    (first,), (second,) = one.cleaned, two.cleaned
    assert first.key == second.key
    assert first.report.kept.tolist() == second.report.kept.tolist() == [0, 1, 3, 4, 6, 7]
    assert first.report.examples == second.report.examples
    assert first.report.config == second.report.config


def test_other_rules_are_other_data(config, tmp_path):
    Trainer(config).run(stop_after=1)
    other = config_lib.replace(config, {"data.cleaning.min_text_chars": 1})
    with pytest.raises(UserError, match=r"data\.cleaning\.min_text_chars is 0 there, 1 here"):
        Trainer(other)
    # The same six examples stay, and still it is another plan.
    elsewhere = Trainer(config_lib.replace(other, {"workdir": str(tmp_path / "other")}))
    mine = Trainer(config)
    assert len(elsewhere.data.mixture.parts[0].source) == len(mine.data.mixture.parts[0].source)
    assert elsewhere.data.hash != mine.data.hash
    changed = [k for k, v in mine.data.settings.items() if elsewhere.data.settings[k] != v]
    assert changed == ["llava.cleaning.min_text_chars"]


def test_other_kept_examples_of_the_same_lengths_do_not_resume(config, path):
    Trainer(config).run(stop_after=1)
    records = json.loads(path.read_text())
    # 8 becomes 3's twin, 7 is alone: as many stay, of the same sizes; then 7 is 3's twin, too.
    records[7]["image"], records[8]["image"] = "3.png", "7.png"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"made with other data .*llava\.cleaning\.kept"):
        Trainer(config).run()


def test_a_disk_that_is_not_there_stops_the_run_and_is_not_remembered(config, path, tmp_path):
    strict = config_lib.replace(config, {"data.max_bad_examples": 2})
    for i in (0, 1):
        path.with_name(f"{i}.png").rename(path.with_name(f"{i}.away"))
    with pytest.raises(TrainingStoppedError, match=r"3 examples .* limit of 2 \(data\.max_bad_ex"):
        Trainer(strict)
    assert not (tmp_path / "run").exists()
    for i in (0, 1):
        path.with_name(f"{i}.away").rename(path.with_name(f"{i}.png"))
    assert set(Trainer(strict).data.bad.reasons) == {"r9"}
    # Remembered ones count against a limit that was set lower since.
    with pytest.raises(TrainingStoppedError, match="limit of 0"):
        Trainer(config_lib.replace(strict, {"data.max_bad_examples": 0}))


def test_it_stops_at_the_limit_and_not_when_nothing_is_left(config, path, tmp_path):
    for image in path.parent.glob("*.[pb][nm][gp]"):
        image.unlink()
    config = config_lib.replace(config, {"data.max_bad_examples": 2})
    with pytest.raises(TrainingStoppedError, match=r"3 examples .* limit of 2"):
        open_sources(config.data).clean(tmp_path, progress=False)


def test_the_share_of_bad_examples_is_of_all_and_not_of_those_kept(config):
    share = {"data.max_bad_examples": 0, "data.max_bad_share": 0.1}  # 1 of 10, 0 of 6
    assert Trainer(config_lib.replace(config, share)).data.bad.limit == 1


def test_each_source_may_have_rules_of_its_own(config, path, tmp_path, tiny_config):
    write_set(tmp_path / "again")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i % 3}"}) + "\n" for i in range(5)))
    parts = [
        {"name": "common", "kind": "llava", "train": str(path)},
        {
            "name": "own",
            "kind": "llava",
            "train": str(tmp_path / "again" / "set.json"),
            "cleaning": {"min_image_side": 20},
        },
        {"name": "off", "kind": "text", "train": str(text), "cleaning": {}},
    ]
    changes = {"data.source": "mixture", "data.mixture": json.dumps(parts)}
    config = config_lib.replace(config, changes)
    assert config.data.mixture[2].cleaning == CleaningConfig()
    assert config_lib.from_json(config_lib.to_json(config)) == config
    sources = open_sources(config.data).clean(tmp_path, progress=False)
    sizes = [len(p.source) for p in sources.open_mixture("train", config.model, 0).parts]
    # Of its own alone: 16 + i rows of pixels, so 0..3 and 5 are under 20, and 9 is not there.
    assert sizes == [6, 4, 5]
    line = sources.cleaning_line()
    assert line.startswith("cleaning: 10 of 20 training examples are left out (unreadable 2, ")
    assert line.endswith("; common 4 of 10, own 6 of 10")
    sources.keep_cleaning(tmp_path)
    found = named(tmp_path)
    assert {x.split("/")[0] for x in found} == {"common", "own"}
    check_named({k: v for k, v in found.items() if k.startswith("common/")}, "common/")
    run = Trainer(config)
    assert set(run.data.bad.reasons) == {"common/r9", "own/r9"}


def test_nothing_left_and_wrong_values_are_one_line(config, tmp_path):
    def cleaned_with(**rules):
        changes = {f"data.cleaning.{k}": v for k, v in rules.items()}
        return open_sources(config_lib.replace(config, changes).data).clean(tmp_path)

    none = r'"llava": cleaning leaves none of its 10 .*side 9'
    with pytest.raises(UserError, match=none) as told:
        cleaned_with(min_image_side=1000)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"^data\.cleaning\.max_aspect_ratio=0\.5: "):
        cleaned_with(max_aspect_ratio=0.5)
    part = {"name": "a", "kind": "llava", "train": config.data.train_json}
    part["cleaning"] = {"min_text_chars": -1}
    own = config_lib.replace(config, {"data.source": "mixture", "data.mixture": [part]})
    with pytest.raises(UserError, match=r'^source "a": cleaning\.min_text_chars=-1: give'):
        open_sources(own.data).clean(tmp_path)


def test_the_report_page_has_the_line_and_names_the_examples(config, tmp_path, monkeypatch):
    text = report(config, tmp_path / "page")
    assert text.splitlines()[-1] == LINE
    assert (tmp_path / "page" / "report.txt").read_text() == text
    check_named(named(tmp_path / "page"))
    monkeypatch.setattr(cleaned, "clean", None)
    assert report(config, tmp_path / "page") == text


def test_the_demo_set_can_be_cleaned(tmp_path, monkeypatch):
    # Any source will do in the demo set's place.
    path = write_set(tmp_path / "demo")
    monkeypatch.setattr("fuyu_jax.data.opening.DemoSource", lambda *_: LlavaSource(path))
    monkeypatch.setattr("fuyu_jax.data.demo.prepare", lambda *_, **__: path.parent)
    config = config_lib.replace(TrainConfig(), RULES)
    sources = open_sources(config.data).clean(tmp_path, progress=False)
    assert len(sources.open("train")) == 6 and sources.cleaning_line() == LINE


def test_a_config_of_before_loads_and_rules_are_flags(config):
    older = json.loads(config_lib.to_json(TrainConfig()))
    del older["data"]["cleaning"]
    assert config_lib.from_json(json.dumps(older)) == TrainConfig()
    assert config_lib.from_json(config_lib.to_json(config)) == config
    assert not TrainConfig().data.cleaning.on and config.data.cleaning.on
    assert config_lib.flatten(config)["data.cleaning.min_image_side"] == 8
    assert not any(x.startswith("data.cleaning") for x in config_lib.RESUMABLE_CHANGES)
    flag = config_lib.replace(config, {"data.cleaning.near_duplicate_distance": "4"})
    assert flag.data.cleaning == dataclasses.replace(
        config.data.cleaning, near_duplicate_distance=4
    )


def test_a_folder_that_is_copied_takes_its_memory_along(config, tmp_path, monkeypatch):
    run = Trainer(config)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    monkeypatch.setattr(cleaned, "clean", None)
    again = Trainer(config_lib.replace(config, {"workdir": str(tmp_path / "copy")}))
    assert again.data.hash == run.data.hash
