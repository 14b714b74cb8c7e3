"""Real predictions with published scores, each to its last printed digit."""

import json
import shutil
from pathlib import Path

import pytest

from fuyu_jax.evals.judge import iou
from fuyu_jax.evals.metrics.anls import METRIC as ANLS
from fuyu_jax.evals.metrics.anls import anls
from fuyu_jax.evals.metrics.captions import cider_d, metric, ptb_tokens, space_tokens
from fuyu_jax.evals.metrics.chartqa import METRIC as CHARTQA
from fuyu_jax.evals.metrics.grounding import inside, to_tlbr
from fuyu_jax.evals.metrics.open_answer import read
from fuyu_jax.evals.records import Record
from fuyu_jax.evals.tasks import TASKS, score_file

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "metrics"


def rows(name):
    path = DATA / name / "items.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def expected(name):
    path = DATA / name / "expected.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text(encoding="utf-8"))


def write(folder, lines):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def short(answers):
    return [Record(str(n), n, (), tuple(a)) for n, a in enumerate(answers)]


def test_chartqa(tmp_path):
    lines = [
        {"id": n, "answers": [r["answer"]], "subset": r["split"], "prediction": r["prediction"]}
        for n, r in enumerate(rows("chartqa_test_qwen25vl7b"))
    ]
    found = score_file(write(tmp_path, lines), ["chartqa"]).metrics["chartqa"]
    published = expected("chartqa_test_qwen25vl7b")
    for score in ("relaxed", "exact"):
        assert round(100 * found["scores"][score], 2) == published[score]["overall"]
        for subset in ("test_human", "test_augmented"):
            of_subset = found["by_subset"][subset]["scores"][score]
            assert round(100 * of_subset, 2) == published[score][subset]
    assert found["n"] == 2500
    assert 0.006 < found["stderr"]["relaxed"] < 0.007  # √(p(1-p)/n) is 0.00654


def test_captions_with_the_tokens_of_the_published_scores():
    items = rows("coco_caption_magic_1000")
    published = expected("coco_caption_magic_1000")["first_1000"]
    records = short([r["refs_ptb"] for r in items])
    found = metric(space_tokens)(records, [r["prediction_ptb"] for r in items])["scores"]
    for score, value in published.items():
        if score != "n":
            ours = {"CIDEr": "CIDEr", "ROUGE_L": "ROUGE_L"}.get(score, score.upper())
            assert found[ours] == pytest.approx(value, rel=1e-15), score
    by_image = cider_d(
        space_tokens([r["prediction_ptb"] for r in items]),
        [space_tokens(r["refs_ptb"]) for r in items],
    )
    assert [round(s, 6) for s in by_image] == [r["ref_cider"] for r in items]


def test_captions_without_java():
    items = rows("coco_caption_magic_1000")
    published = expected("coco_caption_magic_1000")["regex_tokenizer_first_1000"]
    records = short([r["refs"] for r in items])
    found = TASKS["caption"].score(records, [r["prediction"] for r in items])["scores"]
    assert found["CIDEr"] == pytest.approx(published["CIDEr"], rel=1e-15)
    assert found["BLEU_4"] == pytest.approx(published["Bleu_4"], rel=1e-15)


