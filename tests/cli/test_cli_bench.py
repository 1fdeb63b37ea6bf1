"""`elm-mlx bench` as it is called."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from elm_mlx.bench import results, sides


@pytest.fixture
def run(run: Run) -> Run:
    """`elm-mlx bench`."""
    return partial(run, "bench")


def test_from_a_model_to_three_files(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = ("--prompt-tokens", "16,32", "--new-tokens", 4, "--batch-size", 1, "--repeats", 2)
    code, out, err = run(tiny_model_dir, *options, "--against", "naive,llama.cpp", "--out", tmp_path / "out")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"quick.json", "quick.md", "quick.html"}
    found = results.load(tmp_path / "out" / "quick.json")
    assert found.complete and [(row.case.prompt, row.case.new) for row in found.rows] == [(16, 4), (32, 4)]
    for row in found.rows:
        assert {side: len(figures) for side, figures in row.figures.items()} == {"ours": 2, "naive": 2}
        assert "llama.cpp" in row.skipped
    kept = json.loads((tmp_path / "out" / "quick.json").read_text())
    assert all(set(row["roofline"]) == {"prompt", "decode"} for row in kept["rows"])
    assert "elm-mlx, naive RMSNorm" in out and "GFLOP/s" in out and "llama.cpp left out" in out
    assert f"wrote {tmp_path}/out/quick.json, .md and .html" in out
    assert err.count("prompt tokens/s") == 2


@pytest.mark.parametrize(
    ("options", "error"),
    [(("--suite", "all"), "--suite all: is not one of quick, m2max, full"),
     (("--prompt-tokens", "ten"), "needs whole numbers"),
     (("--against", "gpt"), "--against gpt: is not one of naive"), (("no-such-dir",), "no-such-dir: neither a model"),
     (("--compute-dtype", "int8"), "--compute-dtype int8: is not one of float32"), (("--repeats", "0"), "--repeats 0")],
)  # fmt: skip
def test_bad_input_is_one_line(options: tuple[str, ...], error: str, run: Run, tmp_path: Path) -> None:
    code, out, err = run(*options, "--out", tmp_path)
    assert code == 2 and err.startswith("elm-mlx: ") and error in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("at", [1, 2])
def test_stopped_before_anything_is_measured_it_says_so_and_leaves_nothing(
    at: int, run: Run, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, starts = sides.start, itertools.count(1)

    def stopped(*arguments: Any) -> sides.Side:
        if next(starts) == at:
            raise KeyboardInterrupt
        return start(*arguments)

    monkeypatch.setattr(sides, "start", stopped)
    code, out, err = run(tiny_model_dir, "--against", "naive", "--out", tmp_path / "new" / "out")
    assert (code, out) == (130, "nothing was measured, and nothing written\n"), err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_what_was_measured_and_no_process(
    number: signal.Signals, tiny_model_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "elm_mlx", "bench", tiny_model_dir, "--out", tmp_path / "out"]
    lengths = [
        "--prompt-tokens",
        "8,9,10,11,12,13,14,15",
        "--new-tokens",
        "300",
        "--repeats",
        "5",
        "--against",
        "naive",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [*command, *lengths], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None and process.stdout is not None
    assert any("prompt tokens/s" in line for line in process.stderr)
    process.send_signal(number)
    out = process.stdout.read()
    assert process.wait(30) == 130, process.stderr.read()
    found = results.load(tmp_path / "out" / "quick.json")
    assert not found.complete and found.rows and len(found.rows) < 8
    assert "Interrupted" in out and "Interrupted" in (tmp_path / "out" / "quick.html").read_text()
    if shutil.which("ps") is None:
        return
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in left.splitlines() if "bench.side_worker" in line and str(tiny_model_dir) in line]
