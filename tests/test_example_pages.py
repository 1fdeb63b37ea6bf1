"""The tables of the examples' pages are what their recorded figures give."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def copied(name: str, tmp_path: Path) -> None:
    """Copies an example's scripts and records, and what examples share, into a folder."""
    for path in (*EXAMPLES.glob("*.py"), *(EXAMPLES / name).glob("*.py"), *(EXAMPLES / name).glob("*.json*")):
        copy = tmp_path / path.relative_to(EXAMPLES)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


@pytest.mark.parametrize("name", ["averaging", "classics", "kv-prediction", "layerwise", "shakespeare", "tokenizers"])
def test_a_page_is_what_its_records_give(name: str, tmp_path: Path) -> None:
    copied(name, tmp_path)
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


def test_records_that_are_named_take_the_place_of_the_examples_own_if_they_can_be_read(tmp_path: Path) -> None:
    copied("classics", tmp_path)
    own, other, damaged = tmp_path / "classics" / "results.json", tmp_path / "other.json", tmp_path / "damaged.json"
    page = tmp_path / "classics" / "README.md"
    page.write_text("<!-- made by page.py -->\n<!-- end -->\n", "utf-8")
    other.write_text('{"a model": {"A Book": [1.25, 0.5]}}', "utf-8")
    damaged.write_bytes(other.read_bytes()[:-1])
    command = [sys.executable, "-S", "classics/page.py"]
    before = own.read_bytes()
    assert subprocess.run([*command, damaged], cwd=tmp_path, stderr=subprocess.PIPE).returncode == 1
    assert own.read_bytes() == before and "|" not in page.read_text("utf-8")
    for named in ([other], []):
        subprocess.run([*command, *named], cwd=tmp_path, check=True)
        assert own.read_bytes() == other.read_bytes()
        assert "| a model | 1.2500, 0.5000 |" in page.read_text("utf-8")
