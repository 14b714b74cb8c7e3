"""Mixtures from a configuration: flags to sources, and a run on them."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
from conftest import write_llava
from PIL import Image as PilImage

from fuyu_jax import config as config_lib
from fuyu_jax.config import DataConfig, SourceConfig, TrainConfig
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.opening import open_sources, open_tokenizer
from fuyu_jax.data.packed import PackedData
from fuyu_jax.data.report import figures, report
from fuyu_jax.errors import UserError
from fuyu_jax.train import Trainer


@pytest.fixture
def parts(tmp_path):
    """A LLaVA file and a file of plain text."""
    llava = write_llava(tmp_path / "a", 20)
    text = tmp_path / "text.jsonl"
    lines = [{"id": f"t{i}", "text": f"red green blue {i}"} for i in range(12)]
    text.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return [
        {"name": "shapes", "kind": "llava", "train": str(llava), "validation": str(llava)},
        {"name": "words", "kind": "text", "train": str(text), "weight": 0.25},
    ]


def mixture(parts, config=None):
    changes = {"data.source": "mixture", "data.mixture": json.dumps(parts)}
    return config_lib.replace(config or TrainConfig(), changes)


def test_flags_become_sources_with_their_own_policies(parts):
    parts[0] |= {"weight": 0.75, "resolution": "patches", "max_image_patches": 6}
    config = mixture(parts)
    assert config.data.mixture[1] == SourceConfig("words", "text", parts[1]["train"], weight=0.25)
    again = config_lib.from_json(config_lib.to_json(config))
    assert again == config
    sources = open_sources(config.data)
    assert sources.splits == ("train", "validation", "test")
    mixed = sources.open_mixture("train", config.model, seed=0)
    assert [p.name for p in mixed.parts] == ["shapes", "words"]
    assert [float(s) for s in mixed.shares] == [0.75, 0.25]
    policies = [p.policy.resolution for p in mixed.parts]
    assert (policies[0].kind, policies[0].max_patches) == ("patches", 6)
    assert (policies[1].kind, policies[1].max_height) == ("native", 1080)
    both = sources.open("train")
    assert len(both) == 32 and both.id(0) == "shapes/r0"
    assert both[20].id == both.id(20) == "words/text:1:t0"
    assert both[20].segments[0].text == "red green blue 0"
    assert len(list(both.texts())) > 32
    assert len(sources.open("validation")) == 20  # the text has none


def test_a_run_on_a_mixture(parts, tiny_config, tmp_path, capsys):
    config = mixture(parts, config_lib.replace(tiny_config, {"workdir": str(tmp_path / "run")}))
    run = Trainer(config)
    run.run()
    # 20 at 3/4... the weights are 1 and 1/4, so 4/5: 60 draws show 12 texts once, 48 shapes.
    assert "an epoch goes through shapes 2.40×, words 1.00×" in capsys.readouterr().out
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["examples"] == 60 and plan["settings"]["words.weight"] == 0.25
    weights = [row for row in run.data.row_source(0)[0].batch.loss_weights]
    assert np.sum(weights) > 0


def test_the_report_counts_what_is_packed(parts, tiny_config, tmp_path):
    config = mixture(parts, tiny_config)
    text = report(config, tmp_path / "page")
    assert (tmp_path / "page" / "report.txt").read_text() == text
    with PilImage.open(tmp_path / "page" / "report.png") as page:
        assert page.width > 800 and len(page.convert("RGB").getcolors(1 << 24)) > 20
    run = Trainer(config_lib.replace(config, {"workdir": str(tmp_path / "run")}))
    rows = [run.data.row_source(0)[r] for r in range(run.data.plan(0).rows)]
    counts = {"shapes": [0, 0, 0], "words": [0, 0, 0]}
    for row in rows:
        for segment, id in enumerate(row.ids, start=1):
            here = row.batch.segment_ids[0] == segment
            patches = int((row.batch.tokens[0][here] == run.tokenizer.image_id).sum())
            found = counts[id.split("/")[0]]
            found[:] = found[0] + 1, found[1] + int(here.sum()), found[2] + patches
    for name, (examples, tokens, patches) in counts.items():
        assert re.search(
            rf"^{name}: {examples} examples, {tokens} tokens \(.*\), {patches} patches$", text, re.M
        )


def test_samples_that_a_tar_has_no_example_for_are_told(parts, tiny_config, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, size in (("a.jpg", 3), ("b.jpg", 3), ("c.heic", 3), ("c.txt", 3)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"red"))
    web = {"name": "web", "kind": "webdataset", "train": str(tmp_path / "x.tar")}
    text = report(mixture([*parts, web], tiny_config), tmp_path / "page")
    assert "; web: 2 images have no text and are left out; web: 1 examples have no image" in text


def test_the_report_counts_patches_that_are_dropped_as_drawn(parts, tiny_config, tmp_path):
    config = config_lib.replace(
        mixture(parts, tiny_config), {"data.token_drop": "[[0, 0.8], [1, 0.8]]"}
    )
    sources = open_sources(config.data)
    tokenizer = open_tokenizer(sources, tmp_path)
    policy = LayoutPolicy.of(config.model, config.data)
    mixed = sources.open_mixture("train", config.model, config.seed)
    data = PackedData(mixed, tokenizer, policy, config.data, config.seed)
    found = figures(data)
    for at, row in enumerate(data.row_source(0)[r] for r in range(data.plan(0).rows)):
        assert found.used_tokens[at] == (row.batch.segment_ids[0] > 0).sum()
        assert found.used_patches[at] == (row.batch.tokens[0] == tokenizer.image_id).sum()


@pytest.fixture
def named_fields(tmp_path):
    """Parquet and JSON Lines whose columns and fields are called otherwise; as sources."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    sink = io.BytesIO()
    PilImage.new("RGB", (5, 4)).save(sink, "PNG")
    cells = [{"photo": sink.getvalue(), "ask": "what?", "give": "grey", "caption": "no", "key": 7}]
    parquet.write_table(pa.Table.from_pylist(cells), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"body": "running text", "text": "no"}\n')
    columns = {"image": "photo", "question": "ask", "answer": "give", "id": "key"}
    return [
        {"name": "p", "kind": "parquet", "train": f"{tmp_path}/x.parquet", "columns": columns},
        {"name": "t", "kind": "text", "train": f"{tmp_path}/x.jsonl", "text_field": "body"},
    ]


