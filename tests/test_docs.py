"""The documentation against the command line: what it names is there, and what is there is named."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from typer.main import get_command

from elm_mlx.cli import app

ROOT = Path(__file__).parent.parent
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
TRANSCRIPTS = runpy.run_path(str(ROOT / "benchmarks" / "transcripts.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def flags(command: str) -> set[str]:
    own = [each for each in COMMANDS[command].params if each.expose_value]  # not those that all commands have
    return {name for each in own for name in each.opts if name.startswith("--")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_in_the_documentation_can_be_parsed(page: Path) -> None:
    lines = re.findall(r"^(?: {4}|\$ )(?:.*\| )?(?:\.venv/bin/)?elm-mlx ([a-z-]+) (.*)", page.read_text("utf-8"), re.M)
    made_by = "".join(TRANSCRIPTS["MADE_BY"].findall(page.read_text("utf-8")))
    lines += re.findall(r"^ *elm-mlx ([a-z-]+) (.*)", made_by, re.M)
    for command, rest in lines:
        assert command in COMMANDS, f"{page.name}: elm-mlx {command}"
        known = {"--help", *(name for each in COMMANDS[command].params for name in each.opts)}
        for flag in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert flag in known, f"{page.name}: elm-mlx {command} {flag}"


def transcripts(page: Path) -> list[tuple[str, str]]:
    """Commands of a page's transcripts, each with what it printed."""
    blocks = TRANSCRIPTS["BLOCK"].findall(page.read_text("utf-8"))
    return [each for block in blocks for each in TRANSCRIPTS["COMMAND"].findall(block)]


@pytest.mark.parametrize("page", [page for page in PAGES if transcripts(page)], ids=lambda page: page.name)
def test_every_transcript_can_be_made_again(page: Path) -> None:
    text = page.read_text("utf-8")
    made_by = TRANSCRIPTS["MADE_BY"].findall(text)
    assert len(made_by) == text.count("<!-- made by") <= 1
    there = f"examples build {' '.join(made_by)}"
    if "$SHARED" in there:
        assert "`../shared/data/" in text, f"{page.name} does not say that it needs what is in ../shared"
    for command, printed in transcripts(page):
        words = shlex.split(command)
        for before, word in pairwise(words):
            if ("/" in word or re.search(r"\.[a-z]+$", word)) and before not in ("--out", "--pairs", "--png", "--init"):
                assert word.split("/")[0] in there, f"{command}: nothing makes {word}"
        assert len(TRANSCRIPTS["DOTS"].findall(printed)) < 2, f"{command}: dots can stand in one place alone"
        there += f" {command} {printed}"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_flag_has_a_place_in_its_commands_page(command: str) -> None:
    page = (ROOT / "docs" / f"{command}.md").read_text("utf-8")
    missing = {flag for flag in flags(command) - {"--help"} if f"{flag}" not in page}
    assert not missing, f"docs/{command}.md says nothing of {sorted(missing)}"


def test_every_python_example_passes_a_strict_type_check(tmp_path: Path) -> None:
    for page in PAGES:
        if blocks := re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            (tmp_path / f"{page.stem.replace('-', '_')}_page.py").write_text("\n".join(blocks))
    assert len([*tmp_path.iterdir()]) > 4
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "examples"), *map(str, tmp_path.iterdir())]
    environment = os.environ | {"MYPYPATH": f"{ROOT}:{ROOT / '.ci' / 'typing'}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_import_in_a_python_example_works() -> None:
    blocks = [
        each for page in PAGES for each in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    ]
    imports = [line for line in ast.walk(ast.parse("\n".join(blocks))) if isinstance(line, ast.Import | ast.ImportFrom)]
    assert len(imports) > 15
    for line in imports:  # mypy believes in every name of `elm_mlx`, for it has a `__getattr__`
        exec(ast.unparse(line))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert not re.findall(r"^[A-Z]{4,}$|TODO|FIXME|XXX", page.read_text("utf-8"), re.M)
