"""The command as a process: however early Ctrl-C comes and however soon a reader leaves, it ends without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import elm_mlx

PROGRAM = [sys.executable, "-X", "importtime", "-m", "elm_mlx"]  # which tells on stderr how far it is


@pytest.mark.parametrize("module", ["elm_mlx.errors", "elm_mlx.cli", "typer", "mlx.core", "elm_mlx.store.loading"])
def test_ctrl_c_while_it_begins_is_quiet(tiny_model_dir: Path, module: str) -> None:
    command = [*PROGRAM, "generate", str(tiny_model_dir), "the fox", "--max-tokens", "400"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rstrip().endswith(f" {module}"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), rest[-500:]
    said = [line for line in rest.splitlines() if not line.startswith(("import time:", "elm-mlx: bfloat16", "prompt:"))]
    assert not said


@pytest.mark.parametrize(
    "arguments",
    [
        ["-h"], ["info", "MODEL"], ["generate", "MODEL", "the fox", "--max-tokens", "400"],
        ["data", "a.jsonl", "--model", "MODEL"], ["export", "MODEL", "out"],
    ],
)  # fmt: skip
def test_a_reader_that_leaves_gets_the_exit_code_of_it(
    tiny_model_dir: Path, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the fox"}\n' * 20)
    command = [
        sys.executable,
        "-m",
        "elm_mlx",
        *(str(tiny_model_dir) if each == "MODEL" else each for each in arguments),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 128 + signal.SIGPIPE
    assert arguments[0] != "export" or (tmp_path / "out" / "checkpoint.pt").exists(), "its work is done all the same"
    assert not [line for line in errors.splitlines() if not line.startswith(("elm-mlx: bfloat16", "prompt:"))]


@pytest.mark.parametrize("arguments", [["-h"], ["--version"], ["info", "MODEL"], ["info", "MODEL", "--json"]])
def test_a_full_disk_is_one_line(tiny_model_dir: Path, arguments: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "elm_mlx",
        *(str(tiny_model_dir) if each == "MODEL" else each for each in arguments),
    ]
    with Path("/dev/full").open("w") if Path("/dev/full").exists() else pytest.skip("no /dev/full") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and "No space left" in done.stderr and done.stderr.count("\n") == 1


def test_another_package_that_imports_this_one_keeps_its_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import elm_mlx\n")
    (tmp_path / "theirs" / "__main__.py").write_text(
        "import signal\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(elm_mlx.__file__).parents[1])])}
    subprocess.run([sys.executable, "-m", "theirs"], env=environment, check=True, timeout=60)
