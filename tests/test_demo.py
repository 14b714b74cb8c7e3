"""The demo set: the same every time, free of leaks, right by an independent look at the pixels."""

import hashlib
import io
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuyu_jax.data import demo
from fuyu_jax.data.demo import builder, questions, scenes

SIZES = {"train": 320, "validation": 64, "test": 160, "compositional": 70}


def _fake_tokenizer(texts, model_path, vocab_size, **_):
    lines = sorted(set(texts))
    Path(model_path).write_text("\n".join(lines))


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuyu_jax.tokenizer.train_sentencepiece", _fake_tokenizer, raising=False)
        yield demo.prepare(tmp_path_factory.mktemp("demo"), sizes=SIZES, seed=3)


@pytest.fixture(scope="module")
def splits(demo_dir):
    def record(row):
        pixels = np.asarray(Image.open(io.BytesIO(row["image"])))
        return {
            "id": row["id"].decode(),
            "bytes": row["image"],
            "pixels": pixels,
            "size": (int(row["height"]), int(row["width"])),
            "turns": [questions.Turn(*turn) for turn in demo.turns(row)],
            "things": scenes.things_from_json(row["objects"]),
        }

    return {name: [record(row) for row in demo.load(demo_dir, name)] for name in SIZES}


def _asked(split: str, count: int, seed: int = 0):
    """First turns with their scene, as a split of `count` records would hold them."""
    drafts = questions.drafts(split, seed, compositional=split == "compositional")
    for index, draft in zip(range(count), drafts, strict=False):
        scene, _ = scenes.draw(draft.contents, random.Random(f"{seed}/{split}/{index}"))
        yield draft.finish(scene), scene


def test_records_are_as_declared(splits):
    for name, records in splits.items():
        assert len(records) == SIZES[name]
        for record in records:
            assert record["bytes"].startswith(b"\x89PNG")
            assert record["pixels"].shape == (*record["size"], 3)
            assert all(scenes.MIN_SIDE <= side <= scenes.MAX_SIDE for side in record["size"])
            limit = builder.TRAIN_TURNS if name == "train" else 1
            assert 1 <= len(record["turns"]) <= limit
            asked = [turn.question for turn in record["turns"]]
            assert len(set(asked)) == len(asked)
    ids = [record["id"] for records in splits.values() for record in records]
    assert len(set(ids)) == len(ids)


