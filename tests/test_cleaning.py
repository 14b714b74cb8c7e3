"""Rules that leave examples out of a source."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import write_llava
from PIL import Image

from fuyu_jax.data import example
from fuyu_jax.data.cleaning import RULES, CleanedSource, CleaningConfig, clean, near_matches
from fuyu_jax.data.cleaning import __main__ as program
from fuyu_jax.data.sources.base import Source
from fuyu_jax.data.sources.llava import LlavaSource
from fuyu_jax.errors import UserError


def picture(seed, height=96, width=128):
    """Soft random shapes: unlike another seed's, and much the same after scaling or JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def record(id, images=(), question="What is it?", answer="A picture of soft shapes."):
    marks = "<image>\n" * len(images)
    turns = [
        {"from": "human", "value": marks + question},
        {"from": "gpt", "value": answer},
    ]
    return {"id": id, "image": list(images), "conversations": turns}


def source_of(folder, records):
    (folder / "set.json").write_text(json.dumps(records))
    return LlavaSource(folder / "set.json")


def left_out(report):
    """`{id: rule}`."""
    return {id: rule for rule, named in report.examples.items() for id, _ in named}


def run(source, *, workers=1, **rules):
    return clean(source, CleaningConfig(**rules), workers=workers, progress=False)


@pytest.fixture
def mixed(tmp_path):
    """One example for each rule, and good ones."""
    base = picture(0)
    base.save(tmp_path / "base.png")
    base.save(tmp_path / "base.bmp")
    base.resize((90, 68)).save(tmp_path / "smaller.jpg", quality=60)
    picture(1).save(tmp_path / "other.png")
    picture(2, 4, 40).save(tmp_path / "tiny.png")  # and ten times as wide as high
    picture(3, 20, 100).save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = (tmp_path / "other.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    records = [
        record("base", ["base.png"]),
        record("broken", ["broken.png"]),
        record("missing", ["nowhere.png"]),
        record("tiny", ["tiny.png"]),
        record("wide", ["wide.png"]),
        record("short", ["other.png"], "?", "A."),
        record("long", ["other.png"], answer="on and on " * 30),
        record("bmp", ["base.bmp"]),
        record("asked again", ["base.bmp"], "And what is this?"),
        record("smaller", ["smaller.jpg"]),
        record("other", ["other.png"]),
        record("cut", ["cut.png"]),
        record("text"),
        record("text again"),
    ]
    return source_of(tmp_path, records)


EVERYTHING = {
    "min_image_side": 8,
    "max_aspect_ratio": 4.0,
    "min_text_chars": 6,
    "max_text_chars": 200,
    "drop_unreadable": "decode",
    "drop_exact_duplicates": True,
    "near_duplicate_distance": 6,
}
EXPECTED = {
    "broken": "unreadable",
    "missing": "unreadable",
    "cut": "unreadable",
    "tiny": "min_image_side",
    "wide": "max_aspect_ratio",
    "short": "min_text_chars",
    "long": "max_text_chars",
    "bmp": "exact_duplicate",
    "text again": "exact_duplicate",
    "asked again": "near_duplicate",
    "smaller": "near_duplicate",
}


def test_by_default_only_unreadable_headers_are_left_out(mixed):
    report = run(mixed)
    assert left_out(report) == {"broken": "unreadable", "missing": "unreadable"}
    reasons = dict(report.examples["unreadable"])
    assert "broken.png" in reasons["broken"]
    assert "nowhere.png: no such file" in reasons["missing"]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"min_image_side": 5}, {"tiny"}),
        ({"min_image_side": 4}, set()),
        ({"max_aspect_ratio": 5.0}, {"tiny"}),  # the wide one is just five times as wide
        ({"max_aspect_ratio": 4.9}, {"tiny", "wide"}),
        ({"min_text_chars": 4}, {"short"}),
        ({"min_text_chars": 3}, set()),
        ({"max_text_chars": 200}, {"long"}),
        ({"max_text_chars": 310}, set()),  # the answer's last blank does not count
        ({"max_text_chars": 309}, {"long"}),
        ({"drop_unreadable": "decode"}, {"cut"}),
        # The cut file is found broken when it is compared with the one that it was cut from.
        ({"drop_exact_duplicates": True}, {"bmp", "text again", "cut"}),
        (
            {"near_duplicate_distance": 6, "max_text_chars": 200, "min_text_chars": 6},
            {"short", "long", "bmp", "asked again", "smaller", "cut"},
        ),
    ],
)
def test_each_rule_alone(mixed, rules, expected):
    assert set(left_out(run(mixed, **rules))) == expected | {"broken", "missing"}