def test_a_config_names_columns_and_fields(named_fields):
    config = mixture(named_fields)
    assert config_lib.from_json(config_lib.to_json(config)) == config
    both = open_sources(config.data).open("train")
    assert [both.id(i) for i in range(2)] == ["p/7", "t/x:1"]
    image, ask, give = both[0].segments
    assert (image.height, image.width) == (4, 5)
    assert (ask.text, give.text) == ("what?", "grey")
    assert [s.text for s in both[1].segments] == ["running text"]
    assert list(both.texts()) == ["what?", "grey", "running text"]


@pytest.mark.parametrize(
    "at, change, message",
    [
        (0, {"columns": {"image": "foto"}}, r'x\.parquet: no column "foto".*mean "photo"\?$'),
        (0, {"columns": {"questoin": "ask"}}, r'columns\.questoin"; did you mean ".*columns\.que'),
        (0, {"columns": {"caption": 3}}, r"columns\.caption.: 3 is not of type str"),
        (0, {"columns": "photo"}, r"\[0\]\.columns. is a group"),
        (0, {"columns": {"question": "ask"}}, "columns together"),
        (0, {"text_field": "body"}, r'source "p": text_field is of text, not of parquet$'),
        (1, {"text_field": "bdy"}, r'x\.jsonl, line 1: no text "bdy"; did you mean "body"\?$'),
        (1, {"columns": {"id": "key"}}, r'source "t": columns are of parquet, not of text$'),
        (1, {"cleaning": 3}, r"\[1\]\.cleaning.: 3 is not an object"),
        (1, {"cleaning": {"min_chars": 3}}, r"did you mean .*\[1\]\.cleaning\.m.._text_chars"),
    ],
)
def test_wrong_columns_and_fields_are_one_line(named_fields, at, change, message):
    named_fields[at] |= change
    with pytest.raises(UserError, match=message) as caught:
        list(open_sources(mixture(named_fields).data).open("train").texts())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weigth": 1}, r'mixture\[0\]\.weigth.*did you mean ".*weight"'),
        ({"kind": "parket"}, 'did you mean "parquet"'),
        ({"weight": "much"}, "not of type float"),
        ({"train": None}, "not of type str"),
    ],
)
def test_a_mistyped_source_is_one_line(parts, change, message):
    with pytest.raises(UserError, match=message):
        mixture([parts[0] | change, parts[1]])


def test_missing_pieces_are_one_line(parts, tmp_path):
    with pytest.raises(UserError, match='source 0: no "kind"'):
        mixture([{"name": "a", "train": "b"}])
    with pytest.raises(UserError, match="not a list such as"):
        config_lib.replace(TrainConfig(), {"data.mixture": "{"})
    with pytest.raises(UserError, match=r"no data: give --config\.data\.mixture"):
        open_sources(DataConfig(source="mixture"))
    config = mixture([{"name": "a", "kind": "tfds", "train": str(tmp_path)}])
    with pytest.raises(UserError, match="give DIRECTORY:SPLIT"):
        open_sources(config.data).open("train")
