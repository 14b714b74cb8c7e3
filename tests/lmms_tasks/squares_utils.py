"""What the two local tasks of lmms-eval take of a line."""

from PIL import Image


def visual(doc):
    with Image.open(doc["image"]) as image:
        return [image.convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def choices(doc):
    return doc["choices"]


def target(doc):
    return doc["choices"].index(doc["answer"])


def words(doc):
    return doc["answer"]


def results(doc, answers):
    return {"exact": float(answers[0] == doc["answer"])}


def mean(values):
    return sum(values) / len(values)


def next_round(
    doc,
    lmms_eval_specific_kwargs=None,
    previous_output=None,
    round_idx=None,
    previous_round_info=None,
):
    """The same question twice."""
    if round_idx is None:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    return visual(doc), doc["question"], False, previous_output, None


def both(doc, answers):
    (rounds,) = answers
    return {"exact": float(list(rounds) == [doc["answer"]] * 2)}
