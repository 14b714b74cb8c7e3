"""Questions whose answers are balanced given everything that can be known without the pixels.

The question and its answer are chosen first, from a deck in which every answer to a question
occurs equally often; a scene is then made in which that answer is right. Colours and shapes play
symmetric parts in a scene (the held-back pairs are one per colour and one per shape), so the
question's words give nothing away either.
"""

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from fuyu_jax.data.demo.scenes import (
    COLOURS,
    HELD_OUT,
    KNOWN,
    MAX_SHAPES,
    MAX_SHAPES_WITH_WORD,
    SHAPES,
    WORDS,
    Contents,
    Pair,
    Scene,
    Thing,
)

FAMILIES = ("colour", "shape", "count", "relation", "existence", "word", "box", "caption")
# A word has no colour and shape to combine anew.
COMPOSITIONAL_FAMILIES = tuple(f for f in FAMILIES if f != "word")
# How often a further turn of training is of a family: what can be told at a glance most often, the
# long answers, which would be most of what is learnt from, seldom.
_OFTEN = dict.fromkeys(("colour", "count", "relation", "existence"), 1.0)
_OFTEN |= {"shape": 0.5, "box": 0.25, "caption": 0.25, "word": 0.1}
MAX_COUNT = 3  # of one colour or one shape; of all objects it is MAX_SHAPES


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
_SIDES = {
    "leftmost": ("x", True),
    "rightmost": ("x", False),
    "highest": ("y", True),
    "lowest": ("y", False),
}
PLACES = (ONLY, ONLY, *_SIDES)

# Ways to make the mention of a pair: by both, by colour, by shape.
_STYLES: tuple[Callable[[str, str], Mention], ...] = (
    lambda colour, shape: Mention(colour, shape),
    lambda colour, shape: Mention(colour=colour),
    lambda colour, shape: Mention(shape=shape),
)
_BY_COLOUR = _STYLES[:2]  # the colour alone tells which is meant


@dataclasses.dataclass(frozen=True)
class Draft:
    """A scene's contents and the question it was made for; `finish` reads the answer off it."""

    contents: Contents
    family: str
    finish: Callable[[Scene], Turn]


def drafts(split: str, seed: int, compositional: bool) -> Iterator[Draft]:
    """An endless, deterministic run of drafts, one family after the other.

    Any run of consecutive drafts has the families equally often, and any two consecutive yes/no
    drafts of one family that share a question have one "yes" and one "no".
    """
    families = COMPOSITIONAL_FAMILIES if compositional else FAMILIES
    named = HELD_OUT if compositional else KNOWN
    decks = {f: _DECKS[f](random.Random(f"{seed}/{split}/{f}"), named) for f in families}
    while True:
        for family in families:
            yield next(decks[family])


def more_turns(scene: Scene, first: Turn, limit: int, rng: random.Random) -> list[Turn]:
    """Up to `limit` further questions about a known scene, each of another wording.

    Only pairs known in training are named. Yes and no are chosen before what is asked for.
    """
    pairs = [(t.colour, t.kind) for t in scene.shapes]
    pools = {family: list(_all_turns(family, scene, pairs, rng)) for family in FAMILIES}
    for pool in pools.values():
        rng.shuffle(pool)
    turns, asked = [], {first.question}
    while len(turns) < limit and any(pools.values()):
        order = [pool for family, pool in pools.items() if pool and rng.random() < _OFTEN[family]]
        rng.shuffle(order)
        for pool in order:
            turn = pool.pop()
            if turn.question not in asked and len(turns) < limit:
                asked.add(turn.question)
                turns.append(turn)
    return turns


def caption_facts(text: str) -> Counter[str]:
    """What a caption claims: each "colour shape" and "word ..." in it, with how often."""
    pair = rf"\b(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})\b"
    return Counter(re.findall(rf"{pair}|\bword \w+\b", text.lower()))


# --- wording ------------------------------------------------------------------------------------


def _ask_colour(mention: Mention | str, answer: str) -> Turn:
    return Turn("colour", f"What colour is the {mention}?", answer)


