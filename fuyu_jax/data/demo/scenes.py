"""Scenes of coloured shapes and short words: what is in a picture, where it stands, and its pixels.

A scene is made in three steps that keep the set honest. The *contents* (which shapes, which word)
are drawn first, the *canvas* size independently of them, and the *layout* then never fails: any
contents fit any canvas. So the size of an image says nothing about what is in it.
"""

import dataclasses
import functools
import io
import json
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (216, 36, 36),
    "orange": (244, 138, 20),
    "yellow": (238, 214, 28),
    "green": (34, 150, 58),
    "blue": (44, 84, 222),
    "purple": (150, 50, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
_WORD_LIST = """
    ant bat bed bus cat cup dog ear egg fan fox hat hen ink jar jug
    key leg lid map net nut oak owl pan pie rug sea sun toy van zip
"""
WORDS = tuple(_WORD_LIST.split())

Pair = tuple[str, str]  # colour, shape
Box = tuple[int, int, int, int]  # top, left, bottom, right; bottom and right are exclusive

# One shape per colour and one colour per shape is kept back, so that every colour and every shape
# stays equally frequent in training and only their combination is new.
HELD_OUT: tuple[Pair, ...] = tuple(zip(COLOURS, SHAPES, strict=True))
KNOWN: tuple[Pair, ...] = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)

MIN_SIDE, MAX_SIDE = 24, 160
MIN_SHAPE, MAX_SHAPE = 9, 40
MAX_SHAPES = 3  # of MIN_SHAPE they still fit the smallest canvas
MAX_SHAPES_WITH_WORD = 2
_CELL = MIN_SHAPE + 2
_MAX_GRID = 5
_MIN_FONT, _MAX_FONT = 10, 30


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing in a scene; `kind` is a shape's name or "word"."""

    kind: str
    colour: str
    box: Box
    word: str = ""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a scene must show, before it has a place.

    `order` asks that shape number `order[1]` stands left of ("x") or above ("y") number `order[2]`.
    """

    pairs: tuple[Pair, ...]
    word: str = ""
    order: tuple[str, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """A laid-out scene; `things` has the shapes in the order of the contents, then the word."""

    height: int
    width: int
    things: tuple[Thing, ...]

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.kind != "word")

    @property
    def word(self) -> str:
        return next((t.word for t in self.things if t.kind == "word"), "")

    def to_json(self) -> str:
        """The things as JSON text, enough to judge captions and boxes."""
        rows = []
        for thing in self.things:
            row: dict[str, object] = {"kind": thing.kind, "colour": thing.colour}
            row["box"] = list(thing.box)
            if thing.word:
                row["word"] = thing.word
            rows.append(row)
        return json.dumps(rows)


def things_from_json(text: str | bytes) -> tuple[Thing, ...]:
    """Reads back what `Scene.to_json` wrote."""
    return tuple(
        Thing(row["kind"], row["colour"], tuple(row["box"]), row.get("word", ""))
        for row in json.loads(text)
    )


def draw(contents: Contents, rng: random.Random) -> tuple[Scene, np.ndarray]:
    """Lays the contents out on a canvas of random size and paints it: the scene and uint8 RGB."""
    height, width = _side(rng), _side(rng)
    canvas = _background(height, width, rng)
    floor, ceiling = height, 0
    word_thing: list[Thing] = []
    if contents.word:
        thing, mask, ceiling, floor = _place_word(contents, height, width, rng)
        _paint(canvas, mask, thing.box[0], thing.box[1], _jitter(_INK, rng))
        word_thing = [thing]
    things = []
    cells = _grid_cells(contents, (ceiling, floor), width, rng)
    for (colour, shape), cell in zip(contents.pairs, cells, strict=True):
        top, left, bottom, right = cell
        room = min(MAX_SHAPE, bottom - top - 1, right - left - 1)
        size = rng.randint(max(MIN_SHAPE, room * 5 // 8), room)
        y, x = rng.randint(top, bottom - size), rng.randint(left, right - size)
        mask = _shape_mask(shape, size)
        _paint(canvas, mask, y, x, _jitter(COLOURS[colour], rng))
        things.append(Thing(shape, colour, (y, x, y + mask.shape[0], x + mask.shape[1])))
    return Scene(height, width, (*things, *word_thing)), canvas


def _side(rng: random.Random) -> int:
    """Log-uniform: small and large images by ratio, not by difference."""
    return round(MIN_SIDE * (MAX_SIDE / MIN_SIDE) ** rng.random())


def png(pixels: np.ndarray) -> bytes:
    """The pixels as an encoded PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


_INK = (24, 24, 24)


