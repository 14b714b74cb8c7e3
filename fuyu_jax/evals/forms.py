"""What a task needs of a record, so that another task's answers are told from the start."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuyu_jax.data.demo.questions import COMPOSITIONAL_FAMILIES, FAMILIES
from fuyu_jax.evals.metrics.text import Counted
from fuyu_jax.evals.records import Record

# What is given to a metric: a text; a text or numbers; a log-probability for each choice; a
# document's.
KINDS = ("text", "place", "choices", "document")
FEWEST_PEOPLE = 4  # with three others who agree an answer is worth 1


def _ungrouped(record: Record) -> str:
    return ""


def _no_group_rule(group: Sequence[Record]) -> str:
    return ""


@dataclass(frozen=True)
class Form:
    """A form of records, and of what is answered to them.

    kind: see `KINDS`.
    misfit: why a record is not of this form, as what follows the task's name; "" if it is.
    group: the group a record belongs to; "" for none.
    misfit_of_group: the same for a group's records.
    """

    kind: str
    misfit: Callable[[Record], str]
    group: Callable[[Record], str] = _ungrouped
    misfit_of_group: Callable[[Sequence[Record]], str] = _no_group_rule

    def misfit_of_prediction(self, record: Record) -> str:
        """Why what was answered is not of this form, "" if it is."""
        if self.kind in ("text", "place"):
            if record.prediction is None:
                return 'needs "prediction"'
            if self.kind == "text" and not isinstance(record.prediction, str):
                return 'needs a text as "prediction", not numbers'
            return ""
        if record.logprobs is None:
            return 'needs "logprobs"' + (", one a choice" if self.kind == "choices" else ": [sum]")
        wanted = len(record.choices) if self.kind == "choices" else 1
        if len(record.logprobs) != wanted:
            return f'needs {wanted} in "logprobs", not {len(record.logprobs)}'
        if self.kind == "document" and not record.tokens:
            return 'needs "tokens", how many "logprobs" is the sum of'
        return ""

    def prediction(self, record: Record) -> Any:
        """What was answered, as the metric takes it."""
        if self.kind in ("text", "place"):
            return record.prediction
        assert record.logprobs is not None
        return (
            Counted(record.logprobs[0], record.tokens)
            if self.kind == "document"
            else (record.logprobs)
        )

    def groups(self, records: Sequence[Record]) -> Mapping[str, list[Record]]:
        """Records by group; nothing where the form has none."""
        found: dict[str, list[Record]] = {}
        for record in records:
            if group := self.group(record):
                found.setdefault(group, []).append(record)
        return found


# --- What is asked of a record ---


def _short_answers(record: Record) -> str:
    if not record.answers:
        return 'needs "answers"'
    if record.choices:
        return 'takes no "choices": they are for tasks such as multiple_choice'
    if record.boxes:
        return 'takes no "boxes": they are for tasks such as refcoco'
    return ""


def _people(record: Record) -> str:
    if why := _short_answers(record):
        return why
    if len(record.answers) < FEWEST_PEOPLE:
        return (
            f"needs several people's answers (ten; {FEWEST_PEOPLE} at least), "
            f"not {len(record.answers)}; exact_match and anls take one"
        )
    return ""


def _yes_no(record: Record) -> str:
    if why := _short_answers(record):
        return why
    if len(record.answers) != 1 or record.answers[0].lower() not in ("yes", "no"):
        shown = ", ".join(record.answers[:3])
        return f'needs one answer, yes or no, not "{shown}"'
    return ""


def _choices(record: Record) -> str:
    return "" if record.choices else 'needs "choices" and which one is right in "answers"'


def _letters(record: Record) -> str:
    if len(record.choices) > 26:
        return f"asks by letter, and {len(record.choices)} choices are more than there are letters"
    return _choices(record)


def _choices_or_answers(record: Record) -> str:
    if record.choices:
        return _letters(record)
    return "" if record.answers else 'needs "answers"'


def _rotation(record: Record) -> str:
    if why := _letters(record):
        return why
    if not _rotation_group(record):
        return 'needs "group", or ids that are numbers (question + 1,000,000 × rotation)'
    return ""


def _rotation_group(record: Record) -> str:
    return record.group or (str(int(record.id) % 1_000_000) if record.id.isdecimal() else "")


def _image_pair(record: Record) -> str:
    if why := _yes_no(record):
        return why
    return "" if _image_group(record) else 'needs "group" or "images": its questions go by image'


def _image_group(record: Record) -> str:
    """Images of several subtasks may have one name."""
    name = record.group or (str(record.images[0]) if record.images else "")
    return name and f"{record.subset}/{name}"


def _two_questions(group: Sequence[Record]) -> str:
    if len(group) == 2:
        return ""
    return f'an image has two questions, and "{_image_group(group[0])}" has {len(group)}'


def _caption_pair(record: Record) -> str:
    if why := _choices(record):
        return why
    if len(record.choices) != 2:
        return f"needs two captions as choices, not {len(record.choices)}"
    return "" if record.group else 'needs "group": two records, an image each'


def _two_images(group: Sequence[Record]) -> str:
    name = group[0].group
    if len(group) != 2:
        return f'a group has two records, and "{name}" has {len(group)}'
    first, second = group
    if sorted(first.choices) != sorted(second.choices):
        return f'the records of group "{name}" have not the same two captions'
    if first.choices[first.target] == second.choices[second.target]:
        return f'both records of group "{name}" have the same right caption'
    return ""


def _boxes(record: Record) -> str:
    return "" if record.boxes else 'needs "boxes"'


def _document(record: Record) -> str:
    if len(record.answers) != 1 or record.choices:
        return f'needs one document in "answers", not {len(record.answers)}'
    return ""


def _demo(families: Sequence[str]) -> Callable[[Record], str]:
    def misfit(record: Record) -> str:
        if len(record.answers) != 1 or record.choices:
            return 'needs one answer in "answers"'
        if record.subset not in families:
            return f'needs a family as "subset" ({", ".join(families)}), not "{record.subset}"'
        return ""

    return misfit


SHORT_ANSWERS = Form("text", _short_answers)
PEOPLE = Form("text", _people)
YES_NO = Form("text", _yes_no)
IMAGE_PAIRS = Form("text", _image_pair, _image_group, _two_questions)
LETTERED = Form("text", _letters)
LETTERED_OR_OPEN = Form("text", _choices_or_answers)
ROTATIONS = Form("text", _rotation, _rotation_group)
BOXES = Form("place", _boxes)
CHOICES = Form("choices", _choices)
LETTER_CHOICES = Form("choices", _letters)
CAPTION_PAIRS = Form("choices", _caption_pair, lambda record: record.group, _two_images)
DOCUMENT = Form("document", _document)
DEMO = Form("text", _demo(FAMILIES))
DEMO_COMPOSITIONAL = Form("text", _demo(COMPOSITIONAL_FAMILIES))