def _ask_shape(mention: Mention, answer: str) -> Turn:
    return Turn("shape", f"What shape is the {mention}?", answer)


def _ask_count(mention: Mention, answer: int) -> Turn:
    return Turn("count", f"How many {mention.plural} are there?", str(answer))


def _ask_relation(axis: str, first: Mention, second: Mention, answer: bool) -> Turn:
    words = "left of" if axis == "x" else "above"
    return Turn("relation", f"Is the {first} {words} the {second}?", "yes" if answer else "no")


def _ask_existence(mention: Mention, answer: bool) -> Turn:
    return Turn("existence", f"Is there {mention.indefinite}?", "yes" if answer else "no")


def _ask_word(word: str) -> Turn:
    return Turn("word", "What does the text say?", word)


def _ask_box(mention: Mention, thing: Thing) -> Turn:
    top, left, bottom, right = thing.box
    answer = f"<box>{top}, {left}, {bottom}, {right}</box>"
    return Turn("box", f"Where is the {mention}?", answer)


def _ask_caption(scene: Scene) -> Turn:
    shapes = sorted(scene.shapes, key=lambda t: (t.box[1], t.box[0]))
    facts = [Mention(t.colour, t.kind).indefinite for t in shapes]
    if scene.word:
        facts.append(f"the word {scene.word}")
    text = facts[0] if len(facts) == 1 else f"{', '.join(facts[:-1])} and {facts[-1]}"
    return Turn("caption", "Describe the image.", f"{text[0].upper()}{text[1:]}.")


# --- decks: the question first, then a scene for it -------------------------------------------


def _fill(
    rng: random.Random,
    number: int,
    required: Sequence[Pair] = (),
    accept: Callable[[Sequence[Pair]], bool] = lambda pairs: True,
) -> tuple[Pair, ...]:
    """`number` different pairs, the required ones first, until they are accepted."""
    rest = [pair for pair in KNOWN if pair not in required]
    while True:
        pairs = (*required, *rng.sample(rest, number - len(required)))
        if accept(pairs):
            return pairs


def _with_one(rng: random.Random, pair: Pair, mention: Mention) -> tuple[Pair, ...]:
    """The pair and some others, such that the mention can only mean the pair."""
    number = rng.randint(1, MAX_SHAPES)
    return _fill(rng, number, [pair], lambda pairs: mention.count(pairs) == 1)


def _shuffled(rng: random.Random, cards: Sequence) -> Iterator:
    """The cards in a new order each time round."""
    while True:
        yield from rng.sample(cards, len(cards))


def _twice(rng: random.Random, cards: Iterator) -> Iterator[tuple]:
    """Every card with both answers, one right after the other."""
    for card in cards:
        for answer in rng.sample((True, False), 2):
            yield card, answer


def _colour_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    """By place, not by shape: what is asked for is colour, and where it is."""
    for (colour, shape), place in zip(_shuffled(rng, named), _shuffled(rng, PLACES), strict=False):
        pair = (colour, shape)
        if place == ONLY:
            contents = Contents((pair,))
        else:
            other = rng.choice([p for p in KNOWN if p[0] != colour])
            axis, first = _SIDES[place]
            contents = Contents((pair, other), order=(axis, 0, 1) if first else (axis, 1, 0))
        turn = _ask_colour(f"{place} object".strip(), colour)
        yield Draft(contents, "colour", lambda scene, turn=turn: turn)


def _shape_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    for colour, shape in _shuffled(rng, named):
        mention = Mention(colour=colour)
        pairs = _with_one(rng, (colour, shape), mention)
        turn = _ask_shape(mention, shape)
        yield Draft(Contents(pairs), "shape", lambda scene, turn=turn: turn)


