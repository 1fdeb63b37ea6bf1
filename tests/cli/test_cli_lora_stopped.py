"""`elm-mlx lora` killed, stopped, left by its terminal: what is there afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
from training_runs import updates, write_data

from elm_mlx.directories import checkpoints_of
from elm_mlx.store.loading import load_model
from elm_mlx.train import checkpoint


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def on_terminal(model: Path, data: Path, out: Path, *more: object) -> Any:
    """A run without end, on a terminal of 140 columns."""
    arguments = ["-m", "elm_mlx", "lora", model, "--data", data, "--out", out, "--iters", 100_000, *more]
    # Not the environment of this process, to which readline has added its own idea of COLUMNS.
    return pexpect.spawn(
        sys.executable, [*map(str, arguments)], timeout=60, encoding="utf-8", dimensions=(40, 140),
        env=dict(os.environ),
    )  # fmt: skip


def test_killed_and_resumed(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Twice killed without warning, the run's losses are those of one that lived."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "elm_mlx", "lora", str(tiny_model_dir), "--data", str(data)]
    options = ["--iters", "40", "--steps-per-eval", "9", "--save-every", "4", "--batch-size", "2", "--dropout", "0.1"]
    subprocess.run([*command, "--out", str(whole), *options], check=True, capture_output=True)
    for after, resume in ((7, []), (21, ["--resume"])):
        with subprocess.Popen([*command, "--out", str(out), *options, *resume], stdout=subprocess.DEVNULL) as process:
            while not ((out / "metrics.jsonl").exists() and f'"step": {after},' in (out / "metrics.jsonl").read_text()):
                assert process.poll() is None
            process.kill()
    subprocess.run([*command, "--out", str(out), *options, "--resume"], check=True, capture_output=True)
    assert updates(out) == updates(whole)


def test_ctrl_c_on_a_terminal_saves_and_ends(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    child = on_terminal(tiny_model_dir, data, tmp_path / "out")
    child.expect(r"loss \d+\.\d+, [\d,]+ tokens/s(?:, \d+% of matmul speed)?, [\d.]+ [MG]B")  # the bar
    os.kill(child.pid, signal.SIGINT)
    child.expect(r"stopped   after [\d,]+ updates; --resume goes on")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130 and (tmp_path / "out" / "adapters.safetensors").exists()
    assert load_model(tiny_model_dir, adapter_path=tmp_path / "out") is not None


def test_ctrl_c_before_the_first_update_is_answered_and_ends(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Twice, even: the second comes while the process ends, or does nothing. Under load the first may come too late."""
    out = tmp_path / "out"
    more = ("--batch-size", 64, "--no-pack")
    (data / "train.jsonl").write_text((data / "train.jsonl").read_text() * 200)
    child = on_terminal(tiny_model_dir, data, out, *more)
    child.expect("measuring an update")
    answers = ["stopping, with nothing to save yet; Ctrl-C again ends", "stopping after this update; Ctrl-C again ends"]
    for _ in range(6):  # MLX's first compilation asks for g++ by system(), during which signals are lost
        os.kill(child.pid, signal.SIGINT)
        late = child.expect([*answers, pexpect.TIMEOUT], timeout=10)
        if late < len(answers):
            break
    assert late < len(answers)
    os.kill(child.pid, signal.SIGINT)
    child.expect(pexpect.EOF)
    child.close()
    assert "Traceback" not in child.before and "Exception" not in child.before
    assert child.exitstatus == 130 or child.signalstatus == signal.SIGINT
    assert late or not checkpoints_of(out)


def test_a_closed_terminal_loses_nothing(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = on_terminal(tiny_model_dir, data, out)
    child.expect(r"tokens/s")  # the bar
    child.ptyproc.fileobj.close()  # what is written now fails, and SIGHUP comes
    assert child.wait() == 130 and (out / "adapters.safetensors").exists()
    made = [step for step, _ in updates(out)]
    assert checkpoints_of(out)[-1] == checkpoint.directory(out, made[-1])


def test_a_listener_that_ctrl_c_ended_too_loses_nothing(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """As `elm-mlx lora … | tee log`."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "elm_mlx",
        "lora",
        tiny_model_dir,
        "--data",
        data,
        "--out",
        out,
        "--iters",
        100_000,
    ]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while not ((out / "metrics.jsonl").exists() and '"step": 1,' in (out / "metrics.jsonl").read_text()):
            assert process.poll() is None
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 130 and (out / "adapters.safetensors").exists()
