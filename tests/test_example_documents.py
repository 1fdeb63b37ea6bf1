"""examples/documents shows what its questions find, in this project's own documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_question_but_the_last_finds_passages(tmp_path: Path) -> None:
    command = [sys.executable, "examples/documents/run.py", "--model", "none", "--out", tmp_path / "build" / "docs.db"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *found, last = done.stdout.strip().split("\n\n")[1:]
    assert len(found) == 5
    for each in found:
        passages = each.split("\n")[1:]
        assert 1 <= len(passages) <= 3
        assert all(line.startswith(f"  [{number}] ") for number, line in enumerate(passages, 1))
    assert last == "What does a walrus eat?"
