"""An evaluation killed at any write and resumed ends with the same files."""

import json
import subprocess
import sys
from pathlib import Path

from fake_asker import fake_checkpoint

HERE = Path(__file__).parent


def test_killed_at_each_write_and_resumed(tmp_path):
    fake_checkpoint(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(
        "".join(
            json.dumps({"id": f"q{n}", "prompt": f"Grün {n}?", "answers": ["grün"]}) + "\n"
            for n in range(8)
        )
    )
    done = subprocess.run(
        [sys.executable, HERE / "killed_evaluation.py", tmp_path],
        cwd=HERE.parent, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Eight answers; request, samples, page and metrics are written and renamed: 16 changes,
    # before, within and behind each.
    assert int(done.stdout) == 3 * 16
