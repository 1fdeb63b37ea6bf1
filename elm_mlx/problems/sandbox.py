"""Runs code that a model wrote, without files, network, environment or processes, and returns what its function does.

The code runs in a fork of a process of its own (`sandbox_worker`, which says what holds it). The values that it should
return stay here: it gets inputs, and what it says about them is compared by whoever asks. Where the system does not
hold the code back, none is run. Importing this starts nothing.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from elm_mlx.errors import ElmError
from elm_mlx.problems import sandbox_worker
from elm_mlx.reading import printable
from elm_mlx.text import child_process

SECONDS = 1.0  # of computing, for all inputs of an answer together
MEMORY = 128 << 20  # bytes, beside what Python itself has
WRITTEN = 1 << 20  # bytes of all values, as JSON

_DIGITS = 1000  # of a whole number
_WORKER = Path(sandbox_worker.__file__)


class CodeError(Exception):
    """The code gives no values; the text says why, in the words of the code if it raises something."""


def values(source: str, function: str, inputs: Sequence[Sequence[Any]]) -> list[Any]:
    """Returns the values of a function for several inputs, of JSON's kinds, a tuple as a list.

    They are what the code says they are: hold them against what is expected, and never let the code do that.

    Args:
        source: Python, which defines `function`. It can import what the standard library has for computing.
        inputs: the arguments of each call, of JSON's kinds.

    Raises:
        CodeError: the code raises something, exceeds a limit, ends itself, or returns what is no JSON.
        ElmError: the system does not hold code back, or the process does not start.
    """
    global _process
    with _lock:
        if _process is None or _process.ended:
            _process = _Worker()
        written, ended = _process.ask({"source": source, "function": function, "inputs": inputs})
    if ended is not None:
        raise CodeError(_reason(ended))
    try:
        outcome = json.loads(written, parse_int=_whole)
    except (ValueError, RecursionError):
        outcome = None
    if not isinstance(outcome, dict):
        raise CodeError(_reason(sandbox_worker.NOTHING))
    found = outcome.get("values")
    if not isinstance(found, list) or len(found) != len(inputs):
        raise CodeError(printable(outcome.get("failure", _reason(sandbox_worker.NOTHING))))
    return found


def stop() -> None:
    """Ends the process, if there is one. The next call starts another."""
    with _lock:
        if _process is not None:
            _process.end()


def _reason(ended: str) -> str:
    reasons = {
        sandbox_worker.TIME: f"the code takes more than {SECONDS:g} s",
        sandbox_worker.SPACE: f"the code needs more than {MEMORY >> 20} MB",
        sandbox_worker.TEXT: f"the code returns more than {WRITTEN >> 10} KB",
        sandbox_worker.NOTHING: "the code ended its process without a result",
    }
    return reasons.get(ended, f"the code ended its process ({ended})")


def _killed() -> ElmError:
    return ElmError("the process that runs the code of answers was ended from outside; run this again")


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError
    return int(text)


class _Worker:
    """The process, from outside."""

    def __init__(self) -> None:
        # No -I: the order of a set of strings, which an answer may depend on, is the same each time.
        environment = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}
        environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        limits = [str(SECONDS), str(MEMORY), str(WRITTEN)]
        command = [sys.executable, "-S", str(_WORKER), *limits]
        self._process = child_process.start(command, "runs the code of answers", "/", environment)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        tried = self._line()
        if tried != {"escapes": [], "values": [2]}:
            self.end()
            why = ", ".join(tried.get("escapes", [])) or tried.get("failure", "it computes nothing")
            raise ElmError(
                f"the code of answers is not run: this system does not hold it back ({printable(why)}); "
                "docs/tasks.md has what is needed"
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, request: dict[str, Any]) -> tuple[bytes, str | None]:
        """Returns what the fork wrote, or what ended it. After any error the process has ended."""
        try:
            data = json.dumps(request).encode()
            left = memoryview(len(data).to_bytes(sandbox_worker.SIZED, "big") + data)
            with suppress(BrokenPipeError):  # the end of the answers says why
                while left:  # not by a buffer: a fork of this process would write its copy once more
                    left = left[os.write(self._requests.fileno(), left) :]
            answer = self._line()
            written = self._answers.read(answer["size"])
            if len(written) < answer["size"]:
                raise _killed()
            return written, answer["ended"]
        except BaseException:  # Ctrl-C too: nobody waits for this answer any more
            self.end()
            raise

    def end(self) -> None:
        child_process.end(self._process)

    def _line(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line.endswith(b"\n"):
            self.end()
            raise _killed()
        answer: dict[str, Any] = json.loads(line)
        return answer


_lock = threading.Lock()
_process: _Worker | None = None


def _forget() -> None:
    """Forgets the process in a fork of this one: the pipes are the parent's."""
    global _lock, _process
    _lock, _process = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)
atexit.register(stop)
