"""The structure of the code, and that a wheel holds all of it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
FOLDERS = {name: ROOT / SETUPTOOLS["package-dir"].get(name, name.replace(".", "/")) for name in SETUPTOOLS["packages"]}


def test_no_name_stands_twice_and_no_imports_go_in_circles() -> None:
    assert runpy.run_path(str(ROOT / "benchmarks" / "house.py"))["violations"](ROOT) == []


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_figures_that_nobody_reads_to_their_end(form: list[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "house.py"), "--static", *form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait(timeout=60)


def test_contributing_names_every_file_of_the_house_and_every_benchmark() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    house, _, commands = page.partition("## Commands")
    files = {
        path.stem for name, folder in FOLDERS.items() if name != "elm_mlx.cli" for path in folder.glob("[a-z]*.py")
    }
    assert files - {*re.findall(r"\w+", house)} == set()
    benchmarks = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.endswith("_worker")}
    assert benchmarks - {*re.findall(r"`(\w+)\.py", commands)} == set()


def test_every_folder_of_modules_is_a_package() -> None:
    found = {path.parent for top in ("elm_mlx", "convert") for path in (ROOT / top).rglob("*.py")}
    assert found == set(FOLDERS.values())


def test_files_that_are_no_modules_are_packed() -> None:
    patterns = SETUPTOOLS["package-data"]
    packed = {path for name, folder in FOLDERS.items() for each in patterns.get(name, []) for path in folder.glob(each)}
    there = {path for top in ("elm_mlx", "convert") for path in (ROOT / top).rglob("*") if path.is_file()}
    assert {path for path in there if path.suffix not in (".py", ".pyc")} == packed
