"""VQA accuracy, ANLS, ChartQA, captions and yes/no, by hand; libraries as referees."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_jax.errors import UserError
from fuyu_jax.evals.metrics import captions, yesno
from fuyu_jax.evals.metrics.anls import anls, edit_distance, similarity
from fuyu_jax.evals.metrics.chartqa import number, relaxed
from fuyu_jax.evals.metrics.vqa import metric as vqa_metric
from fuyu_jax.evals.metrics.vqa import normalise, vqa_accuracy
from fuyu_jax.evals.records import Record


def record(id=0, answers=("x",), **more):
    return Record(str(id), id, more.pop("segments", ()), tuple(answers), **more)


def tokens(text):
    return text.split()


# --- VQA ---


def test_vqa_accuracy_by_hand():
    people = ["red"] * 4 + ["blue"] * 3 + ["green"] * 2 + ["teal"]
    # Four agree: whoever is left out, three or four others do.
    assert vqa_accuracy("red", people) == 1.0
    # Three agree: left out one of them, two do.
    assert vqa_accuracy("blue", people) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert vqa_accuracy("green", people) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert vqa_accuracy("teal", people) == pytest.approx(9 * 1 / 3 / 10)
    assert vqa_accuracy("pink", people) == 0.0


def test_vqa_official_normalises_only_where_people_differ():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 10, always=True) == 1.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two dogs.", "2 dogs"),
        ("a/b", "b"),  # a mark becomes a space, and "a" is an article
        ("red-blue", "red blue"),
        ("red - blue", "red blue"),
        ("1,000", "1000"),
        ("1,000 (about)", "1000 about"),
        ("x/y 1,000", "xy 1000"),  # a grouped number closes every mark's gap
        ("1.5", "1.5"),
        ("3.", "3"),
        ("u.s.", "us"),
        ("dont", "don't"),
        ("shouldnt've", "shouldn't've"),
        ("somebody'd", "somebodyd"),
        ("Im none", "im 0"),
        ("." * 40 + "a b", "........a b"),  # 32 periods go
        ("", ""),
    ],
)
def test_vqa_normalisation(text, normal):
    assert normalise(text) == normal


def test_textvqa_is_led_by_the_normalised_variant():
    records = [record(0, ["Stop"] * 10), record(1, ["go"] * 10)]
    for name, score in (("vqa_official", 0.0), ("vqa_normalised", 0.5)):
        units = vqa_metric(name).judge(records, ["stop", ""])
        assert sum(v.score for v in units.verdicts) / 2 == score
        found = vqa_metric(name).summarise(records, units)
        assert next(iter(found["scores"])) == name
        assert found["parse_failures"] == 1
        assert found["scores"][name] == score


# --- ANLS ---


def slow_distance(a, b):
    row = list(range(len(b) + 1))
    for at, x in enumerate(a, 1):
        new = [at]
        for n, y in enumerate(b, 1):
            new.append(min(row[n] + 1, new[-1] + 1, row[n - 1] + (x != y)))
        row = new
    return row[-1]


@given(st.text("abcé", max_size=70), st.text("abcé", max_size=12))
def test_edit_distance(a, b):
    assert edit_distance(a, b) == edit_distance(b, a) == slow_distance(a, b)


def test_anls_and_its_strict_variant_differ_at_a_half():
    assert similarity("ab", "abcd") == 0.5
    assert anls("ab", ["abcd"]) == 0.5
    assert anls("ab", ["abcd"], strict=True) == 0.0
    assert anls("abc", ["abcd"], strict=True) == 0.75
    assert anls("a", ["abcd"]) == 0.0
    assert anls("zzz", ["abcd", "ZZZ "]) == 1.0
    assert anls("", ["abcd"]) == 0.0


# --- ChartQA ---


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("24%", "24", False),
        ("24%", "0.24", True),
        ("24%", "25%", True),
        ("1,000", "1000", False),
        ("1,000", "1,000", True),
        ("0.0", "0", False),  # no 5 % of nothing: equal texts
        ("0", "0", True),
        ("-5", "5", False),
        ("Yes", "yes", True),
        ("2050", "2000", True),
        ("nan", "NaN", True),
        ("%", "%", True),
        ("", "3", False),
    ],
)
def test_chartqa(answer, expected, right):
    assert relaxed(answer, expected) is right


def test_chartqa_numbers():
    assert number("1e3") == 1000
    assert number("inf") is None
    assert number("3 cm") is None


# --- Captions ---


def test_bleu_by_hand():
    answer, people = tokens("the the the cat"), [tokens("the cat sat on the mat")]
    counts = captions.bleu_counts(answer, people)
    assert (counts["match1"], counts["total1"]) == (3, 4)  # "the" only as often as it stands there
    assert (counts["match2"], counts["total2"]) == (1, 3)
    assert (counts["length"], counts["closest"]) == (4, 6)
    found = captions.metric(captions.space_tokens)(
        [record(0, ["the cat sat on the mat"])], ["the the the cat"]
    )["scores"]
    assert found["BLEU_1"] == pytest.approx(3 / 4 * math.exp(1 - 6 / 4))
    assert found["BLEU_2"] == pytest.approx(math.sqrt(3 / 4 * 1 / 3) * math.exp(1 - 6 / 4))


def test_bleu_takes_the_closest_length_and_of_two_the_shorter():
    people = [tokens("a b"), tokens("a b c d")]
    assert captions.bleu_counts(tokens("a b c"), people)["closest"] == 2


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_longest_common_subsequence(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for n, y in enumerate(b, 1):
            new.append(row[n - 1] + 1 if x == y else max(row[n], new[-1]))
        row = new
    assert captions.longest_common(a, b) == row[-1]


def test_rouge_l_by_hand():
    # precision 3/4, recall 3/5, weighted by 1.2²
    value = captions.rouge_l(tokens("a b c x"), [tokens("a y b z c")])
    assert value == pytest.approx(2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75))
    assert captions.rouge_l([], [["a"]]) == 0.0


def test_cider_d_by_hand():
    # Two images, so that every n-gram of one image weighs log 2, and one in both nothing.
    people = [[tokens("a b")], [tokens("c d e")]]
    same = captions.cider_d([p[0] for p in people], people)
    assert same == pytest.approx([10 * 2 / 4, 10 * 3 / 4])  # orders without n-grams count as 0
    # One of two words and no pair: cosine 1/√2·… of order 1, and no difference of length.
    half, _ = captions.cider_d([tokens("a x"), tokens("c d e")], people)
    assert half == pytest.approx(10 * 0.5 / 4)
    # Twice as long: clipped, and less by exp(-Δ²/2σ²), the length counted in pairs.
    twice, _ = captions.cider_d([tokens("a b a b"), []], people)
    order_1 = (1 + 1) / (math.sqrt(8) * math.sqrt(2))
    order_2 = 1 / math.sqrt(4 + 1)
    assert twice == pytest.approx(10 * (order_1 + order_2) / 4 * math.exp(-(2**2) / 72))


def test_regex_tokens():
    assert captions.regex_tokens(["A man's dog, 2-3 times!"]) == [
        ["a", "man's", "dog", "2", "3", "times"]
    ]


def test_a_caption_without_words_is_a_failure():
    records = [record(0, ["a dog"]), record(1, ["a cat"])]
    found = captions.metric()(records, ["...", "a cat"])
    assert found["parse_failures"] == 1
    assert found["scores"]["ROUGE_L"] == 0.5


def test_ptb_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.tokenizer.ptbtokenizer", None)
    with pytest.raises(UserError, match="pip install"):
        captions.ptb_tokens(["a dog"])


# --- Referees, where they are installed ---


def random_captions(seed, count):
    rng = random.Random(seed)
    words = tokens("a dog cat runs on the red grass with two men and one ball")

    def text():
        return rng.choices(words, k=rng.randint(4, 12))

    people = [[text() for _ in range(3)] for _ in range(count)]
    # Mostly somebody's words, so that sequences of four match.
    answers = [[rng.choice(words) if rng.random() < 0.2 else w for w in p[0]] for p in people]
    return [" ".join(a) for a in answers], [[" ".join(t) for t in p] for p in people]


def test_bleu_against_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers, people = random_captions(1, 50)
    # Of two lengths as close sacrebleu takes the shorter too.
    referee = sacrebleu.corpus_bleu(
        answers, [list(p) for p in zip(*people, strict=True)], tokenize="none", smooth_method="none"
    )
    records = [record(n, p) for n, p in enumerate(people)]
    found = captions.metric(captions.space_tokens)(records, answers)["scores"]
    assert 100 * found["BLEU_4"] == pytest.approx(referee.score, rel=1e-6)


def test_longest_common_subsequence_against_rouge_score():
    rouge = pytest.importorskip("rouge_score.rouge_scorer")
    answers, people = random_captions(2, 50)
    scorer = rouge.RougeScorer(["rougeL"])
    for answer, others in zip(answers, people, strict=True):
        referee = scorer.score(others[0], answer)["rougeL"]
        a, b = answer.split(), others[0].split()
        assert captions.longest_common(b, a) / len(a) == pytest.approx(referee.precision)
        assert captions.longest_common(b, a) / len(b) == pytest.approx(referee.recall)


def test_cider_d_and_rouge_l_against_pycocoevalcap():
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    for seed in range(5):
        answers, people = random_captions(seed, 20)
        texts = dict(enumerate(people)), {n: [a] for n, a in enumerate(answers)}
        ours = captions.cider_d(
            captions.space_tokens(answers), [*map(captions.space_tokens, people)]
        )
        assert ours == pytest.approx(list(cider.compute_score(*texts)[1]), abs=1e-12)
        pairs = zip(captions.space_tokens(answers), people, strict=True)
        ours = [captions.rouge_l(a, captions.space_tokens(p)) for a, p in pairs]
        assert ours == pytest.approx(list(rouge.compute_score(*texts)[1]), abs=1e-12)


def test_pope_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(3)
    said = [rng.choice(("yes", "no")) for _ in range(200)]
    true = [rng.choice(("yes", "yes", "no")) for _ in range(200)]
    found = yesno.POPE([record(n, [t]) for n, t in enumerate(true)], said)["scores"]
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        true, said, pos_label="yes", average="binary"
    )
    assert found["precision"] == pytest.approx(precision)
    assert found["recall"] == pytest.approx(recall)
    assert found["f1"] == pytest.approx(f1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))


# --- Yes or no ---


@pytest.mark.parametrize(
    ("text", "answer", "read"),
    [
        ("Yes", "yes", True),
        ("No, there is none.", "no", True),
        ("There is not. Yes.", "no", True),
        ("Yes. No.", "yes", True),
        ("NO", "yes", True),  # the rule knows no, not and No
        ("", "yes", False),
        ("A dog", "yes", False),
    ],
)
def test_pope_answers(text, answer, read):
    assert yesno.pope_answer(text) == answer
    assert yesno.says_yes_or_no(text) is read


def test_pope_by_hand():
    true = ["yes", "yes", "yes", "no", "no"]
    said = ["Yes.", "no", "yes", "yes", "No"]
    found = yesno.POPE([record(n, [t]) for n, t in enumerate(true)], said)
    scores = found["scores"]
    assert scores["accuracy"] == 3 / 5
    assert scores["precision"] == scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["yes_share"] == 3 / 5
    never = yesno.POPE([record(0, ["yes"])], ["no"])["scores"]
    assert never["precision"] == never["f1"] == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes, it is", "yes"), ("no", "no"), (" NO.", "no"), ("A no", "no"), ("It is", ""), ("", "")],
)
def test_mme_answers(text, answer):
    assert yesno.mme_answer(text) == answer


def test_mme_by_hand():
    def two(image, subset):
        return [
            record(0, ["Yes"], group=image, subset=subset),
            record(1, ["No"], group=image, subset=subset),
        ]

    records = [*two("a", "count"), *two("b", "count"), *two("c", "code_reasoning")]
    found = yesno.MME(records, ["yes", "no", "yes", "yes", "yes", "maybe"])
    assert found["by_subset"]["count"]["scores"] == {
        "score": 75 + 50,
        "accuracy": 0.75,
        "accuracy_plus": 0.5,
    }
    assert found["by_subset"]["code_reasoning"]["scores"]["score"] == 50
    assert found["scores"]["total"] == 175
    assert found["scores"]["perception"] == 125
    assert found["scores"]["cognition"] == 50
    assert (found["n"], found["units"], found["parse_failures"]) == (6, 3, 1)
