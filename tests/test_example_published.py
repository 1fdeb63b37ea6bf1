"""The published run: its page is what its checkpoints give, and its log is made again by its configuration."""

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
RUN = PUBLISHED / "run"


def test_the_pages_losses_are_those_of_the_checkpoints(tmp_path: Path) -> None:
    page = PUBLISHED.joinpath("README.md").read_text("utf-8")
    shared = {name: runpy.run_path(str(ROOT / "examples" / f"{name}.py")) for name in ("books", "measure")}
    checkpoints = sorted((RUN / "checkpoints").iterdir())
    assert len(checkpoints) == page.count("| after ")
    for name, some in (("mean of the last 5", checkpoints[-5:]), ("after 600 updates", checkpoints[-1:])):
        average(some, tmp_path / name)
        model, tokenizer = load(tmp_path / name, compute_dtype="float32")
        (row,) = re.findall(rf"^\| {name} \|.*$", page, re.MULTILINE)
        books = shared["books"]["read"](ROOT / "examples/classics/held-out.jsonl.gz")
        for book, cell in zip(books, row.split("|")[3:-1], strict=True):
            found = shared["measure"]["held_out_loss"](model, tokenizer, book["text"], windows=32, length=256)
            assert [float(figure) for figure in cell.split(",")] == pytest.approx([*found], abs=2e-4)


def test_the_log_is_that_of_the_recipe() -> None:
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text("utf-8").splitlines()]
    settings = json.loads((RUN / "run.json").read_text("utf-8"))["settings"]
    updates = [line for line in lines if "loss" in line]
    assert [line["step"] for line in updates] == [*range(1, settings["optimizer"]["steps"] + 1)]
    assert sum("valid_loss" in line for line in lines) == 1 + len(updates) // settings["run"]["eval_every"]
    assert updates[-1]["tokens"] == 2048 and {line["skipped"] for line in updates} == {False}


def test_the_first_updates_are_made_again(tmp_path: Path) -> None:
    command = [sys.executable, PUBLISHED / "run.py", "--out", tmp_path, "--steps", "25"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    count, most = re.findall(r"(\d+) updates compared: losses differ by (\S+) nats at most", done.stdout)[0]
    assert count == "25" and float(most) < 1e-3