def test_all_rules_count_each_example_once_and_name_it(mixed):
    report = run(mixed, **EVERYTHING)
    assert left_out(report) == EXPECTED
    assert list(report.counts) == list(RULES)
    assert report.counts == {rule: list(EXPECTED.values()).count(rule) for rule in RULES}
    assert sum(report.counts.values()) + len(report.kept) == len(mixed)
    assert [mixed.id(int(i)) for i in report.kept] == ["base", "other", "text"]
    assert report.kept.dtype == np.int64
    order = [mixed.id(i) for i in range(len(mixed))]
    for named in report.examples.values():
        assert [id for id, _ in named] == sorted((id for id, _ in named), key=order.index)
    reasons = {id: reason for named in report.examples.values() for id, reason in named}
    assert "tiny.png: 4×40 pixels, shorter side under 8" in reasons["tiny"]
    assert "wide.png: 20×100 pixels, longer side over 4 times" in reasons["wide"]
    assert reasons["short"] == "3 characters of text, under 6"
    assert reasons["long"] == "310 characters of text, over 200"
    assert reasons["bmp"] == "same texts and pixels as example base"
    assert reasons["asked again"] == "looks like example base: 0 of 64 bits differ"
    assert reasons["smaller"].startswith("looks like example base")
    assert "cut.png: cannot be decoded" in reasons["cut"]


def test_the_first_rule_in_order_takes_an_example(mixed):
    rules = dict(EVERYTHING)
    # Tiny breaks two rules: without the first, the second takes it.
    assert left_out(run(mixed, **rules | {"min_image_side": 0}))["tiny"] == "max_aspect_ratio"
    # Without exact duplicates, the BMP is a near one; the texts alone are none.
    found = left_out(run(mixed, **rules | {"drop_exact_duplicates": False}))
    assert found["bmp"] == "near_duplicate"
    assert "text again" not in found
    # A broken body comes before a small side only where bodies are looked at first.
    small = {"min_image_side": 1000}
    assert left_out(run(mixed, **rules | small))["cut"] == "unreadable"
    found = left_out(run(mixed, **rules | small | {"drop_unreadable": "header"}))
    assert found["cut"] == "min_image_side"


def test_twins_that_break_an_earlier_rule_are_no_duplicates(tmp_path):
    picture(0, 4, 8).save(tmp_path / "tiny.png")
    source = source_of(tmp_path, [record("a", ["tiny.png"]), record("b", ["tiny.png"])])
    found = left_out(run(source, **EVERYTHING))
    assert found == {"a": "min_image_side", "b": "min_image_side"}
    assert left_out(run(source, **EVERYTHING | {"min_image_side": 0})) == {"b": "exact_duplicate"}


def test_a_left_out_example_makes_no_other_a_duplicate(tmp_path):
    picture(0).save(tmp_path / "a.png")
    records = [
        record("long", ["a.png"], answer="on and on " * 30),
        record("kept", ["a.png"]),
        record("twin", ["a.png"]),
    ]
    source = source_of(tmp_path, records)
    rules = {"max_text_chars": 200, "near_duplicate_distance": 0}
    found = left_out(run(source, **rules))
    assert found == {"long": "max_text_chars", "twin": "near_duplicate"}
    found = left_out(run(source, **rules, drop_exact_duplicates=True))
    assert found == {"long": "max_text_chars", "twin": "exact_duplicate"}


