"""Results that lie in the project: each fits the schema and names nobody, and the pages are what they give."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from elm_mlx.bench import results, suites
from elm_mlx.bench.results import Results

ROOT = Path(__file__).parents[2]
MACHINES = sorted((ROOT / "benchmarks/machines").glob("*.json"))
RECORDS = sorted((ROOT / "benchmarks/records").glob("*.json"))
SUITES = [path for path in RECORDS if "rows" in json.loads(path.read_text("utf-8"))]
PRIVATE = re.compile(r"/(?:home|Users|root|work|tmp|private|var)/|[A-Z]:\\\\")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/results.py."""
    import importlib

    monkeypatch.delitem(sys.modules, "results", raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results")


@pytest.mark.parametrize("path", [*MACHINES, *SUITES], ids=lambda path: path.name)
def test_a_file_fits_the_schema(path: Path, tmp_path: Path) -> None:
    assert results.schema_faults(path) == []
    found = results.load(path)
    found.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text("utf-8")) == json.loads(path.read_text("utf-8"))
    assert found.complete and found.commit and "-dirty" not in found.commit


@pytest.mark.parametrize("path", [*MACHINES, *RECORDS], ids=lambda path: path.name)
def test_a_file_tells_of_no_person_or_place(path: Path) -> None:
    assert PRIVATE.findall(path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.name)
def test_a_machines_file_is_of_the_papers_setting(path: Path) -> None:
    found = results.load(path)
    assert found.suite.name == "m2max" and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*\.json", path.name)
    papers = suites.SUITES["m2max"]
    assert {(case.prompt, case.batch, case.precision) for case in found.suite.cases} == {(36, 1, "bfloat16")}
    assert found.suite.compute_dtype == papers.compute_dtype and {"naive"} <= {*found.suite.against} <= {
        *papers.against
    }


def test_the_pages_are_what_the_records_give(page: ModuleType) -> None:
    assert MACHINES and RECORDS
    assert page.page() == page.PAGE.read_text("utf-8")
    assert f"{page.BEGIN}{page.readme()}{page.END}" in page.README.read_text("utf-8")


def test_a_mac_has_no_figures_until_somebody_measures_one(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MACHINES", tmp_path)
    empty = re.findall(r"^\| Apple M2 Max, not measured yet \|.*$", page.machines(), re.MULTILINE)
    assert len(empty) == 4 and all(line.endswith("| 36 + 1,024 |  |  |  |  |  |") for line in empty)
    measured = results.load(MACHINES[0])
    mac: Results = replace(measured, machine=measured.machine | {"processor": "Apple M2 Max"})
    mac.save(tmp_path / "apple-m2-max-64gb.json")
    made = page.machines()
    assert "not measured yet" not in made and f"| Apple M2 Max | {measured.rows[0].case.model} |" in made
    assert "[apple-m2-max-64gb.json](../benchmarks/machines/apple-m2-max-64gb.json)" in made
