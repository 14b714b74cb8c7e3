"""The command's flags, and the same work as an Apache Beam pipeline on its local runner."""

import json
import sys

import pytest
from conftest import write_llava
from test_prepare import part_of, run, start, tree

from fuyu_jax.data.plan import read_lengths
from fuyu_jax.data.prepare.__main__ import guess_kind, main
from fuyu_jax.data.sources import LlavaSource
from fuyu_jax.errors import UserError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return LlavaSource(write_llava(tmp_path_factory.mktemp("small"), 40))


def test_kinds_are_told_apart(tmp_path, small):
    for name, line, kind in (
        ("a.jsonl", {"conversations": []}, "llava"),
        ("b.jsonl", {"texts": [], "images": []}, "interleaved"),
        ("c.jsonl", {"text_list": [], "image_info": []}, "interleaved"),
        ("d.jsonl", {"text": ""}, "text"),
    ):
        (tmp_path / name).write_text("\n" + json.dumps(line))
        assert guess_kind(str(tmp_path / name)) == kind
    assert guess_kind("x/{000..012}.tar") == "webdataset"
    assert guess_kind("x/*.parquet") == "parquet" and guess_kind("a.json") == "llava"
    assert guess_kind(f"{tmp_path}:train[:10%]") == "tfds"
    run(part_of("llava", small.path), tmp_path / "out")
    assert guess_kind(str(tmp_path / "out")) == "array_record"


def test_the_command_takes_a_configurations_source(small, tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        "from fuyu_jax.config import DataConfig, SourceConfig, TrainConfig\n"
        f"PART = SourceConfig('mine', 'llava', {str(small.path)!r})\n"
        "def get_config():\n"
        "    return TrainConfig(data=DataConfig(source='mixture', mixture=(PART,)))\n"
    )
    flags = [f"--config={tmp_path / 'c.py'}", "--workers=1"]
    main([str(tmp_path / "out"), *flags, "--source=mine"])
    told = json.loads(capsys.readouterr().out)
    assert told["examples"] == 40 and told["source"] == str(small.path) and told["shards"] == 1
    for more, message in (
        (["--source=mind"], 'did you mean "mine"'),
        (["--source=mine", "--split=test"], 'has no "test"'),
        (["--source=mine", "--kind=text"], "--kind: with --config"),
        (["--source=mine", "extra"], "give OUT alone"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(tmp_path / "out"), *flags, *more])


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give SOURCE and OUT"),
        (["{}/a.json"], "give SOURCE and OUT"),
        (["{}/none.json", "{}/o"], "no such file"),
        (["{}/what.bin", "{}/o"], "its kind cannot be told"),
        (["{}/a.json", "{}/o", "--kind=lava"], 'did you mean "llava"'),
        (["{}/a.json", "{}/o", "--shard_size=3"], 'did you mean "--shard_size_mb"'),
        (["{}/a.json", "{}/o", "--shard_size_mb=0"], "--shard_size_mb=0"),
        (["{}/a.json", "{}/o", "--examples_per_shard=-1"], "--examples_per_shard=-1"),
        (["{}/a.json", "{}/o", "--workers=-1"], "--workers=-1"),
        (["{}/a.json", "{}/o", "--max_bad_share=2"], "--max_bad_share=2"),
        (["{}/a.json", "{}/o", "--tokenizer={}/a.json"], "not a sentencepiece model"),
        (["{}/a.json", "{}/a.json"], "a file; give a folder"),
        (["{}/a.json", "{}/o", "--source=x"], "need --config"),
        (["{}/a.json", "{}/o", "--columns=x"], "not JSON"),
        (["{}/a.json", "{}/o", '--columns={"image": "x"}'], "columns are of parquet"),
    ],
)
def test_bad_flags_are_one_line(flags, message, small, tmp_path):
    (tmp_path / "a.json").write_text(small.path.read_text())
    (tmp_path / "what.bin").write_bytes(b"?")
    with pytest.raises(UserError) as error:
        main([flag.replace("{}", str(tmp_path)) for flag in flags])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "o" / "info.json").exists()


