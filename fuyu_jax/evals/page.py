"""`report.html`: one page with everything in it. Scores, then answers, failures first, with small
pictures and boxes drawn on them; buttons filter by task, subset and result. No JAX."""

import base64
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PilImage
from PIL import ImageOps

from fuyu_jax.evals.judge import Box, parse_boxes
from fuyu_jax.evals.metrics.grounding import REFCOCO, read_box, read_point
from fuyu_jax.evals.output import write_whole
from fuyu_jax.evals.records import Record
from fuyu_jax.evals.tasks import Task

SIDE = 260  # pixels of a picture's longer side
SHOWN = 400  # answers a task at most
_FAILURES = 0.75  # of those shown, if there are so many
RIGHT = 0.999  # a score from here on is no failure; of a box, whose score is its IoU, from a half
RIGHT_BOX = 0.5


@dataclass(frozen=True)
class PageTask:
    """One task's part: its scores, and a sample a record."""

    task: Task
    metrics: Mapping[str, Any]
    records: Sequence[Record]
    samples: Sequence[Mapping[str, Any]]


def right_from(task: Task) -> float:
    """The least score of a right answer."""
    return RIGHT_BOX if task.metric is REFCOCO else RIGHT


def choose(
    samples: Sequence[Mapping[str, Any]], limit: int = SHOWN, least: float = RIGHT
) -> list[int]:
    """Which samples are shown, the worst first: subsets in turn where not all find room.

    Args:
      samples: of one task.
      limit: how many at most.
      least: the score that a right answer has at least.
    """
    wrong = [i for i, s in enumerate(samples) if s["score"] < least]
    right = [i for i, s in enumerate(samples) if s["score"] >= least]
    if len(samples) > limit:
        room = max(int(limit * _FAILURES), limit - len(right))
        wrong = _in_turn(samples, wrong)[:room]
        right = _in_turn(samples, right)[: limit - len(wrong)]
    return sorted([*wrong, *right], key=lambda i: (samples[i]["score"], i))


def _in_turn(samples: Sequence[Mapping[str, Any]], places: Iterable[int]) -> list[int]:
    seen: dict[str, int] = {}
    turns = []
    for i in places:
        subset = samples[i]["subset"]
        seen[subset] = seen.get(subset, 0) + 1
        turns.append((seen[subset], i))
    return [i for _, i in sorted(turns)]


def write_page(path: Path, tasks: Sequence[PageTask], metrics: Mapping[str, Any]) -> None:
    """Writes the page, whole or not at all."""
    write_whole(path, "\n".join(_page(tasks, metrics)) + "\n")


def _page(tasks: Sequence[PageTask], metrics: Mapping[str, Any]) -> Iterator[str]:
    checkpoint = metrics.get("checkpoint") or {}
    name = checkpoint.get("path") or "answers that were there"
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    # The browser itself sees to it that nothing comes from elsewhere.
    yield (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
    )
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>Evaluation of {_e(Path(name).name)}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>Evaluation of {_e(name)}</h1><p class=about>"
    data = metrics["data"]
    yield f"{metrics['records']} records of {_e(data['path'])} (hash {_e(data['hash'])})"
    if checkpoint:
        yield f" · checkpoint hash {_e(checkpoint['hash'])}"
    config = metrics["config"]
    if config["num_shots"]:
        yield f" · {config['num_shots']} shots of {_e(metrics['shots']['path'])}"
    if metrics["skipped"]:
        yield f" · {metrics['skipped']} bad lines left out"
    yield "</p>"
    for part in tasks:
        yield from _scores(part)
    if metrics["skipped"]:
        yield f"<details><summary>{metrics['skipped']} bad lines left out</summary><ul>"
        for line in metrics["skipped_lines"]:
            yield f"<li>line {line['line']}: {_e(line['reason'])}</li>"
        yield "</ul></details>"
    yield from _filters(tasks)
    yield '<main id="cards">'
    for part in tasks:
        for at in choose(part.samples, least=right_from(part.task)):
            yield _card(part, part.records[at], part.samples[at])
    yield f"</main><script>{_SCRIPT}</script></body></html>"