def test_the_same_settings_give_the_same_bytes(demo_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("fuyu_jax.tokenizer.train_sentencepiece", _fake_tokenizer, raising=False)
    again = demo.prepare(tmp_path, sizes=SIZES, seed=3)
    assert again.name == demo_dir.name
    for split in SIZES:
        for one, other in zip(demo.load(demo_dir, split), demo.load(again, split), strict=True):
            assert one["image"] == other["image"]
            assert one["objects"] == other["objects"]
            assert list(demo.turns(one)) == list(demo.turns(other))
    assert demo.prepare(tmp_path, sizes=SIZES, seed=4).name != again.name


def test_prepare_runs_once_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    sizes = {"train": 8, "test": 8}

    def broken(*_, **__):
        raise RuntimeError("no tokenizer today")

    monkeypatch.setattr("fuyu_jax.tokenizer.train_sentencepiece", broken, raising=False)
    with pytest.raises(RuntimeError, match="today"):
        demo.prepare(tmp_path, sizes=sizes)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr("fuyu_jax.tokenizer.train_sentencepiece", _fake_tokenizer, raising=False)
    directory = demo.prepare(tmp_path, sizes=sizes)
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
    assert (directory / demo.TOKENIZER_FILE).is_file()
    monkeypatch.setattr("fuyu_jax.tokenizer.train_sentencepiece", broken)
    assert demo.prepare(tmp_path, sizes=sizes) == directory
    assert {p: p.stat().st_mtime_ns for p in directory.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [directory]


def test_an_unknown_split_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="unknown splits"):
        builder.ShapesAndWords(sizes={"dev": 3}, data_dir=tmp_path)


def test_no_image_is_in_two_splits(splits):
    digests = [
        hashlib.sha256(repr(record["size"]).encode() + record["pixels"].tobytes()).digest()
        for records in splits.values()
        for record in records
    ]
    assert len(set(digests)) == len(digests)


def test_held_out_pairs_stay_out(splits, demo_dir):
    names = {f"{colour} {shape}" for colour, shape in scenes.HELD_OUT}
    assert len(names) == len(scenes.COLOURS) == len(scenes.SHAPES)
    for split in ("train", "validation", "test"):
        for record in splits[split]:
            assert not names & {f"{t.colour} {t.kind}" for t in record["things"]}
            text = " ".join(f"{t.question} {t.answer}".lower() for t in record["turns"])
            assert not any(name in text for name in names)
    for record in splits["compositional"]:
        assert names & {f"{t.colour} {t.kind}" for t in record["things"]}
    tokenizer_text = (demo_dir / demo.TOKENIZER_FILE).read_text()
    assert not any(name in tokenizer_text for name in names)


def test_families_take_turns():
    for split, families in (
        ("test", questions.FAMILIES),
        ("compositional", questions.COMPOSITIONAL_FAMILIES),
    ):
        asked = [turn.family for turn, _ in _asked(split, 5 * len(families))]
        assert set(Counter(asked).values()) == {5}


def test_both_answers_are_equally_frequent_for_every_question():
    for split in ("test", "compositional"):
        answers = defaultdict(Counter)
        for turn, _ in _asked(split, 2000):
            if turn.family in ("relation", "existence"):
                answers[turn.question][turn.answer] += 1
        assert len(answers) > 100
        assert {answer for counts in answers.values() for answer in counts} == {"yes", "no"}
        # Twins follow each other, so at most the last question lacks its twin.
        uneven = [q for q, c in answers.items() if len(c) != 2 or len(set(c.values())) != 1]
        assert len(uneven) <= 2


def test_training_shows_one_object_alone_more_often(splits):
    share = {name: np.mean([len(r["things"]) == 1 for r in splits[name]]) for name in SIZES}
    # 0.4 of the drafts give way; of the rest 8 of 12 show one object as often as in the test split,
    # 3 (count) about as often, 1 (relation) never. Three standard errors of a difference of shares
    # of 320 and 160 are at most 0.14.
    expected = questions.SINGLES + (1 - questions.SINGLES) * share["test"] * 11 / 12
    assert abs(share["train"] - expected) < 0.14 < questions.SINGLES * (1 - share["test"])
    assert any(t.family == "place" for r in splits["train"] for t in r["turns"])
    assert not any(t.family == "place" for r in splits["test"] for t in r["turns"])


def test_a_model_without_pixels_stays_at_the_majority():
    """Classifiers on family, question and image size do no better than always the same answer."""
    ideal = {"colour": 1 / 6, "shape": 1 / 5, "count": 1 / 4, "relation": 1 / 2}
    ideal |= {"existence": 1 / 2, "word": 1 / len(scenes.WORDS), "box": 0.0, "caption": 0.0}
    by_family = defaultdict(list)
    for turn, scene in _asked("test", 16_000):
        by_family[turn.family].append((_blind_view(turn, scene), turn.answer))
    for family, rows in by_family.items():
        random.Random(0).shuffle(rows)
        half = len(rows) // 2
        assert _naive_bayes(rows[:half], rows[half:]) <= ideal[family] + 0.03, family
        assert _conditional_majority(rows[:half], rows[half:]) <= ideal[family] + 0.03, family


def _blind_view(turn, scene):
    """All that can be known without pixels, as discrete features; the first are the coarsest."""
    aspect = min(int(4 * scene.width / scene.height), 12)
    area = int(np.sqrt(scene.height * scene.width)) // 16
    words = [f"{i}:{word}" for i, word in enumerate(turn.question.split())]
    sizes = [f"h{scene.height // 16}", f"w{scene.width // 16}", f"a{aspect}", f"s{area}"]
    joint = [f"{turn.question}|{size}" for size in sizes]
    return [turn.question, *joint, *words, *sizes, f"{scene.height // 32}x{scene.width // 32}"]


def _conditional_majority(train, test) -> float:
    """Held-out accuracy of the most frequent answer to the question at the image's rough size."""
    counts = defaultdict(Counter)
    for features, answer in train:
        for key in ("", features[0], features[4]):
            counts[key][answer] += 1

    def guess(features):
        key = next(k for k in (features[4], features[0], "") if k in counts)
        return counts[key].most_common(1)[0][0]

    return float(np.mean([guess(features) == answer for features, answer in test]))


def _naive_bayes(train, test) -> float:
    """Held-out accuracy of naive Bayes on all features."""
    prior = Counter(answer for _, answer in train)
    seen = defaultdict(Counter)
    for features, answer in train:
        for feature in features:
            seen[feature][answer] += 1
    answers = [answer for answer, _ in prior.most_common(200)]
    base = np.array([prior[a] for a in answers], float)

    def guess(features):
        score = np.log(base)
        for feature in features:
            if feature in seen:
                found = np.array([seen[feature][a] for a in answers], float)
                score = score + np.log((found + 1) / (base + 2))
        return answers[int(np.argmax(score))]

    return float(np.mean([guess(features) == answer for features, answer in test]))


def test_answers_and_boxes_agree_with_the_pixels(splits):
    for records in splits.values():
        for record in records:
            for thing in record["things"]:
                if thing.kind == "word":
                    continue
                top, left, bottom, right = thing.box
                middle = record["pixels"][(top + bottom) // 2, (left + right) // 2].astype(int)
                nearest = min(
                    scenes.COLOURS, key=lambda c: np.abs(middle - scenes.COLOURS[c]).sum()
                )
                assert nearest == thing.colour
            _check_boxes(record)
            for turn in record["turns"]:
                assert _answer_by_looking(turn, record["things"], record["size"]) == turn.answer


def _check_boxes(record):
    """Boxes are inside, apart, and tight around what stands out from a nearly grey background."""
    pixels = record["pixels"].astype(int)
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    grey = np.median(pixels.mean(axis=2))
    left_over, covered = chroma > 60, np.zeros(chroma.shape, int)
    for thing in record["things"]:
        top, left, bottom, right = thing.box
        assert 0 <= top < bottom <= chroma.shape[0] and 0 <= left < right <= chroma.shape[1]
        covered[top:bottom, left:right] += 1
        part = (slice(top, bottom), slice(left, right))
        if thing.kind == "word":
            ink = np.abs(pixels.mean(axis=2)[part] - grey) > 80
        else:
            assert min(bottom - top, right - left) >= 8
            ink = chroma[part] > 60
        ys, xs = np.nonzero(ink)
        assert ys.min() <= 1 and xs.min() <= 1
        assert ys.max() >= bottom - top - 2 and xs.max() >= right - left - 2
        left_over[part] = False
    assert covered.max() <= 1
    assert not left_over.any()


def _answer_by_looking(turn, things, size):
    """The answer worked out anew from the question's words and the list of things."""
    shapes = [t for t in things if t.kind != "word"]

    def named(text):
        colour = next((c for c in scenes.COLOURS if c in text.split()), None)
        kind = next((s for s in scenes.SHAPES if s in text), None)
        return [t for t in shapes if colour in (None, t.colour) and kind in (None, t.kind)]

    def only(text):
        (thing,) = named(text)
        return thing

    text = turn.question.rstrip("?").lower()
    if turn.family == "colour":
        place = next((p for p in ("leftmost", "rightmost", "highest", "lowest") if p in text), "")
        if not place:
            (thing,) = shapes
            return thing.colour
        at = {"leftmost": 1, "rightmost": 3, "highest": 0, "lowest": 2}[place]
        side = [t.box[at] for t in shapes]
        best = min(side) if place in ("leftmost", "highest") else max(side)
        assert side.count(best) == 1
        return shapes[side.index(best)].colour
    if turn.family == "shape":
        return only(text).kind
    if turn.family == "count":
        return str(len(named(text)))
    if turn.family == "existence":
        return "yes" if named(text) else "no"
    if turn.family == "word":
        return next(t.word for t in things if t.kind == "word")
    if turn.family == "box":
        return "<box>{}, {}, {}, {}</box>".format(*only(text).box)
    if turn.family in ("relation", "place"):
        across = "left of" in text
        first, second = re.split("left of|above", text)
        near, far = (1, 3) if across else (0, 2)
        first = only(first).box
        if turn.family == "relation":
            second = only(second).box
            apart = first[far] <= second[near], second[far] <= first[near]
            assert sum(apart) == 1
        else:
            middle = size[1 if across else 0] / 2
            apart = (first[near] + first[far]) / 2 < middle, (first[near] + first[far]) / 2 > middle
            assert abs((first[near] + first[far]) / 2 - middle) >= 0.1 * 2 * middle
        return "yes" if apart[0] else "no"
    facts = Counter(f"{t.colour} {t.kind}" for t in shapes)
    facts.update(f"word {t.word}" for t in things if t.kind == "word")
    assert demo.caption_facts(turn.answer) == facts
    return turn.answer


def test_shapes_differ_even_when_small():
    for size in (scenes.MIN_SHAPE, scenes.MIN_SHAPE + 1, 16):
        for one in scenes.SHAPES:
            for other in scenes.SHAPES:
                if one < other:
                    pair = [scenes._shape_mask(s, size) for s in (one, other)]
                    rows, columns = np.max([m.shape for m in pair], axis=0)
                    full = [
                        np.pad(m, ((0, rows - m.shape[0]), (0, columns - m.shape[1]))) for m in pair
                    ]
                    assert np.abs(full[0] - full[1]).mean() > 0.08, (one, other, size)