def test_the_program_ends_with_one_line_and_status_2(tmp_path):
    process = start(tmp_path / "none.tar", tmp_path / "out")
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and not printed
    assert errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["8;16,9,5", "8;0,9;9,5", "0;0,0;0,5", "8;,9;9,5", "8,9", "8,9,5,1"]
)
def test_the_planner_wants_as_many_heights_as_widths(line, tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text(f"height,width,text_tokens\n8;16,9;17,5\n{line}\n")
    with pytest.raises(UserError, match=r"line 3: .* is not height,width,text_tokens"):
        read_lengths(path, 8)
    path.write_text("height,width,text_tokens\n8;16,9;17,5\n")
    tokens, patches = read_lengths(path, 8)  # 1 × 2 and 2 × 3 patches
    assert tokens.tolist() == [3 + 8 + 5 + 2] and patches.tolist() == [2 + 6]


# --- Apache Beam ---


def test_without_beam_a_line_says_what_to_install(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "fuyu_jax.data.prepare.beam", raising=False)
    monkeypatch.delattr("fuyu_jax.data.prepare.beam", raising=False)
    for flags in ([str(tmp_path / "out"), "--runner=DirectRunner"], ["gs://bucket/out"]):
        with pytest.raises(UserError, match=r"pip install 'fuyu-jax\[beam\]'"):
            main([str(small.path), *flags])


@pytest.fixture
def beam():
    reason = "Apache Beam is not there: pip install 'fuyu-jax[beam]' in an environment of its own"
    pytest.importorskip("apache_beam", reason=reason)
    from fuyu_jax.data.prepare import beam

    return beam


def test_beams_local_runner_writes_the_same_files(beam, small, tmp_path, tokenizer, capsys):
    run(part_of("llava", small.path), tmp_path / "here", tokenizer)
    out = tmp_path / "out"
    common = [str(small.path), str(out), f"--tokenizer={tokenizer.path}", "--examples_per_shard=9"]
    flags = [*common, "--runner=DirectRunner"]
    main(flags)
    told = json.loads(capsys.readouterr().out)
    assert told["written"] == told["examples"] == 40 and told["shards"] == 5
    assert tree(out) == tree(tmp_path / "here")
    (out / "train-00001-of-00005.array_record").unlink()  # as after a stop
    main([*flags, "--direct_num_workers=2"])
    assert json.loads(capsys.readouterr().out)["written"] == 8
    assert tree(out) == tree(tmp_path / "here")
    main([*common, "--workers=1"])  # without Beam on the same folder
    assert json.loads(capsys.readouterr().out)["written"] == 0
    with pytest.raises(UserError, match='"--direct_num_worker"'):
        main([*flags, "--direct_num_worker=2"])
    with pytest.raises(UserError, match="--workers"):
        main([*flags, "--workers=2"])


def test_beam_tells_a_bad_source_in_one_line(beam, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "good"}\n{"text": 5}\n')
    with pytest.raises(UserError) as error:
        main([str(path), str(tmp_path / "out"), "--runner=DirectRunner"])
    assert "t.jsonl, line 2" in str(error.value) and "\n" not in str(error.value)


def test_beam_writes_to_other_file_systems(beam, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from apache_beam.io.localfilesystem import LocalFileSystem

    class Elsewhere(LocalFileSystem):
        """`else://` is a folder here."""

        @classmethod
        def scheme(cls):
            return "else"

        def create(self, path, *rest, **more):
            return super().create(_here(path), *rest, **more)

        def open(self, path, *rest, **more):
            return super().open(_here(path), *rest, **more)

        def _list(self, path):
            for found in super()._list(_here(path)):
                found.path = found.path.replace(str(tmp_path), "else:/")
                yield found

        def metadata(self, path):
            found = super().metadata(_here(path))
            found.path = path
            return found

        def mkdirs(self, path):
            super().mkdirs(_here(path))

        def exists(self, path):
            return super().exists(_here(path))

        def rename(self, sources, targets):
            super().rename(list(map(_here, sources)), list(map(_here, targets)))

        def delete(self, paths):
            super().delete(list(map(_here, paths)))

    def _here(path):
        return path.replace("else:/", str(tmp_path), 1)

    run(part_of("llava", small.path), tmp_path / "here")
    told = run(part_of("llava", small.path), "else://there")
    assert told["written"] == 40 and tree(tmp_path / "there") == tree(tmp_path / "here")
    assert not (tmp_path / "else:").exists()
    (tmp_path / "there" / "train-00001-of-00005.lengths.npz").unlink()
    assert run(part_of("llava", small.path), "else://there")["written"] == 8
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