def _scores(part: PageTask) -> Iterator[str]:
    """A table: the whole, then each subset."""
    m = part.metrics
    names = list(m["scores"])
    yield f"<section><h2>{_e(part.task.name)} <small>{_e(part.task.about)}</small></h2>"
    heads = "".join(f"<th>{_e(n)}</th>" for n in names)
    yield f"<table class=scores data-task='{_e(part.task.name)}'><thead><tr><th></th><th>n</th>"
    yield f"{heads}<th>parse failures</th></tr></thead><tbody>"
    rows = [("all", m), *sorted(m.get("by_subset", {}).items())]
    for label, row in rows:
        cells = "".join(
            f"<td>{_number(row['scores'].get(n))}"
            + (f" <small>± {_number(row['stderr'].get(n))}</small>" if n in row["stderr"] else "")
            + "</td>"
            for n in names
        )
        count = f"<td>{row['n']}</td>"
        failures = f"<td>{row['parse_failures']}</td>"
        yield f"<tr><th>{_e(label)}</th>{count}{cells}{failures}</tr>"
    yield "</tbody></table></section>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _filters(tasks: Sequence[PageTask]) -> Iterator[str]:
    shown = sum(len(choose(t.samples)) for t in tasks)
    of = sum(len(t.samples) for t in tasks)
    subsets = sorted({s["subset"] for t in tasks for s in t.samples})
    yield '<form id="filters">'
    choices = {
        "task": [t.task.name for t in tasks],
        "subset": subsets,
        "result": ["wrong", "right", "parse failed"],
    }
    for name, values in choices.items():
        options = "".join(f'<option value="{_e(v)}">{_e(v)}</option>' for v in values)
        yield f'<label>{name} <select name="{name}"><option value="">all</option>{options}'
        yield "</select></label>"
    yield f'<output id="count">{shown}</output> of {shown} shown'
    yield f" (of {of} answers)" if of > shown else ""
    yield " <span class=key><b class=expected>▭</b> expected <b class=found>▭</b> answered</span>"
    yield "</form>"


def _card(part: PageTask, record: Record, sample: Mapping[str, Any]) -> str:
    failed = sample["parse_failed"]
    right = sample["score"] >= right_from(part.task)
    side = SIDE if len(record.images) < 2 else SIDE // 2 - 2  # two find room side by side
    result = "right" if right else "wrong"
    pictures = []
    for at, path in enumerate(record.images):
        last = at == len(record.images) - 1
        places = _places(part.task, record, sample) if last else ((), ())
        pictures.append(_picture(path, *places, side))
    answer = _answer(part.task, record, sample)
    rows = [
        ("prompt", sample["prompt"]),
        ("answer", sample.get("error") or answer),
        ("read as", sample["parsed"] if sample["parsed"] != answer else ""),
        ("expected", " | ".join(_told(x) for x in dict.fromkeys(map(_told, sample["expected"])))),
        ("shots", ", ".join(sample.get("shots", ()))),
    ]
    text = "".join(
        f'<div class="{k.replace(" ", "-")}"><i>{k}</i> <span>{_e(v)}</span></div>'
        for k, v in rows
        if v
    )
    return (
        f'<article class="{result}" data-task="{_e(part.task.name)}" '
        f'data-subset="{_e(sample["subset"])}" data-result="{result}" '
        f'data-failed="{int(failed)}" data-id="{_e(sample["id"])}">'
        f"<header><b>{_e(sample['id'])}</b> {_e(sample['subset'])} "
        f"<span class=score>{_number(sample['score'])}{' parse failed' if failed else ''}</span>"
        f"</header><div class=pictures>{''.join(pictures)}</div>{text}</article>"
    )