def _background(height: int, width: int, rng: random.Random) -> np.ndarray:
    """A light grey canvas: plain, shaded or striped.

    It is neutral on purpose. A tint, however faint, covers the whole image and so outweighs the
    colour of a small object in any average over patches, which is all that an untrained attention
    can take.
    """
    level = rng.randint(214, 246)
    style = rng.choice(("plain", "gradient", "stripes"))
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    if style == "gradient":
        relief = rng.uniform(-12, 12) * (y / height) + rng.uniform(-12, 12) * (x / width)
    elif style == "stripes":
        period, slope = rng.randint(6, 20), rng.choice((0.0, 1.0, -1.0))
        across = y + slope * x if rng.random() < 0.5 else x + slope * y
        relief = np.where(across % period < period / 2, rng.uniform(4, 10), 0.0)
    else:
        relief = np.zeros(())
    grey = np.broadcast_to(np.clip(level + np.round(relief), 0, 255), (height, width))
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _jitter(colour: tuple[int, int, int], rng: random.Random) -> np.ndarray:
    return np.clip([c + rng.randint(-10, 10) for c in colour], 0, 255).astype(np.float32)


def _paint(canvas: np.ndarray, mask: np.ndarray, top: int, left: int, colour: np.ndarray) -> None:
    area = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    area[:] = np.round(area + mask[..., None] * (colour - area))


def _place_word(
    contents: Contents, height: int, width: int, rng: random.Random
) -> tuple[Thing, np.ndarray, int, int]:
    """Puts the word into a band at the top or bottom; also returns the rows left for shapes."""
    need = _CELL if contents.pairs else 0
    sizes = [
        size
        for size in range(_MIN_FONT, _MAX_FONT + 1)
        if _word_extent(size)[0] + 2 + need <= height and _word_extent(size)[1] + 2 <= width
    ]
    mask = _word_mask(contents.word, rng.choice(sizes))
    rows, columns = mask.shape
    band = rng.randint(rows + 2, height - need)
    above = rng.random() < 0.5
    band_top = 0 if above else height - band
    top = rng.randint(band_top + 1, band_top + band - rows - 1)
    left = rng.randint(1, width - columns - 1)
    thing = Thing("word", "black", (top, left, top + rows, left + columns), contents.word)
    return thing, mask, (band if above else 0), (height if above else height - band)


def _grid_cells(
    contents: Contents, rows: tuple[int, int], width: int, rng: random.Random
) -> Sequence[Box]:
    """A cell of a random grid for every shape, so that none overlap and none can fail to fit."""
    count = len(contents.pairs)
    if not count:
        return []
    top, height = rows[0], rows[1] - rows[0]
    axis, first, second = contents.order or ("", 0, 0)
    grids = [
        (r, c)
        for r in range(1, min(_MAX_GRID, height // _CELL) + 1)
        for c in range(1, min(_MAX_GRID, width // _CELL) + 1)
        if count <= r * c <= 2 * count + 1
        and not (axis == "x" and c < 2)
        and not (axis == "y" and r < 2)
    ]
    grid_rows, grid_columns = rng.choice(grids)
    spots = [(r, c) for r in range(grid_rows) for c in range(grid_columns)]
    index = 1 if axis == "x" else 0
    while True:
        chosen = rng.sample(spots, count)
        if not axis or chosen[first][index] < chosen[second][index]:
            break
    return [
        (
            top + height * r // grid_rows,
            width * c // grid_columns,
            top + height * (r + 1) // grid_rows,
            width * (c + 1) // grid_columns,
        )
        for r, c in chosen
    ]


def _star() -> list[tuple[float, float]]:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    points = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    return [(float(x), float(y)) for x, y in points]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "star": _star(),
    "cross": [
        *((0.34, 0.0), (0.66, 0.0), (0.66, 0.34), (1.0, 0.34), (1.0, 0.66), (0.66, 0.66)),
        *((0.66, 1.0), (0.34, 1.0), (0.34, 0.66), (0.0, 0.66), (0.0, 0.34), (0.34, 0.34)),
    ],
    "diamond": [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)],
}


@functools.cache
def _shape_mask(shape: str, size: int) -> np.ndarray:
    """Coverage in 0..1 of a shape drawn `size` pixels wide, cut to the pixels it clearly covers."""
    fine = 8
    image = Image.new("L", (size * fine, size * fine), 0)
    pen = ImageDraw.Draw(image)
    edge = size * fine - 1
    if shape == "circle":
        pen.ellipse((0, 0, edge, edge), fill=255)
    else:
        pen.polygon([(x * edge, y * edge) for x, y in _POLYGONS[shape]], fill=255)
    return _tight(np.asarray(image.resize((size, size), Image.Resampling.BOX)))


@functools.cache
def _word_mask(word: str, size: int) -> np.ndarray:
    font = ImageFont.load_default(size=size)
    left, top, right, bottom = font.getbbox(word)
    image = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
    ImageDraw.Draw(image).text((2 - left, 2 - top), word, fill=255, font=font)
    return _tight(np.asarray(image))


@functools.cache
def _word_extent(size: int) -> tuple[int, int]:
    """Rows and columns that hold any of the words, so that the size chosen tells none of them."""
    masks = [_word_mask(word, size) for word in WORDS]
    return max(m.shape[0] for m in masks), max(m.shape[1] for m in masks)


def _tight(mask: np.ndarray) -> np.ndarray:
    """Cuts faint borders off, so that a box is where a person would draw it."""
    rows, columns = np.nonzero((mask >= 48).any(axis=1))[0], np.nonzero((mask >= 48).any(axis=0))[0]
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return cut.astype(np.float32) / 255