def test_exact_duplicates_have_the_same_texts_pixels_and_order(tmp_path):
    a, b = picture(0), picture(1)
    a.save(tmp_path / "a.png")
    a.save(tmp_path / "a.bmp")
    b.save(tmp_path / "b.png")
    pixel = np.array(a)
    pixel[5, 5, 0] ^= 1
    Image.fromarray(pixel).save(tmp_path / "pixel.png")
    trained = record("trained", ["a.png"])
    trained["conversations"] = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "human", "value": "A picture of soft shapes."},
    ]
    records = [
        record("a", ["a.png"]),
        record("another answer", ["a.png"], answer="Nothing."),
        record("one pixel", ["pixel.png"]),
        trained,
        record("ab", ["a.png", "b.png"]),
        record("ba", ["b.png", "a.png"]),
        record("ab again", ["a.bmp", "b.png"]),
    ]
    found = left_out(run(source_of(tmp_path, records), drop_exact_duplicates=True))
    assert found == {"ab again": "exact_duplicate"}


def test_near_duplicates_match_every_image_in_order(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        picture(seed).save(tmp_path / f"{name}.png")
        picture(seed, 60, 80).save(tmp_path / f"{name}.jpg", quality=70)
    records = [
        record("a", ["a.png"]),
        record("ab", ["a.png", "b.png"]),  # as many images is asked too
        record("ba", ["b.jpg", "a.jpg"]),
        record("ac", ["a.jpg", "c.jpg"]),
        record("ab again", ["a.jpg", "b.jpg"]),
        record("text"),
        record("text again"),
    ]
    found = left_out(run(source_of(tmp_path, records), near_duplicate_distance=6))
    assert found == {"ab again": "near_duplicate"}


def test_files_of_the_same_bytes_are_decoded_once(mixed, monkeypatch):
    decoded = []
    decode = example.Image.decode
    monkeypatch.setattr(
        example.Image, "decode", lambda self: decoded.append(self.name) or decode(self)
    )
    run(mixed, drop_unreadable="decode")
    names = sorted(name.rpartition("/")[2] for name in decoded)
    assert names == sorted(
        ["base.png", "base.bmp", "smaller.jpg", "other.png", "tiny.png", "wide.png", "cut.png"]
    )
    decoded.clear()
    run(mixed, drop_exact_duplicates=True)
    # Only where texts and sizes agree: base and bmp, other and cut.
    names = sorted(name.rpartition("/")[2] for name in decoded)
    assert names == ["base.bmp", "base.png", "cut.png", "other.png"]


def test_workers_change_nothing(tmp_path):
    path = write_llava(tmp_path, 60)
    for i in (3, 30):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no image")
    for i in (7, 41):
        Image.open(tmp_path / "images" / f"{i}.png").save(tmp_path / "images" / f"{i}.webp")
        (tmp_path / "images" / f"{i}.webp").replace(tmp_path / "images" / f"{i}.png")
    rules = EVERYTHING | {
        "min_image_side": 12,
        "max_aspect_ratio": 2.0,
        "near_duplicate_distance": 12,
    }
    one = run(LlavaSource(path), **rules)
    two = run(LlavaSource(path), **rules, workers=2)
    assert one.counts["unreadable"] == 2 and one.counts["near_duplicate"] > 2
    assert one.examples == two.examples
    np.testing.assert_array_equal(one.kept, two.kept)


def greedy(hashes, distance):
    """What `near_matches` says it finds, by comparing all with all."""
    matches = []
    for at, own in enumerate(hashes):
        near = (
            j
            for j in range(at)
            if matches[j] < 0
            and own
            and len(hashes[j]) == len(own)
            and all((a ^ b).bit_count() <= distance for a, b in zip(hashes[j], own, strict=True))
        )
        matches.append(next(near, -1))
    return matches


@pytest.mark.parametrize("distance", [0, 1, 3, 7, 16, 30])
def test_near_matches_are_those_of_brute_force(distance):
    rng = np.random.default_rng(distance)

    def flipped(hash, bits):
        for bit in rng.choice(64, bits, replace=False):
            hash ^= 1 << int(bit)
        return hash

    hashes = []
    for _ in range(300):
        drawn = rng.integers(3)
        if drawn == 0 or not hashes:  # some have no image, some two
            hashes.append(
                tuple(int(h) for h in rng.integers(0, 2**64, rng.choice([0, 1, 1, 2]), np.uint64))
            )
        else:  # just inside the distance, or just outside
            old = hashes[rng.integers(len(hashes))]
            hashes.append(tuple(flipped(h, distance + int(rng.integers(2))) for h in old))
    matches = near_matches(hashes, distance)
    assert matches.tolist() == greedy(hashes, distance)
    assert 0 < (matches >= 0).sum() < len(hashes)


def test_a_chain_does_not_pull_in_its_far_end():
    assert near_matches([(0b0,), (0b11,), (0b1111,)], 2).tolist() == [-1, 0, -1]


def test_a_cleaned_source_is_a_source_of_the_kept(mixed):
    report = run(mixed, **EVERYTHING)
    view = CleanedSource(mixed, report.kept)
    assert isinstance(view, Source)
    assert len(view) == 3
    assert [view.id(i) for i in range(3)] == ["base", "other", "text"]
    assert [view[i] for i in range(3)] == [mixed[int(i)] for i in report.kept]
    with pytest.raises(IndexError):
        view[3]
    told = CleanedSource(mixed, report.kept, report)
    assert [id for id, _ in told.unreadable] == ["broken", "missing", "cut"]
    assert told.settings["max_text_chars"] == 200
    other = pickle.loads(pickle.dumps(told))  # as a worker process gets it
    assert other[2] == view[2] and other.report is None
    assert list(view.texts()) == ["What is it?", "A picture of soft shapes."] * 3
    assert view.largest_side() == 128
    assert CleanedSource(mixed, report.kept[2:]).largest_side() == 1


def test_a_cleaned_source_with_all_has_the_texts_of_its_source(llava_json):
    source = LlavaSource(llava_json)
    view = CleanedSource(source, np.arange(len(source)))
    assert list(view.texts()) == list(source.texts())
    assert view.largest_side() == source.largest_side()


def test_the_report_is_written_whole(mixed, tmp_path):
    report = run(mixed, **EVERYTHING)
    path = tmp_path / "bad_examples.jsonl"
    path.write_text("of an older run\n")
    report.write(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["id"]: line["rule"] for line in lines} == EXPECTED
    assert all(set(line) == {"id", "rule", "reason"} and line["reason"] for line in lines)
    assert not list(tmp_path.glob("*.partial*"))
    with pytest.raises(UserError, match="nowhere"):
        report.write(tmp_path / "nowhere" / "bad.jsonl")


def test_a_report_cut_short_leaves_the_older_file(mixed, tmp_path, monkeypatch):
    report = run(mixed, **EVERYTHING)
    path = tmp_path / "bad_examples.jsonl"
    path.write_text("of an older run\n")
    replace = type(path).replace

    def full(self, target):
        if self.stat().st_size:  # all was written beside it
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(UserError, match=r"bad_examples\.jsonl: cannot be written \(No space left"):
        report.write(path)
    assert path.read_text() == "of an older run\n"
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"min_image_side": -1}, "min_image_side=-1"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio=0.5"),
        ({"max_aspect_ratio": -2.0}, "max_aspect_ratio=-2.0"),
        ({"max_aspect_ratio": float("nan")}, "max_aspect_ratio=nan"),
        ({"max_aspect_ratio": float("inf")}, "max_aspect_ratio=inf"),
        ({"min_text_chars": -3}, "min_text_chars=-3"),
        ({"max_text_chars": -3}, "max_text_chars=-3"),
        ({"min_text_chars": 9, "max_text_chars": 8}, "max_text_chars=8 is less than"),
        ({"near_duplicate_distance": -2}, "near_duplicate_distance=-2"),
        ({"near_duplicate_distance": 17}, "near_duplicate_distance=17"),
    ],
)
def test_values_that_mean_nothing_are_told_in_one_line(mixed, rules, told):
    with pytest.raises(UserError) as error:
        run(mixed, **rules)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_values_at_their_limits_are_taken():
    limits = {"max_aspect_ratio": 1.0, "min_text_chars": 8, "max_text_chars": 8}
    CleaningConfig(**limits, near_duplicate_distance=16).check()
    CleaningConfig(min_text_chars=8).check()  # no largest count


