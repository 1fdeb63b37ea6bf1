"""The programs that are compared, each a process of its own: each with its own memory, its own BLAS, its own death."""

from __future__ import annotations

import json
import os
import shutil
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
from elm_mlx.bench.suites import BATCHED, About, Case, Figures


class Unavailable(Exception):
    """A side cannot be measured, or not in this case; the text is the reason."""


class Side(Protocol):
    """A program with a loaded model."""

    name: str
    about: About

    def measure(self, case: Case) -> Figures: ...
    def alive(self) -> bool: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Programs:
    """The places of the other programs.

    Attributes:
        python: a Python that has PyTorch; None for the one that runs.
        llama_bench: llama.cpp's program; None for the one on the PATH.
        gguf: the model as llama.cpp reads it.
    """

    python: str | None = None
    llama_bench: str | None = None
    gguf: Path | None = None


def start(name: str, path: Path, dtype: str | None, programs: Programs) -> Side:
    """Starts a side and loads the model in `path`. Raises Unavailable."""
    if name == "llama.cpp":
        return LlamaBench(programs)
    if name == "pytorch":
        python = str(reading.expanded(programs.python or sys.executable))
        try:
            found = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0
        except OSError as error:
            raise Unavailable(f"{python}: {error.strerror}") from None
        if not found:
            raise Unavailable(f"PyTorch is not installed for {python}; --python names one that has it")
        script = str(Path(__file__).with_name("torch_worker.py"))
        return WorkerSide(name, [python, "-I", script, str(path), dtype or "float32"])
    return WorkerSide(name, [sys.executable, "-m", "elm_mlx.bench.side_worker", name, str(path), dtype or "-"])


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

    def measure(self, case: Case) -> Figures:
        if case.batch > 1 and self.name not in BATCHED:
            raise Unavailable("takes one text at a time")
        assert self._process.stdin is not None
        asked = {"prompt": case.prompt, "new": case.new, "batch": case.batch}
        with suppress(OSError):  # it is dead, which is found next
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        return Figures(**self._answer())

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Kills the process, which has nothing to lose."""
        process = self._process
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, self._errors):
            assert pipe is not None
            with suppress(OSError):  # what was not yet written to it
                pipe.close()

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


class LlamaBench:
    """llama.cpp's `llama-bench`, which is started for each measurement and warms itself up."""

    name = "llama.cpp"

    def __init__(self, programs: Programs):
        found = shutil.which(reading.expanded(programs.llama_bench or "llama-bench"))
        if found is None:
            raise Unavailable("llama-bench is not on the PATH; --llama-bench says where it is")
        if programs.gguf is None:
            raise Unavailable("llama.cpp reads no MLX directories; --gguf names the same model as GGUF")
        self._command = [found, "-m", str(programs.gguf), "-r", "1", "-o", "json"]
        (answer,) = self._run("-p", "8", "-n", "0")
        self.about = About(
            f"llama.cpp {answer['build_commit']}", str(answer["model_type"]), int(answer["model_n_params"])
        )

    def measure(self, case: Case) -> Figures:
        if case.batch > 1:
            raise Unavailable("llama-bench measures one text at a time")
        read, *written = self._run("-p", str(case.prompt), "-n", str(case.new - 1))
        decode = float(written[0]["avg_ts"]) if written else 0.0
        return Figures(float(read["avg_ns"]) / 1e9, float(read["avg_ts"]), decode)

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        """There is nothing that stays."""

    def _run(self, *options: str) -> list[dict[str, Any]]:
        done = subprocess.run([*self._command, *options], capture_output=True, text=True, check=False)
        try:
            answer: list[dict[str, Any]] = json.loads(done.stdout)
            return answer
        except ValueError:
            lines = done.stderr.strip().splitlines()
            raise Unavailable(f"llama-bench: {lines[-1] if lines else f'ended with {done.returncode}'}") from None
