"""The programs that are compared, each a process of its own: each with its own memory, its own BLAS, its own death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from elm_mlx import reading
from elm_mlx.bench.suites import About, Case, Figures, Measured
from elm_mlx.errors import InputError
from elm_mlx.text import child_process


class Unavailable(Exception):
    """A side cannot be measured, or not in this case; the text is the reason."""


class Side(Protocol):
    """A program with a loaded model."""

    name: str
    about: About

    def measure(self, case: Case) -> Measured: ...
    def alive(self) -> bool: ...
    def close(self) -> None: ...


_PATIENCE = 120  # seconds for a Python that imports a package, the first time from a slow disk
_QUANTIZE_KEYS = ("ours", "naive", "prompt-lookup", "kvp", "mlx-lm", "mlx-lm-stock")  # sides


@dataclass(frozen=True)
class Programs:
    """The places of the other programs.

    Attributes:
        python: a Python that has PyTorch, or llama-cpp-python; None for the one that runs.
        gguf: the model as llama.cpp reads it; None to write it from the directory.
        kvp: a KV prediction for the model.
    """

    python: str | None = None
    gguf: Path | None = None
    kvp: Path | None = None


def start(name: str, path: Path, dtype: str | None, programs: Programs) -> Side:
    """Starts a side and loads the model in `path`. Raises Unavailable."""
    python = str(reading.expanded(programs.python or sys.executable))
    if name == "pytorch":
        _require(python, "PyTorch", "torch")
        return WorkerSide(name, [*_script(python, "torch_worker.py"), str(path), dtype or "float32"])
    if name == "llama.cpp":
        _require(python, "llama-cpp-python", "llama_cpp")
        if programs.gguf is not None:
            return WorkerSide(name, [*_script(python, "llama_worker.py"), str(programs.gguf)])
        with tempfile.TemporaryDirectory(prefix="elm-mlx-gguf-") as scratch:  # what is loaded needs no name
            copy = str(Path(scratch, f"{path.name}.gguf"))
            _write_gguf(path, copy)
            return WorkerSide(name, [*_script(python, "llama_worker.py"), copy])
    if name == "kvp" and programs.kvp is None:
        raise Unavailable("--kvp names a KV prediction for the model")
    command = [sys.executable, "-m", "elm_mlx.bench.side_worker", name, str(path), dtype or "-"]
    return WorkerSide(name, [*command, str(programs.kvp)] if name == "kvp" else command)


def _write_gguf(path: Path, to: str) -> None:
    """Writes a model with the same weights for llama.cpp. Raises Unavailable where it has no types for them."""
    from elm_mlx_convert import export_gguf

    try:
        done = export_gguf(path, to)
    except InputError as error:
        raise Unavailable(f"{error}; --gguf names a file of it") from None
    if done.roundings:
        each = done.roundings[0]
        raise Unavailable(f"llama.cpp has no type for the same weights of {each.before}; --gguf names a file of it")


def _script(python: str, name: str) -> list[str]:
    """The command of a file here, for another Python, which is given nothing of ours."""
    return [python, "-I", str(Path(__file__).with_name(name))]


def _require(python: str, what: str, module: str) -> None:
    """Raises Unavailable where `python` lacks a package."""
    where = "" if python == sys.executable else f" for {python}"  # results are shared, and a home directory is private
    try:
        command = [python, "-I", "-c", f"import {module}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_PATIENCE)
    except OSError as error:
        raise Unavailable(f"{python}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"importing {what} took more than {_PATIENCE} s{where}") from None
    if done.returncode:
        raise Unavailable(f"{what} is not installed{where}; --python names a Python that has it")


def environment(name: str) -> dict[str, str]:
    """The environment without settings of OpenBLAS, which would decide the result; and for mlx-lm as it is installed
    without our BLAS."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    return kept | ({"ELM_MLX_BLAS": "off"} if name == "mlx-lm-stock" else {})


class WorkerSide:
    """A process that answers a line of JSON with a line."""

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=environment(name), start_new_session=True,  # Ctrl-C is for us
        )  # fmt: skip
        try:
            answer = self._answer()
            self.about = About(**(answer | {"notes": tuple(answer.get("notes", ()))}))
        except BaseException:
            self.close()
            raise

    def measure(self, case: Case) -> Measured:
        assert self._process.stdin is not None
        if case.kv_bits is not None and self.name not in _QUANTIZE_KEYS:
            raise Unavailable("keys and values in bits are not measured for it")
        asked = {"prompt": case.prompt, "new": case.new, "batch": case.batch, "kv_bits": case.kv_bits}
        with suppress(OSError):  # it is dead, which is found next
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        text = answer.pop("text")
        return Figures(**answer), text

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Kills the process, which has nothing to lose."""
        child_process.end(self._process)
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        """Reads its next line. Raises Unavailable where that is an error, or where it died, with its last words."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise Unavailable(answer["error"])
            return answer
        code = self._process.wait()
        if code == -signal.SIGKILL:
            raise Unavailable("was killed, probably for lack of memory")
        self._errors.seek(0)
        words = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        raise Unavailable(words[-1] if words else f"ended with {code}")
