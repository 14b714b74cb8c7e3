"""Questions whose answers are balanced given everything that can be known without the pixels.

The question and its answer are chosen first, from a deck in which every answer to a question
occurs equally often; a scene is then made in which that answer is right. Colours and shapes play
symmetric parts in a scene (the held-back pairs are one per colour and one per shape), so the
question's words give nothing away either.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence

from fuyu_jax.data.demo.scenes import (
    COLOURS,
    HELD_OUT,
    KNOWN,
    MAX_SHAPES,
    MAX_SHAPES_WITH_WORD,
    WORDS,
    Contents,
    Pair,
    Scene,
)
from fuyu_jax.data.demo.wording import (
    BY_COLOUR,
    ONLY,
    PLACES,
    SIDES,
    STYLES,
    Mention,
    Turn,
    ask_box,
    ask_caption,
    ask_colour,
    ask_count,
    ask_existence,
    ask_relation,
    ask_shape,
    ask_word,
)

FAMILIES = ("colour", "shape", "count", "relation", "existence", "word", "box", "caption")
# A word has no colour and shape to combine anew.
COMPOSITIONAL_FAMILIES = tuple(f for f in FAMILIES if f != "word")
# Training draws more often what comes up seldom by itself: several objects of one colour, and two
# that a relation can tell apart.
TRAINING_FAMILIES = (*FAMILIES, "count", "count", "count", "relation")
# This share of the training images shows one object: what is learnt there carries over to more.
SINGLES = 0.4
MAX_COUNT = 3  # of one colour or one shape; of all objects it is MAX_SHAPES


@dataclasses.dataclass(frozen=True)
class Draft:
    """A scene's contents and the question it was made for; `finish` reads the answer off it."""

    contents: Contents
    family: str
    finish: Callable[[Scene], Turn]


def drafts(split: str, seed: int, compositional: bool) -> Iterator[Draft]:
    """An endless, deterministic run of drafts, one family after the other.

    Any run of consecutive drafts has the families equally often, and two consecutive yes/no drafts
    of one family that share a question have one "yes" and one "no". In training the families are
    `TRAINING_FAMILIES`, and `SINGLES` of the drafts give way to one object alone.
    """
    families = COMPOSITIONAL_FAMILIES if compositional else FAMILIES
    named = HELD_OUT if compositional else KNOWN
    decks = {f: _DECKS[f](random.Random(f"{seed}/{split}/{f}"), named) for f in families}
    singles = _single_deck(random.Random(f"{seed}/{split}/single"), named)
    chance = random.Random(f"{seed}/{split}/singles")
    while True:
        for family in TRAINING_FAMILIES if split == "train" else families:
            alone = split == "train" and chance.random() < SINGLES
            yield next(singles if alone else decks[family])


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
            axis, first = SIDES[place]
            contents = Contents((pair, other), order=(axis, 0, 1) if first else (axis, 1, 0))
        turn = ask_colour(f"{place} object".strip(), colour)
        yield Draft(contents, "colour", lambda scene, turn=turn: turn)


def _single_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    for pair in _shuffled(rng, named):
        turn = ask_colour(Mention(), pair[0])
        yield Draft(Contents((pair,)), "colour", lambda scene, turn=turn: turn)


def _shape_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    for colour, shape in _shuffled(rng, named):
        mention = Mention(colour=colour)
        pairs = _with_one(rng, (colour, shape), mention)
        turn = ask_shape(mention, shape)
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
        turn = ask_count(mention, answer)
        yield Draft(Contents(pairs), "count", lambda scene, turn=turn: turn)


def _relation_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    def cards() -> Iterator[tuple[str, list[Pair], list[Mention]]]:
        while True:
            style = rng.choice(BY_COLOUR)
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
        turn = ask_relation(axis, *mentions, answer)
        order = (axis, 0, 1) if answer else (axis, 1, 0)
        yield Draft(Contents(pairs, order=order), "relation", lambda scene, turn=turn: turn)


def _existence_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    """By colour; what needs the shape is asked for by "shape" and "caption"."""
    for colour, answer in _twice(rng, _shuffled(rng, tuple(COLOURS))):
        mention = Mention(colour)
        required = [rng.choice([p for p in named if (p[0] == colour) == answer])]
        pairs = _fill(
            rng,
            rng.randint(1, MAX_SHAPES),
            required,
            lambda pairs, m=mention, a=answer: (m.count(pairs) > 0) == a,
        )
        turn = ask_existence(mention, answer)
        yield Draft(Contents(pairs), "existence", lambda scene, turn=turn: turn)


def _word_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    for word in _shuffled(rng, WORDS):
        pairs = _fill(rng, rng.randint(0, MAX_SHAPES_WITH_WORD))
        yield Draft(Contents(pairs, word), "word", lambda scene: ask_word(scene.word))


def _box_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    for colour, shape in _shuffled(rng, named):
        mention = rng.choice(STYLES)(colour, shape)
        pairs = _with_one(rng, (colour, shape), mention)
        yield Draft(Contents(pairs), "box", lambda scene, m=mention: ask_box(m, scene.shapes[0]))


def _caption_deck(rng: random.Random, named: Sequence[Pair]) -> Iterator[Draft]:
    for pair in _shuffled(rng, named):
        if rng.random() < 0.25:
            pairs = _fill(rng, rng.randint(1, MAX_SHAPES_WITH_WORD), [pair])
            contents = Contents(pairs, rng.choice(WORDS))
        else:
            contents = Contents(_fill(rng, rng.randint(1, MAX_SHAPES), [pair]))
        yield Draft(contents, "caption", ask_caption)


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
