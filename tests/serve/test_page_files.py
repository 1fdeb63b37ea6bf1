"""The web chat's files: small, able to be parsed, and without what its security policy forbids."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "elm_mlx" / "serve" / "page"


def test_files_of_the_page_are_small_and_hold_nothing_that_a_policy_forbids() -> None:
    files = {path.name: path.read_text("utf-8") for path in PAGE.iterdir()}
    assert sum(len(text.encode()) for text in files.values()) < 95_000
    assert not re.search(
        r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|https?://(?!www\.w3\.org)", files["index.html"]
    )
    scripts = {name: text for name, text in files.items() if name.endswith(".js")}
    for name, text in scripts.items():
        forbidden = r"(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc"
        assert not re.search(forbidden, text), name
        assert max(map(len, text.splitlines())) <= 120, name


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("script", sorted(PAGE.glob("*.js")), ids=lambda path: path.name)
def test_scripts_can_be_parsed(script: Path) -> None:
    command = ["node", "--input-type=module", "--check"]
    done = subprocess.run(command, input=script.read_text("utf-8"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