def test_near_duplicates_without_imagehash_name_the_extra(mixed, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(UserError, match=r"pip install 'fuyu-jax\[cleaning\]'"):
        run(mixed, near_duplicate_distance=2)
    assert run(mixed, drop_exact_duplicates=True).counts["exact_duplicate"] == 2


def test_an_error_of_the_source_is_not_taken_for_a_bad_image(mixed):
    class Odd(LlavaSource):
        def __getitem__(self, index):
            raise KeyError("odd")

    for workers in (1, 2):
        with pytest.raises(KeyError, match="odd"):
            run(Odd(mixed.path), workers=workers)


def flags_of(rules):
    return [f"--{name}={value}" for name, value in rules.items()]


def test_the_program_prints_counts_and_names_examples(mixed, tmp_path):
    out = tmp_path / "bad_examples.jsonl"
    command = [sys.executable, "-m", "fuyu_jax.data.cleaning", f"--llava={mixed.path}"]
    command += [*flags_of(EVERYTHING), f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    counts = {rule: list(EXPECTED.values()).count(rule) for rule in RULES}
    assert told == {"examples": 14, "kept": 3, "counts": counts, "out": str(out)}
    assert len(out.read_text().splitlines()) == len(EXPECTED)

    done = subprocess.run([*command, "--min_image_side=-4"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: min_image_side=-4: give 1 or more, or 0 for off"]


def test_the_programs_flags_are_the_configs_fields(mixed, tmp_path, capsys):
    (tmp_path / "moved").mkdir()
    path = mixed.path.replace(tmp_path / "moved" / "set.json")
    out = tmp_path / "bad.jsonl"
    base = [f"--llava={path}", f"--image_dir={tmp_path}", f"--out={out}"]
    for given in (["--drop_exact_duplicates"], ["--drop_exact_duplicates=true"]):
        program.main([*base, *given])
        assert json.loads(capsys.readouterr().out)["counts"]["exact_duplicate"] == 2
    program.main([*base, "--drop_exact_duplicates=false"])
    assert json.loads(capsys.readouterr().out)["counts"]["exact_duplicate"] == 0
    flags = {a.dest for a in program._flags()._actions}
    assert {f.name for f in dataclasses.fields(CleaningConfig)} <= flags


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--min_image_sides=3"], 'did you mean "--min_image_side"'),
        (["--min_image_side=x"], "min_image_side"),
        (["--drop_exact_duplicates=maybe"], "drop_exact_duplicates"),
        (["--drop_unreadable=body"], "drop_unreadable"),
        (["--config.min_image_side=3"], "--RULE=VALUE"),
        (["--out=/nowhere/at/all.jsonl"], "no folder /nowhere/at"),
        (["--workers=-1"], "workers=-1"),
    ],
)
def test_wrong_flags_are_told_in_one_line(mixed, tmp_path, flags, told):
    base = [f"--llava={mixed.path}", f"--out={tmp_path / 'bad.jsonl'}"]
    with pytest.raises(UserError) as error:
        program.main([*base, *flags])
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bad.jsonl").exists()
