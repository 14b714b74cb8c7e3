"""Configs, overrides and the one-line errors of the programs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuyu_jax import cli
from fuyu_jax import config as config_lib
from fuyu_jax.config import TrainConfig
from fuyu_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def replaced(name, value):
    return config_lib.replace(TrainConfig(), {name: value})


def test_overrides_take_the_type_of_their_field():
    assert replaced("optim.peak_lr", "1e-4").optim.peak_lr == 1e-4
    assert replaced("num_steps", "1_000").num_steps == 1000
    assert replaced("progress", "false").progress is False
    assert replaced("model.dtype", "bfloat16").model.dtype == "bfloat16"
    groups = replaced("optim.lr_multipliers", '[["patch", 2], ["bias", 0.5]]').optim.lr_multipliers
    assert groups == (("patch", 2.0), ("bias", 0.5))
    assert replaced("optim.freeze", '["^embedding", "head"]').optim.freeze == ("^embedding", "head")
    assert replaced("optim.freeze", "^layers/").optim.freeze == ("^layers/",)
    assert TrainConfig().num_steps == 1000  # the original is frozen


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.peek_lr", "1", r'unknown config key "optim.peek_lr"; did you mean "optim.peak_lr"'),
        ("optin.peak_lr", "1", r'did you mean "optim"'),
        ("peak_lr", "1", r'did you mean "optim.peak_lr"'),
        ("num_steps", "many", r'"num_steps": .many. is not of type int'),
        ("num_steps", "1.5", r"not of type int"),
        ("optim.peak_lr", "fast", r"not of type float"),
        ("progress", "perhaps", r"not of type bool"),
        ("model.dtype", "float16", r"float16. is unknown; did you mean .*float"),
        ("optim", "1", r'"optim" is a group'),
        # Of two fields of one name the outer one is named.
        ("min_image_side", "1", r'did you mean "data.min_image_side"'),
        ("max_aspect_ratio", "1", r'did you mean "data.cleaning.max_aspect_ratio"'),
        ("data.cleaning", "1", r'"data.cleaning" is a group'),
        ("data.cleaning.drop_unreadable", "body", r"unknown; .*decode, header"),
        ("seed.x", "1", r'"seed" is a value'),
        ("optim.lr_multipliers", "patch:2", r"not a list such as"),
        ("optim.freeze", '["head", 2]', r"not a list such as .*embedding"),
    ],
)
def test_bad_overrides_are_told(name, value, message):
    with pytest.raises(UserError, match=message) as caught:
        replaced(name, value)
    assert "\n" not in str(caught.value)


def test_json_round_trip():
    config = replaced("optim.lr_multipliers", [["patch", 2.0]])
    assert config_lib.from_json(config_lib.to_json(config)) == config
    assert config_lib.differences(config, TrainConfig()).keys() == {"optim.lr_multipliers"}


def test_every_resumable_field_exists():
    assert set(config_lib.flatten(TrainConfig())) >= config_lib.RESUMABLE_CHANGES


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_shipped_configs_load(file):
    assert isinstance(config_lib.load(str(file)), TrainConfig)


def test_config_files_that_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r'no such file; did you mean "configs/quickstart.py"'):
        config_lib.load("configs/quikstart.py")
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="get_config"):
        config_lib.load(str(tmp_path / "a.py"))
    (tmp_path / "b.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match="gave dict"):
        config_lib.load(str(tmp_path / "b.py"))


def test_flags_are_split_from_overrides():
    flags = cli.parser("")
    flags.add_argument("--config")
    args, overrides = cli.parse(
        flags, ["--config=a.py", "--config.seed=1", "--config.optim.peak_lr", "2"]
    )
    assert args.config == "a.py"
    assert overrides == ["seed=1", "optim.peak_lr=2"]
    with pytest.raises(UserError, match=r'unknown flag "--confg"; did you mean "--config"'):
        cli.parse(flags, ["--confg=a.py"])
    with pytest.raises(UserError, match="give it a value"):
        cli.parse(flags, ["--config.seed"])


def run(*args, cwd=ROOT):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train.py", "--config=configs/quickstart.py", "--config.num_stps=1"], "num_steps"),
        (["train.py", "--config=configs/llava_json.py"], "--config.data.train_json"),
        (["eval.py", "--checkpoint=/nonexistent"], "no such folder"),
        (["eval.py", "--chekpoint=x"], "--checkpoint"),
    ],
)
def test_programs_say_one_line_and_fail(args, message, tmp_path):
    result = run(*args)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_dataclasses_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1
