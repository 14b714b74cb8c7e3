"""Further questions about a scene that is there already: most of what training learns from."""

import random
from collections.abc import Iterator, Sequence

from fuyu_jax.data.demo.scenes import COLOURS, KNOWN, SHAPES, Pair, Scene, Thing
from fuyu_jax.data.demo.wording import (
    BY_COLOUR,
    ONLY,
    PLACES,
    SIDES,
    Mention,
    Turn,
    ask_box,
    ask_caption,
    ask_colour,
    ask_count,
    ask_existence,
    ask_place,
    ask_relation,
    ask_shape,
    ask_word,
)

# How often a further turn is of a family: what can be told at a glance most often, the long
# answers, which would be most of what is learnt from, seldom. "place" (left of the middle, above
# it) is asked in training alone: a step on the way to "relation", which compares two places.
OFTEN = dict.fromkeys(("colour", "shape", "count", "relation", "existence", "place"), 1.0)
OFTEN |= {"box": 0.15, "caption": 0.15, "word": 0.1}
_OFF_MIDDLE = 1 / 10  # of the image's side: nearer than this, a person would not say which


def more_turns(scene: Scene, first: Turn, limit: int, rng: random.Random) -> list[Turn]:
    """Up to `limit` further questions about a known scene, each of another wording.

    Only pairs known in training are named. Yes and no are chosen before what is asked for.
    """
    pairs = [(t.colour, t.kind) for t in scene.shapes]
    pools = {family: list(_all_turns(family, scene, pairs, rng)) for family in OFTEN}
    for pool in pools.values():
        rng.shuffle(pool)
    turns, asked = [], {first.question}
    while len(turns) < limit and any(pools.values()):
        order = [pool for family, pool in pools.items() if pool and rng.random() < OFTEN[family]]
        rng.shuffle(order)
        for pool in order:
            turn = pool.pop()
            if turn.question not in asked and len(turns) < limit:
                asked.add(turn.question)
                turns.append(turn)
    return turns


def _all_turns(
    family: str, scene: Scene, pairs: Sequence[Pair], rng: random.Random
) -> Iterator[Turn]:
    shapes = scene.shapes
    names = {m for pair in pairs for m in (Mention(pair[0]), Mention("", pair[1]), Mention(*pair))}
    unique = sorted((m for m in names if m.count(pairs) == 1), key=str)
    if family == "word" and scene.word:
        yield ask_word(scene.word)
    elif family == "caption":
        if shapes:
            yield ask_caption(scene)
    elif family == "existence":
        for _ in range(3):
            yield _existence_turn(pairs, rng)
    elif family == "count" and not scene.word:
        yield ask_count(Mention(), len(pairs))
        kinds = [Mention(colour=c) for c in COLOURS]
        numbers = sorted({m.count(pairs) for m in kinds})
        number = rng.choice(numbers)
        yield ask_count(rng.choice([m for m in kinds if m.count(pairs) == number]), number)
    elif family == "colour":
        for place in dict.fromkeys(PLACES):
            if (thing := at_place(shapes, place)) is not None:
                yield ask_colour(f"{place} object".strip(), thing.colour)
    elif family in ("shape", "box"):
        for mention in unique:
            thing = next(t for t in shapes if mention.matches(t.colour, t.kind))
            if family == "box":
                yield ask_box(mention, thing)
            elif not mention.shape:
                yield ask_shape(mention, thing.kind)
        if family == "shape" and len(shapes) == 1:
            yield ask_shape(Mention(), shapes[0].kind)
    elif family == "place":
        yield from _place_turns(scene, pairs)
    elif family == "relation":
        yield from _relation_turns(shapes, pairs, rng)


def at_place(shapes: Sequence[Thing], place: str) -> Thing | None:
    """The one shape there, or the one that stands clear of all others on a side; else None."""
    if place == ONLY or len(shapes) < 2:
        return shapes[0] if place == ONLY and len(shapes) == 1 else None
    axis, first = SIDES[place]
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
    style = rng.choices(("colour", "shape", "pair"), (4, 1, 1))[0]
    options = {
        "colour": [Mention(colour=c) for c in COLOURS],
        "shape": [Mention(shape=s) for s in SHAPES],
        "pair": [Mention(*pair) for pair in KNOWN],
    }[style]
    answer = rng.random() < 0.5
    fit = [m for m in options if (m.count(pairs) > 0) == answer]
    # A scene without shapes has nothing to say yes to.
    return ask_existence(rng.choice(fit), True) if fit and answer else _no(options, pairs, rng)


def _no(options: Sequence[Mention], pairs: Sequence[Pair], rng: random.Random) -> Turn:
    return ask_existence(rng.choice([m for m in options if m.count(pairs) == 0]), False)


def _place_turns(scene: Scene, pairs: Sequence[Pair]) -> Iterator[Turn]:
    """On which side of the middle each thing is whose colour tells which is meant."""
    for thing in scene.shapes:
        top, left, bottom, right = thing.box
        mention = Mention(thing.colour) if len(pairs) > 1 else Mention()
        for axis, middle, side in (
            ("x", (left + right) / 2, scene.width),
            ("y", (top + bottom) / 2, scene.height),
        ):
            if Mention(thing.colour).count(pairs) == 1 and (
                abs(middle - side / 2) > _OFF_MIDDLE * side
            ):
                yield ask_place(axis, mention, middle < side / 2)


def _relation_turns(
    shapes: Sequence[Thing], pairs: Sequence[Pair], rng: random.Random
) -> Iterator[Turn]:
    """One question for every two things that stand clearly apart, asked either way round."""
    for i, first in enumerate(shapes):
        for second in shapes[i + 1 :]:
            style = rng.choice(BY_COLOUR)
            a, b = style(first.colour, first.kind), style(second.colour, second.kind)
            if Mention(a.colour).count(pairs) != 1 or Mention(b.colour).count(pairs) != 1:
                continue
            for axis, near, far in (("x", 1, 3), ("y", 0, 2)):
                before = first.box[far] <= second.box[near]
                after = second.box[far] <= first.box[near]
                if before or after:
                    yield (
                        ask_relation(axis, a, b, before)
                        if rng.random() < 0.5
                        else ask_relation(axis, b, a, after)
                    )
