"""A contact sheet: image, question, answer, right or wrong, and boxes drawn on the image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont

from fuyu_jax.data.example import BadImageError, Example
from fuyu_jax.evals.judge import parse_boxes

CELL = 300
PICTURE = 190
MARGIN = 10
COLUMNS = 5
RIGHT, WRONG, EXPECTED = (20, 130, 50), (190, 30, 30), (40, 90, 200)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def choose(samples: Sequence[dict[str, Any]], limit: int) -> list[int]:
    """Which samples a sheet shows: families in turn, within a family wrong and right in turn."""
    queues: dict[tuple[str, bool], list[int]] = {}
    for i, sample in enumerate(samples):
        queues.setdefault((sample["family"], sample["correct"]), []).append(i)
    chosen: list[int] = []
    while len(chosen) < limit and any(queues.values()):
        for key in sorted(queues):
            if queues[key] and len(chosen) < limit:
                chosen.append(queues[key].pop(0))
    return sorted(chosen, key=lambda i: (samples[i]["family"], samples[i]["correct"], i))


def _picture(example: Example, boxes: list[tuple[tuple[int, int, int], tuple]]) -> PilImage.Image:
    """The example's images side by side in a box of CELL × PICTURE; boxes belong to the last."""
    canvas = PilImage.new("RGB", (CELL - 2 * MARGIN, PICTURE), (238, 238, 238))
    images = example.images
    if not images:
        ImageDraw.Draw(canvas).text((8, 8), "(no image)", fill=(90, 90, 90), font=_font(14))
        return canvas
    width = canvas.width // len(images)
    for at, image in enumerate(images):
        try:
            pixels = image.decode()
        except BadImageError:
            ImageDraw.Draw(canvas).text((at * width + 8, 8), "(broken)", fill=WRONG, font=_font(14))
            continue
        ratio = min(width / image.width, PICTURE / image.height)
        size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
        # Small drawn images stay crisp; photographs are shrunk smoothly.
        method = PilImage.Resampling.NEAREST if ratio > 1 else PilImage.Resampling.LANCZOS
        shown = PilImage.fromarray(np.asarray(pixels)).resize(size, method)
        if at == len(images) - 1:
            draw = ImageDraw.Draw(shown)
            for colour, (top, left, bottom, right) in boxes:
                x0, x1 = sorted((left * ratio, right * ratio))
                y0, y1 = sorted((top * ratio, bottom * ratio))
                draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        canvas.paste(shown, (at * width + (width - size[0]) // 2, (PICTURE - size[1]) // 2))
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider is broken."""
    lines = [""]
    for word in text.split() or ["(nothing)"]:
        while word:
            space = " " if lines[-1] else ""
            if font.getlength(lines[-1] + space + word) <= width:
                lines[-1] += space + word
                break
            if lines[-1]:
                lines.append("")
                continue
            part = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
            lines[-1], word = word[:part], word[part:]
            if word:
                lines.append("")
    return lines


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, fill, lines: int) -> int:
    font, width = _font(13), CELL - 2 * MARGIN
    wrapped = _wrap(text, font, width)
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while last and font.getlength(last + " …") > width:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], last + " …"]
    for n, line in enumerate(wrapped):
        draw.text((at[0], at[1] + 16 * n), line, fill=fill, font=font)
    return at[1] + 16 * len(wrapped)


def draw_sheet(
    examples: Sequence[Example], samples: Sequence[dict[str, Any]], limit: int = 40
) -> PilImage.Image:
    """The sheet. Green: right, red: wrong; boxes: the answer's in its colour, the expected blue."""
    chosen = choose(samples, limit)
    height = PICTURE + 6 * 16 + 2 * MARGIN
    rows = max(1, -(-len(chosen) // COLUMNS))
    sheet = PilImage.new("RGB", (COLUMNS * CELL, rows * height + 34), "white")
    draw = ImageDraw.Draw(sheet)
    right = sum(s["correct"] for s in samples)
    title = f"{right} of {len(samples)} right; {len(chosen)} shown. Green: right. Red: wrong."
    draw.text((MARGIN, 8), title + " Blue box: expected.", fill=(30, 30, 30), font=_font(16))
    for n, i in enumerate(chosen):
        sample = samples[i]
        x, y = n % COLUMNS * CELL + MARGIN, n // COLUMNS * height + 34
        colour = RIGHT if sample["correct"] else WRONG
        boxes = [((240, 160, 20), b) for b in parse_boxes(sample["prompt"])]
        boxes += [(EXPECTED, b) for b in parse_boxes(sample["expected"])]
        boxes += [(colour, b) for b in parse_boxes(sample["answer"])]
        sheet.paste(_picture(examples[i], boxes), (x, y))
        draw.rectangle((x, y, x + CELL - 2 * MARGIN - 1, y + PICTURE - 1), outline=colour, width=2)
        question = sample["prompt"].replace("<image>", "").strip()
        at = _write(draw, (x, y + PICTURE + 4), f"[{sample['family']}] {question}", (30, 30, 30), 2)
        answer = sample.get("error") or sample["answer"]
        at = _write(
            draw, (x, at), ("right: " if sample["correct"] else "wrong: ") + answer, colour, 2
        )
        if not sample["correct"]:
            _write(draw, (x, at), f"expected: {sample['expected']}", EXPECTED, 2)
    return sheet


def save_sheet(
    path: Path, examples: Sequence[Example], samples: Sequence[dict[str, Any]], limit: int = 40
) -> None:
    """Writes the sheet as a PNG, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    draw_sheet(examples, samples, limit).save(partial, format="PNG")
    partial.replace(path)