def _told(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(f"{n:g}" for n in value)


def _answer(task: Task, record: Record, sample: Mapping[str, Any]) -> str:
    """A text as it is; likelihoods beside what they are of."""
    if task.ask == "generate":
        return _told(sample["prediction"])
    shown = ["–" if p is None else f"{p:.3f}" for p in sample["logprobs"]]
    if task.ask == "perplexity":
        return f"{shown[0]} over {sample['tokens']} tokens"
    return "\n".join(f"{p}  {c}" for p, c in zip(shown, record.choices, strict=True))


# --- Pictures ---


def _places(
    task: Task, record: Record, sample: Mapping[str, Any]
) -> tuple[Sequence[Box], Sequence[Box]]:
    """Expected and answered boxes (a point is a box without an inside), in pixels."""
    answer = sample.get("prediction", "")
    if not record.boxes:
        expected = [b for a in record.answers for b in parse_boxes(a)]
        return expected, parse_boxes(answer) if isinstance(answer, str) else ()
    found = read_box(answer, record.box_format)
    if found is None and (point := read_point(answer, record.box_format)) is not None:
        found = (point[0], point[1], point[0], point[1])
    return record.boxes, [found] if found else ()


def _picture(path: Path, expected: Sequence[Box], found: Sequence[Box], side: int) -> str:
    """A small JPEG in the page, boxes as lines over it in the picture's own pixels."""
    try:
        with PilImage.open(path) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a large JPEG need not be decoded whole
            upright = ImageOps.exif_transpose(image).convert("RGB")
        width, height = _size(path)
    except Exception as error:  # decoders raise many kinds
        reason = "no such file" if isinstance(error, FileNotFoundError) else "cannot be read"
        return f"<figure class=gone>{_e(path.name)}: {reason}</figure>"
    upright.thumbnail((SIDE, SIDE))
    sink = io.BytesIO()
    upright.save(sink, "JPEG", quality=80)
    data = base64.b64encode(sink.getvalue()).decode()
    lines = [_drawn(b, "expected", width) for b in expected]
    lines += [_drawn(b, "found", width) for b in found]
    over = f'<svg viewBox="0 0 {width} {height}">{"".join(lines)}</svg>' if lines else ""
    # Small drawings are enlarged as they are, so that a page's cards are alike.
    ratio = side / max(width, height)
    size = f"width:{max(round(width * ratio), 1)}px;height:{max(round(height * ratio), 1)}px"
    soft = "" if ratio < 1 else ";image-rendering:pixelated"
    return (
        f'<figure style="{size}"><img alt="{_e(path.name)}" style="{size}{soft}" '
        f'src="data:image/jpeg;base64,{data}">{over}</figure>'
    )


def _size(path: Path) -> tuple[int, int]:
    """Width and height of the upright picture at full size."""
    with PilImage.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _drawn(box: Box, kind: str, width: int) -> str:
    top, left, bottom, right = box
    if top == bottom and left == right:
        return f'<circle class={kind} cx="{left:g}" cy="{top:g}" r="{width / 60:g}"/>'
    y, x = min(top, bottom), min(left, right)
    size = f'width="{abs(right - left):g}" height="{abs(bottom - top):g}"'
    return f'<rect class={kind} x="{x:g}" y="{y:g}" {size}/>'


def _e(text: Any) -> str:
    return html.escape(str(text).encode("utf-8", "replace").decode())


_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:16px;color:#222;background:#fff}
h1{font-size:20px}h2{font-size:16px;margin:16px 0 4px}small{color:#666;font-weight:normal}
.about{color:#555}table{border-collapse:collapse;display:block;overflow-x:auto}
th,td{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
tbody th{text-align:left}
form{position:sticky;top:0;background:#fff;padding:8px 0;border-bottom:1px solid #ccc;z-index:1}
label{margin-right:14px}.key{margin-left:14px}b.expected{color:#1f5fd0}b.found{color:#e07b00}
main{display:flex;flex-wrap:wrap;gap:12px;margin-top:12px;align-items:flex-start}
article{width:284px;border:1px solid #ccc;border-top:4px solid #b3261e;border-radius:4px;
padding:8px;overflow-wrap:anywhere}
article.right{border-top-color:#1a7f37}article[hidden]{display:none}
header{display:flex;gap:8px;color:#555}header b{color:#222}.score{margin-left:auto}
.pictures{display:flex;flex-wrap:wrap;gap:4px;margin:6px 0}
figure{margin:0;position:relative}figure svg{position:absolute;inset:0;width:100%;height:100%}
.gone{color:#b3261e;border:1px dashed #b3261e;padding:8px}
svg .expected,svg .found{fill:none;stroke-width:3;vector-effect:non-scaling-stroke}
svg .expected{stroke:#1f5fd0}svg .found{stroke:#e07b00;stroke-dasharray:6 3}
article i{color:#777;font-size:12px}article span{white-space:pre-wrap}
article.wrong .answer span{color:#b3261e}article.right .answer span{color:#1a7f37}
"""

_SCRIPT = """
const form = document.getElementById("filters");
const cards = [...document.querySelectorAll("#cards article")];
function filter() {
  let shown = 0;
  const task = form.task.value, subset = form.subset.value, result = form.result.value;
  for (const card of cards) {
    const d = card.dataset;
    const fits = (!task || d.task === task) && (!subset || d.subset === subset) &&
      (!result || d.result === result || (result === "parse failed" && d.failed === "1"));
    card.hidden = !fits;
    shown += fits;
  }
  document.getElementById("count").value = shown;
}
form.addEventListener("change", filter);
filter();
"""
