"""`report.html`: what is shown, nothing from elsewhere, and, in a browser, the filters."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from fuyu_jax.evals.harness import evaluate
from fuyu_jax.evals.page import choose
from fuyu_jax.evals.settings import Settings


@pytest.fixture
def page(tmp_path):
    Image.new("RGB", (200, 100), (90, 120, 90)).save(tmp_path / "a.jpg")
    lines = [
        # IoU 1, 0.64 and 0: the second is right too.
        {"id": "right", "prediction": "<box>10, 20, 50, 80</box>", "subset": "left"},
        {"id": "near", "prediction": "<box>10, 20, 42, 68</box>", "subset": "left"},
        {"id": "off", "prediction": "<box>60, 100, 90, 150</box>", "subset": "r&d"},
        {"id": "none", "prediction": "<script>alert(1)</script>", "subset": "r&d"},
    ]
    more = {"images": ["a.jpg"], "prompt": "Where?", "boxes": [[10, 20, 50, 80]]}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line | more) + "\n" for line in lines))
    evaluate(Settings(data=data, tasks="refcoco", out=tmp_path / "out", score_only=True))
    return tmp_path / "out/report.html"


def test_the_page(page):
    text = page.read_text()
    cards = re.findall(r'<article class="(\w+)".*?data-id="(\w+)"(.*?)</article>', text, re.S)
    assert [(c[1], c[0]) for c in cards] == [
        ("off", "wrong"), ("none", "wrong"), ("near", "right"), ("right", "right"),
    ]  # fmt: skip
    off = cards[0][2]
    assert 'viewBox="0 0 200 100"' in off and "data:image/jpeg;base64," in off
    assert '<rect class=expected x="20" y="10" width="60" height="40"/>' in off
    assert '<rect class=found x="100" y="60" width="50" height="30"/>' in off
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert not re.findall(r"https?://|<link|src=\"(?!data:)", text)
    assert "default-src 'none'" in text
    assert text.count("<tr><th>") == 4  # the head, all, and each subset


def test_failures_come_first_and_every_subset_finds_room():
    samples = [{"score": float(i % 2), "subset": "a" if i < 90 else "b"} for i in range(100)]
    shown = choose(samples, limit=20)
    assert len(shown) == 20
    assert [samples[i]["score"] for i in shown] == [0.0] * 15 + [1.0] * 5
    assert {samples[i]["subset"] for i in shown[:15]} == {"a", "b"}
    assert choose(samples[:4]) == [0, 2, 1, 3]


# Chooses values of the filters, and writes what is then visible into the title.
SCRIPT = """<script>
const seen = [];
for (const [name, value] of CHOSEN) {
  form[name].value = value;
  form.dispatchEvent(new Event("change"));
  const left = cards.filter(c => c.offsetParent).map(c => c.dataset.id);
  seen.push([name, value, left, document.getElementById("count").value]);
  form[name].value = "";
}
document.title = JSON.stringify(seen);
</script></body>"""
CHOSEN = [["subset", "left"], ["subset", "r&d"], ["result", "wrong"], ["result", "parse failed"]]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_filters_in_a_browser(page):
    script = SCRIPT.replace("CHOSEN", json.dumps(CHOSEN))
    page.write_text(page.read_text().replace("</body>", script))
    told = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={page.parent / 'browser'}", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", told, re.S)[1]
    seen = json.loads(title.replace("&amp;", "&"))
    assert [(s[1], s[2], int(s[3])) for s in seen] == [
        ("left", ["near", "right"], 2),
        ("r&d", ["off", "none"], 2),
        ("wrong", ["off", "none"], 2),
        ("parse failed", ["none"], 1),
    ]
