"""The tables of the examples' pages are what their recorded figures give."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["averaging", "classics", "kv-prediction", "layerwise", "shakespeare", "tokenizers"])
def test_a_page_is_what_its_records_give(name: str, tmp_path: Path) -> None:
    for path in (*EXAMPLES.glob("*.py"), *(EXAMPLES / name).glob("*.py"), *(EXAMPLES / name).glob("*.json*")):
        copy = tmp_path / path.relative_to(EXAMPLES)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    page = EXAMPLES.joinpath(name, "README.md").read_text("utf-8")
    copy = tmp_path / name / "README.md"
    copy.write_text(page, "utf-8")
    subprocess.run([sys.executable, "-S", f"{name}/page.py"], cwd=tmp_path, check=True)  # -S: without matplotlib
    assert "<!-- made by page.py -->" in page and copy.read_text("utf-8") == page
    before, made = page.split("<!-- made by page.py -->", 1)
    blanked = before + "<!-- made by page.py -->" + made.replace("| ---: |", "| ---: |\n| damaged |", 1)
    copy.write_text(blanked, "utf-8")
    subprocess.run([sys.executable, "-S", f"{name}/page.py"], cwd=tmp_path, check=True)
    assert blanked != page and copy.read_text("utf-8") == page
