"""The published runs: their page is what their checkpoints give, and the small one's log is made again."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from elm_mlx.store.loading import load
from elm_mlx_convert.averaging import average

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "examples/published"
LENGTHS = {"run": 256, "demo": 512}  # of a run's rows


@pytest.mark.parametrize(
    ("run", "rows"),
    [("run", {"mean of the last 5": 5, "after 600 updates": 1}), ("demo", {"after 7,472 updates": 1})],
)
def test_the_pages_losses_are_those_of_the_checkpoints(run: str, rows: dict[str, int], tmp_path: Path) -> None:
    page = PUBLISHED.joinpath("README.md").read_text("utf-8")
    books, measure = (runpy.run_path(str(ROOT / "examples" / f"{name}.py")) for name in ("books", "measure"))
    length = LENGTHS[run]
    checkpoints = sorted((PUBLISHED / run / "checkpoints").iterdir())
    for checkpoint in checkpoints:
        assert page.count(f"| after {int(checkpoint.name[5:]):,} updates |") == 1
    for name, last in rows.items():
        average(checkpoints[-last:], tmp_path / name)
        model, tokenizer = load(tmp_path / name, compute_dtype="float32")
        (row,) = re.findall(rf"^\| {name} \|.*$", page, re.MULTILINE)
        held_out = books["read"](ROOT / "examples/classics/held-out.jsonl.gz")
        for book, cell in zip(held_out, row.split("|")[3:-1], strict=True):
            found = measure["held_out_loss"](model, tokenizer, book["text"], 8192 // length, length)
            assert [float(figure) for figure in cell.split(",")] == pytest.approx([*found], abs=2e-4)


@pytest.mark.parametrize("run", LENGTHS)
def test_the_log_is_that_of_the_recipe(run: str) -> None:
    lines = [json.loads(line) for line in (PUBLISHED / run / "metrics.jsonl").read_text("utf-8").splitlines()]
    settings = json.loads((PUBLISHED / run / "run.json").read_text("utf-8"))["settings"]
    assert settings["data"]["sequence_length"] == LENGTHS[run]
    updates = [line for line in lines if "loss" in line]
    assert [line["step"] for line in updates] == [*range(1, settings["optimizer"]["steps"] + 1)]
    assert sum("valid_loss" in line for line in lines) == 1 + -(-len(updates) // settings["run"]["eval_every"])
    assert updates[-1]["tokens"] == 2048 and {line["skipped"] for line in updates} == {False}


def test_the_first_updates_are_made_again(tmp_path: Path) -> None:
    command = [sys.executable, PUBLISHED / "run.py", "--out", tmp_path, "--steps", "25"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    count, most = re.findall(r"(\d+) updates compared: losses differ by (\S+) nats at most", done.stdout)[0]
    assert count == "25" and float(most) < 1e-3
