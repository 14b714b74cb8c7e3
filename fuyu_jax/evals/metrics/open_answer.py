"""MMMU's open questions: is the expected number or text in what the answer comes down to?"""

import re
from collections.abc import Sequence

# A line's claim begins behind these; "=" counts in the last line alone.
_CLAIMS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NOTHING = frozenset(":,.!?;'")
# With a decimal point, in groups of three, or with an exponent. A number that a comma and more
# follow is no number by itself.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d)(?![,\d])"),
)

Value = float | str


def values_of(text: str) -> list[Value]:
    """A number rounded to two places, or a lower-case text; one letter only with a space beside
    it, before or behind, so that not every word with the letter matches."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]


def claims(text: str) -> list[str]:
    """What each line says last and shortest behind a word such as "is" or "therefore"; the whole
    answer if there is none."""
    whole = text.strip().strip(".").lower()
    lines = whole.split("\n")
    found = []
    for at, line in enumerate(lines):
        marks = (*_CLAIMS, "=") if at == len(lines) - 1 else _CLAIMS
        said = [line.split(mark)[-1].strip() for mark in marks if mark in line]
        if said and (shortest := min(said, key=len)) not in _NOTHING:
            found.append(shortest)
    return found or [whole]


def read(text: str) -> list[Value]:
    """All that an answer may mean: its claims, and the numbers in them."""
    said = claims(text)
    numbers = [n for claim in said for pattern in _NUMBERS for n in pattern.findall(claim)]
    return [value for part in (*said, *numbers) for value in values_of(part)]


def open_right(text: str, answers: Sequence[str]) -> bool:
    """Whether an expected text stands in a claim, or an expected number is among the numbers."""
    expected = [value for answer in answers for value in values_of(answer)]
    for found in read(text):
        if isinstance(found, str):
            if any(isinstance(value, str) and value in found for value in expected):
                return True
        elif found in expected:
            return True
    return False