def test_captions_with_java():
    pytest.importorskip("pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("java is not installed")
    items = rows("coco_caption_magic_1000")
    texts = [t for r in items for t in (r["prediction"], *r["refs"])]
    published = [t for r in items for t in (r["prediction_ptb"], *r["refs_ptb"])]
    assert ptb_tokens(texts) == space_tokens(published)


def test_mmbench(tmp_path):
    lines = [
        {
            "id": r["index"],
            "choices": [f"option {n}" for n in range(r["n_options"])],
            "answers": [r["answer"]],
            "prediction": r["prediction"],
        }
        for r in rows("mmbench_dev_llava15_13b")
    ]
    found = score_file(write(tmp_path, lines), ["mmbench"]).metrics["mmbench"]
    published = expected("mmbench_dev_llava15_13b")
    scores = {name: 100 * value for name, value in found["scores"].items()}
    assert scores["circular"] == pytest.approx(published["circular_accuracy"], rel=1e-15)
    assert scores["vanilla"] == pytest.approx(published["vanilla_first_pass_accuracy"], rel=1e-15)
    assert scores["all_rows"] == pytest.approx(published["all_rows_accuracy"], rel=1e-15)
    assert round(scores["circular"], 1) == published["published_circular"]
    assert (found["n"], found["units"]) == (published["rows"], published["groups"])


def test_mmmu(tmp_path):
    items = rows("mmmu_val_qwen_vl")
    lines = []
    for r in items:
        answers = r["answer"] if isinstance(r["answer"], list) else [r["answer"]]
        if "index2ans" in r:  # an index: a choice may be called "A" too
            answers = [list(r["index2ans"]).index(r["answer"])]
        line = {"id": r["id"], "answers": answers, "prediction": r["response"]}
        line["subset"] = r["id"].split("_", 1)[1].rsplit("_", 1)[0]
        lines.append(
            line | ({"choices": list(r["index2ans"].values())} if "index2ans" in r else {})
        )
    scored = score_file(write(tmp_path, lines), ["mmmu"])
    found, published = scored.metrics["mmmu"], expected("mmmu_val_qwen_vl")
    assert found["scores"]["accuracy"] == published["accuracy_fallback_counted_wrong"]
    assert found["parse_failures"] == published["random_fallback_items"]
    assert len(found["by_subset"]) == 30
    choice, opened = (published["by_type"][t] for t in ("multiple-choice", "short-answer"))
    assert found["scores"]["accuracy_choice"] == choice["correct"] / choice["n"]
    assert found["scores"]["accuracy_open"] == opened["correct"] / opened["n"]
    for item, sample in zip(items, scored.samples["mmmu"], strict=True):
        if item["question_type"] == "short-answer":
            assert {str(v) for v in read(item["response"])} == {str(v) for v in item["ref_parsed"]}
            assert sample["score"] == item["ref_correct"]
        elif item["ref_random_fallback"]:
            assert sample["parse_failed"] and sample["score"] == 0
        else:
            assert sample["parsed"] == item["ref_parsed"]
            assert sample["score"] == item["ref_correct"]


def refcoco_lines(items, box):
    return [
        {
            "id": n,
            "boxes": [r["gt_box_xywh"]],
            "box_format": "xywh",
            "prediction": box(r),
        }
        for n, r in enumerate(items)
    ]


def test_refcoco(tmp_path):
    items, published = rows("refcoco_testA_boxes"), expected("refcoco_testA_boxes")
    for r in items:
        truth = to_tlbr(r["gt_box_xywh"], "xywh")
        boxes = [to_tlbr(box, "xywh") for box in r["det_boxes_xywh"]]
        assert [round(iou(b, truth), 6) for b in boxes] == r["ref_iou"]
    assert sum(len(r["det_boxes_xywh"]) for r in items) == published["n_boxes"]

    def best(r):
        return r["det_boxes_xywh"][max(range(len(r["ref_iou"])), key=r["ref_iou"].__getitem__)]

    path = write(tmp_path, refcoco_lines(items, best))
    found = score_file(path, ["refcoco"]).metrics["refcoco"]
    assert 100 * found["scores"]["accuracy_at_0.5"] == published["oracle_recall_at_0_5"]
    path = write(tmp_path, refcoco_lines(items, lambda r: r["det_boxes_xywh"][0]))
    scored = score_file(path, ["refcoco", "pointing"])
    found = scored.metrics["refcoco"]["scores"]
    assert 100 * found["accuracy_at_0.5"] == published["first_detection_acc_at_0_5"]
    # Published is the mean of the six places that are printed for each.
    printed = [round(s["score"], 6) for s in scored.samples["refcoco"]]
    assert round(sum(printed) / len(printed), 8) == published["mean_first_iou"]
    assert found["mean_iou"] == pytest.approx(published["mean_first_iou"], abs=1e-6)
    pointing = scored.metrics["pointing"]
    assert 100 * pointing["scores"]["accuracy"] == published["first_detection_center_pointing"]
    for item, sample in zip(items, scored.samples["pointing"], strict=True):
        assert bool(sample["score"]) == item["ref_first_center_in_gt"]
    box = (0.0, 0.0, 2.0, 2.0)
    assert inside((2.0, 0.0), box) and not inside((2.1, 0.0), box)


def test_pix2struct_cases():
    case = expected("tiny_published_cases")["pix2struct_metrics_test"]
    records, given = short(case["targets"]), case["predictions"]
    numbers = CHARTQA(records, given)["scores"]
    assert round(100 * numbers["relaxed"], 1) == case["expected"]["relaxed_accuracy"]
    assert round(100 * numbers["exact"], 1) == case["expected"]["exact_match"]
    assert round(100 * ANLS(records, given)["scores"]["anls"], 1) == case["expected"]["anls"]


def test_pix2struct_cider():
    case = expected("tiny_published_cases")["pix2struct_metrics_test"]

    def ptb(text):  # what the Penn Treebank tokenizer makes of these
        return text.lower().replace("%", " %").replace("n't", " n't")

    records = short([[ptb(t) for t in targets] for targets in case["targets"]])
    found = metric(space_tokens)(records, [ptb(t) for t in case["predictions"]])["scores"]
    assert round(100 * found["CIDEr"], 1) == case["expected"]["cider"]


def test_nlg_eval_cases():
    case = expected("tiny_published_cases")["nlg_eval_test"]
    found = metric(space_tokens)(short(case["refs"]), case["hyp"])["scores"]
    for score, value in case["expected"].items():
        ours = {"CIDEr": "CIDEr", "ROUGE_L": "ROUGE_L"}.get(score, score.upper())
        assert round(found[ours], case["places"]) == round(value, case["places"]), score
    again = case["recomputed_with_pycocoevalcap_1_2"]
    assert found["CIDEr"] == pytest.approx(again["CIDEr"], rel=1e-15)
    assert found["BLEU_4"] == pytest.approx(again["Bleu_4"], rel=1e-15)


def test_anls_cases():
    case = expected("tiny_published_cases")["anls_pkg_test"]
    for answer, value in case["cases"]:
        assert round(anls(answer, case["answers"]), 2) == value
    given = case["dataset_predictions"]
    found = ANLS(short([case["answers"]] * len(given)), given)["scores"]["anls"]
    assert round(found, 3) == case["dataset_mean"]
    assert [anls(a, case["answers"]) for a in given] == pytest.approx(case["recomputed"], rel=1e-15)
