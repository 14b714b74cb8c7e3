"""How the demo set speaks: questions, answers and the ways to name an object."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence

from fuyu_jax.data.demo.scenes import COLOURS, SHAPES, Pair, Scene, Thing


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question about an image and its only right answer."""

    family: str
    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Mention:
    """A way to speak of an object: by colour, by shape, by both, or by neither."""

    colour: str = ""
    shape: str = ""

    def matches(self, colour: str, shape: str) -> bool:
        return self.colour in ("", colour) and self.shape in ("", shape)

    def count(self, pairs: Sequence[Pair]) -> int:
        return sum(self.matches(*pair) for pair in pairs)

    def __str__(self) -> str:
        return f"{self.colour} {self.shape or 'object'}".strip()

    @property
    def plural(self) -> str:
        return f"{self}es" if self.shape == "cross" else f"{self}s"

    @property
    def indefinite(self) -> str:
        return f"{'an' if str(self)[0] in 'aeiou' else 'a'} {self}"


# Ways to speak of an object by where it stands; each side's axis, and whether it comes first there.
ONLY = ""  # "the object", where there is one
SIDES = {
    "leftmost": ("x", True),
    "rightmost": ("x", False),
    "highest": ("y", True),
    "lowest": ("y", False),
}
PLACES = (ONLY, ONLY, *SIDES)

# How to ask whether something comes before something else along an axis.
ORDERS = {"x": "left of", "y": "above"}

# Ways to make the mention of a pair: by both, by colour, by shape.
STYLES: tuple[Callable[[str, str], Mention], ...] = (
    lambda colour, shape: Mention(colour, shape),
    lambda colour, shape: Mention(colour=colour),
    lambda colour, shape: Mention(shape=shape),
)
BY_COLOUR = STYLES[:2]  # the colour alone tells which is meant


def caption_facts(text: str) -> Counter[str]:
    """What a caption claims: each "colour shape" and "word ..." in it, with how often."""
    pair = rf"\b(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})\b"
    return Counter(re.findall(rf"{pair}|\bword \w+\b", text.lower()))


def ask_colour(mention: Mention | str, answer: str) -> Turn:
    return Turn("colour", f"What colour is the {mention}?", answer)


def ask_shape(mention: Mention, answer: str) -> Turn:
    return Turn("shape", f"What shape is the {mention}?", answer)


def ask_count(mention: Mention, answer: int) -> Turn:
    return Turn("count", f"How many {mention.plural} are there?", str(answer))


def ask_relation(axis: str, first: Mention, second: Mention, answer: bool) -> Turn:
    return _yes_or_no("relation", f"Is the {first} {ORDERS[axis]} the {second}?", answer)


def ask_place(axis: str, mention: Mention, answer: bool) -> Turn:
    return _yes_or_no("place", f"Is the {mention} {ORDERS[axis]} the middle?", answer)


def ask_existence(mention: Mention, answer: bool) -> Turn:
    return _yes_or_no("existence", f"Is there {mention.indefinite}?", answer)


def _yes_or_no(family: str, question: str, answer: bool) -> Turn:
    return Turn(family, question, "yes" if answer else "no")


def ask_word(word: str) -> Turn:
    return Turn("word", "What does the text say?", word)


def ask_box(mention: Mention, thing: Thing) -> Turn:
    top, left, bottom, right = thing.box
    answer = f"<box>{top}, {left}, {bottom}, {right}</box>"
    return Turn("box", f"Where is the {mention}?", answer)


def ask_caption(scene: Scene) -> Turn:
    shapes = sorted(scene.shapes, key=lambda t: (t.box[1], t.box[0]))
    facts = [Mention(t.colour, t.kind).indefinite for t in shapes]
    if scene.word:
        facts.append(f"the word {scene.word}")
    text = facts[0] if len(facts) == 1 else f"{', '.join(facts[:-1])} and {facts[-1]}"
    return Turn("caption", "Describe the image.", f"{text[0].upper()}{text[1:]}.")