def _count_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    new = [pair for pair in named if pair in HELD_OUT]
    cards = [(Mention(), n) for n in range(1, MAX_SHAPES + 1)] * len(COLOURS)
    cards += [(Mention(colour=c), n) for c in COLOURS for n in range(MAX_COUNT + 1)]
    for mention, answer in _shuffled(rng, cards):
        number = answer if mention == Mention() else rng.randint(max(1, answer), MAX_SHAPES)
        # In the compositional split what is counted, or else one of the others, is a new pair.
        fit = [pair for pair in new if mention.matches(*pair) == (answer > 0)]
        required = [rng.choice(fit)] if fit else []
        pairs = _fill(rng, number, required, lambda pairs, m=mention, a=answer: m.count(pairs) == a)
        turn = _ask_count(mention, answer)
        yield Draft(Contents(pairs), "count", lambda scene, turn=turn: turn)


def _relation_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    def cards() -> Iterator[tuple[str, list[Pair], list[Mention]]]:
        while True:
            style = rng.choice(_BY_COLOUR)
            pairs = [rng.choice(named), rng.choice(KNOWN)]
            rng.shuffle(pairs)
            if pairs[0][0] != pairs[1][0] and pairs[0][1] != pairs[1][1]:
                yield rng.choice("xy"), pairs, [style(*pair) for pair in pairs]

    for (axis, asked, mentions), answer in _twice(rng, cards()):
        pairs = _fill(
            rng,
            rng.choice((2, 2, *range(3, MAX_SHAPES + 1))),
            asked,
            lambda pairs, ms=mentions: all(Mention(m.colour).count(pairs) == 1 for m in ms),
        )
        turn = _ask_relation(axis, *mentions, answer)
        order = (axis, 0, 1) if answer else (axis, 1, 0)
        yield Draft(Contents(pairs, order=order), "relation", lambda scene, turn=turn: turn)


