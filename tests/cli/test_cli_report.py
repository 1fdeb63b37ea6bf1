"""`elm-mlx report`: what it writes, where, and what it says."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import Run, modules_of, packages


@pytest.fixture
def run(run: Run) -> Run:
    """`elm-mlx report`."""
    return partial(run, "report")


def trained(path: Path, more: str = "") -> Path:
    path.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 3.0 - step / 10, "tokens": 50, "seconds": 1}) for step in range(1, 6)]
    (path / "metrics.jsonl").write_text("\n".join([*lines, more]))
    return path


def test_a_page_lands_in_the_first_runs_directory(run: Run, tmp_path: Path) -> None:
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
    code, out, err = run(first, second)
    assert (code, out, err) == (0, f"wrote {first / 'report.html'}: 2 runs\n", "")
    assert "</html>" in (first / "report.html").read_text() and not (second / "report.html").exists()
    assert {path.name for path in first.iterdir()} == {"metrics.jsonl", "report.html"}


def test_out_and_a_picture(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "page.html", tmp_path / "all.png"
    code, out, _ = run(trained(tmp_path / "a"), "--out", page, "--png", picture)
    assert (code, out) == (0, f"wrote {page} and {picture}: 1 run\n")
    assert page.exists() and picture.read_bytes()[1:4] == b"PNG" and not (tmp_path / "a" / "report.html").exists()


def test_a_terminal_gets_the_figures(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(trained(tmp_path / "[red]a"), trained(tmp_path / "b"))
    assert code == 0 and "[red]a" in out
    rows = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    assert rows["steps"] == ["5", "5"] and rows["tokens"] == ["250", "250"]
    assert rows["training loss at the end"] == ["2.7000", "2.7000"]
    assert out.splitlines()[-1].startswith("wrote ")


def test_damage_is_told(run: Run, tmp_path: Path) -> None:
    code, _, err = run(trained(tmp_path / "a", "rubbish\n"))
    assert (code, err) == (0, "a: 1 damaged line in metrics.jsonl left out\n")


def test_errors_are_one_line_and_write_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = trained(tmp_path / "a")
    code, out, err = run(good, tmp_path / "none")
    assert (code, out) == (2, "") and err.startswith(f"elm-mlx: {tmp_path / 'none'}: no such directory")
    assert err.count("\n") == 1 and not (good / "report.html").exists()
    for mine in (b"mine", b"<!doctype html>\n<title>my own site</title>", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        (tmp_path / "thesis").write_bytes(mine)
        for option in ("--out", "--png"):
            code, _, err = run(good, option, tmp_path / "thesis")
            assert code == 2 and "thesis: exists already; pass --overwrite" in err and err.count("\n") == 1
        assert (tmp_path / "thesis").read_bytes() == mine
    assert run(good, "--out", tmp_path / "thesis", "--overwrite")[0] == 0
    assert run(good, "--out", tmp_path / "thesis")[0] == 0  # a report now
    code, _, err = run(good, "--out", tmp_path / "nowhere" / "x.html")
    assert code == 1 and "cannot be written" in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(good, "--png", tmp_path / "x.png")
    assert code == 1 and "elm-mlx[plot]" in err and not (good / "report.html").exists()


def test_nothing_heavy_is_imported_for_a_page(tmp_path: Path) -> None:
    _, _, modules = modules_of("report", trained(tmp_path / "a"))
    assert not packages(modules) & {"mlx_lm", "matplotlib", "transformers", "pyarrow"}