def _existence_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    cards = [Mention(*pair) for pair in named]
    often = max(1, len(named) // len(COLOURS))  # colour as often as shape and pair together
    cards += [Mention(colour=c) for c in COLOURS] * often * 2
    cards += [Mention(shape=s) for s in SHAPES] * often
    for mention, answer in _twice(rng, _shuffled(rng, cards)):
        number = rng.randint(1, MAX_SHAPES)
        fit = [pair for pair in named if mention.matches(*pair)]
        if answer:
            pairs = _fill(rng, number, [rng.choice(fit)])
        else:
            # Half the absent pairs share the colour or the shape of something that is there.
            others = [pair for pair in named if pair not in fit]
            required = [rng.choice(others)]
            if mention.colour and mention.shape and rng.random() < 0.5:
                close = [p for p in KNOWN if (p[0] == mention.colour) != (p[1] == mention.shape)]
                both = [pair for pair in others if pair in close]
                required = [rng.choice(both)] if both else [*required, rng.choice(close)]
            number = max(number, len(required))
            pairs = _fill(rng, number, required, lambda pairs, m=mention: m.count(pairs) == 0)
        turn = _ask_existence(mention, answer)
        yield Draft(Contents(pairs), "existence", lambda scene, turn=turn: turn)


def _word_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    for word in _shuffled(rng, WORDS):
        pairs = _fill(rng, rng.randint(0, MAX_SHAPES_WITH_WORD))
        yield Draft(Contents(pairs, word), "word", lambda scene: _ask_word(scene.word))


def _box_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    for colour, shape in _shuffled(rng, named):
        mention = rng.choice(_STYLES)(colour, shape)
        pairs = _with_one(rng, (colour, shape), mention)
        yield Draft(Contents(pairs), "box", lambda scene, m=mention: _ask_box(m, scene.shapes[0]))


def _caption_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    for pair in _shuffled(rng, named):
        if rng.random() < 0.25:
            pairs = _fill(rng, rng.randint(1, MAX_SHAPES_WITH_WORD), [pair])
            contents = Contents(pairs, rng.choice(WORDS))
        else:
            contents = Contents(_fill(rng, rng.randint(1, MAX_SHAPES), [pair]))
        yield Draft(contents, "caption", _ask_caption)


_DECKS: dict[str, Callable[[random.Random, Sequence[Pair]], Iterator[Draft]]] = {
    "colour": _colour_deck,
    "shape": _shape_deck,
    "count": _count_deck,
    "relation": _relation_deck,
    "existence": _existence_deck,
    "word": _word_deck,
    "box": _box_deck,
    "caption": _caption_deck,
}


# --- further questions about a scene that is there already ------------------------------------


def _all_turns(
    family: str, scene: Scene, pairs: Sequence[Pair], rng: random.Random
) -> Iterator[Turn]:
    shapes = scene.shapes
    names = {m for pair in pairs for m in (Mention(pair[0]), Mention("", pair[1]), Mention(*pair))}
    unique = sorted((m for m in names if m.count(pairs) == 1), key=str)
    if family == "word" and scene.word:
        yield _ask_word(scene.word)
    elif family == "caption":
        if shapes:
            yield _ask_caption(scene)
    elif family == "existence":
        for _ in range(3):
            yield _existence_turn(pairs, rng)
    elif family == "count" and not scene.word:
        yield _ask_count(Mention(), len(pairs))
        kinds = [Mention(colour=c) for c in COLOURS]
        numbers = sorted({m.count(pairs) for m in kinds})
        number = rng.choice(numbers)
        yield _ask_count(rng.choice([m for m in kinds if m.count(pairs) == number]), number)
    elif family == "colour":
        for place in dict.fromkeys(PLACES):
            if (thing := at_place(shapes, place)) is not None:
                yield _ask_colour(f"{place} object".strip(), thing.colour)
    elif family in ("shape", "box"):
        for mention in unique:
            thing = next(t for t in shapes if mention.matches(t.colour, t.kind))
            if family == "box":
                yield _ask_box(mention, thing)
            elif not mention.shape:
                yield _ask_shape(mention, thing.kind)
    elif family == "relation":
        yield from _relation_turns(shapes, pairs, rng)


def at_place(shapes: Sequence[Thing], place: str) -> Thing | None:
    """The one shape there, or the one that stands clear of all others on a side; else None."""
    if place == ONLY or len(shapes) < 2:
        return shapes[0] if place == ONLY and len(shapes) == 1 else None
    axis, first = _SIDES[place]
    near, far = (1, 3) if axis == "x" else (0, 2)
    for thing in shapes:
        others = [t for t in shapes if t is not thing]
        if all(
            thing.box[far] <= t.box[near] if first else t.box[far] <= thing.box[near]
            for t in others
        ):
            return thing
    return None


def _existence_turn(pairs: Sequence[Pair], rng: random.Random) -> Turn:
    style = rng.choice(("colour", "colour", "shape", "pair"))
    options = {
        "colour": [Mention(colour=c) for c in COLOURS],
        "shape": [Mention(shape=s) for s in SHAPES],
        "pair": [Mention(*pair) for pair in KNOWN],
    }[style]
    answer = rng.random() < 0.5
    fit = [m for m in options if (m.count(pairs) > 0) == answer]
    # A scene without shapes has nothing to say yes to.
    return _ask_existence(rng.choice(fit), True) if fit and answer else _no(options, pairs, rng)


def _no(options: Sequence[Mention], pairs: Sequence[Pair], rng: random.Random) -> Turn:
    return _ask_existence(rng.choice([m for m in options if m.count(pairs) == 0]), False)


def _relation_turns(
    shapes: Sequence[Thing], pairs: Sequence[Pair], rng: random.Random
) -> Iterator[Turn]:
    """One question for every two things that stand clearly apart, asked either way round."""
    for i, first in enumerate(shapes):
        for second in shapes[i + 1 :]:
            style = rng.choice(_BY_COLOUR)
            a, b = style(first.colour, first.kind), style(second.colour, second.kind)
            if Mention(a.colour).count(pairs) != 1 or Mention(b.colour).count(pairs) != 1:
                continue
            for axis, near, far in (("x", 1, 3), ("y", 0, 2)):
                before = first.box[far] <= second.box[near]
                after = second.box[far] <= first.box[near]
                if before or after:
                    yield (
                        _ask_relation(axis, a, b, before)
                        if rng.random() < 0.5
                        else _ask_relation(axis, b, a, after)
                    )
