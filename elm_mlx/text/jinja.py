"""Chat templates in Jinja, rendered as transformers renders them, within limits.

A template comes with a model from anywhere, and nothing inside a process bounds what a single filter of it costs. So it
is rendered in a process of its own, `jinja_worker`, which the kernel ends after SECONDS and keeps below MEMORY; macOS
limits no memory, so there this side looks every few milliseconds. Whatever goes wrong is an error that names the
template's file. Importing this imports no Jinja and starts nothing.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import starmap
from types import MappingProxyType
from typing import Any, NamedTuple

from elm_mlx.errors import ElmError, InputError
from elm_mlx.reading import printable
from elm_mlx.text import child_process, jinja_worker

SECONDS = 2.0  # for all that is rendered at once
MEMORY = 200 << 20  # bytes that the process may take, Jinja's own 20 MB included

INSTEAD = "--template FILE takes another, --template none goes without one"

_CODE = 20 << 20  # bytes of libraries and stack, which the kernel does not count as data
_POLL = 5  # milliseconds
_WHAT = "renders chat templates"


class TemplateInput(NamedTuple):
    """The input of a template: messages, functions that may be called, and whether the generation prompt follows.

    `tools` are as in OpenAI's API; None for none. `variables` are those that this template reads beside.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = MappingProxyType({})


class Refusal(InputError):
    """The template does not take a conversation, or fails on it."""


class LimitError(ElmError):
    """The template does not stay within the limits. Not of its conversation alone: the next may cost as much."""

    exit_code = InputError.exit_code


def start() -> None:
    """Starts the process without waiting for it, so that it is ready when the model is."""
    with _lock:
        _running()


def stop() -> None:
    """Ends the process, if there is one. The next template gets another."""
    with _lock:
        if _process is not None:
            _process.end()


def render(
    source: str, where: str, conversations: Sequence[TemplateInput], names: Mapping[str, str]
) -> list[str | Refusal]:
    """Returns each conversation as text, or the error of the template that does not render it.

    Args:
        source: Jinja text.
        where: its file, for messages.
        names: the template's further variables, `bos_token` and the like.

    Raises:
        InputError: `source` is no Jinja.
        LimitError: it does not stay within the limits.
        ElmError: the process does not start.
    """
    variables = [
        {
            "documents": None,
            **more,
            **names,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": prompt,
            "tools": tools,
        }
        for messages, prompt, tools, more in starmap(TemplateInput, conversations)
    ]
    with _lock:
        try:
            answer = _running().ask(source, variables)
        except _EndedError as error:
            raise LimitError(f"{where}: the chat template {error} ({INSTEAD})") from None
    if "invalid" in answer:
        raise InputError(f"{_failure(where, answer['invalid'])} ({INSTEAD})")
    return [text if isinstance(text, str) else Refusal(_failure(where, text)) for text in answer["rendered"]]


def _failure(where: str, why: Mapping[str, Any]) -> str:
    line = "" if why["line"] is None else f", line {why['line']}"
    return f"{where}: the chat template fails{line}: {printable(why['reason'])}"


class _EndedError(Exception):
    """The process has ended; the text says why."""


class _Renderer:
    """The process that renders, from outside. One serves all templates."""

    def __init__(self) -> None:
        self._seconds, self._memory = SECONDS, MEMORY
        self._watched = not child_process.KERNEL_LIMITS_MEMORY
        limits = [str(SECONDS), str(0 if self._watched else MEMORY - _CODE)]
        command = [sys.executable, "-I", "-S", jinja_worker.__file__, *limits, *sys.path]
        self._process = child_process.start(command, _WHAT)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._arrival = select.poll()
        self._arrival.register(self._answers)
        self._ready = False
        self._source: str | None = None

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, source: str, conversations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the worker's answer. Raises _EndedError where none comes; after any error the process has ended."""
        try:
            if not self._ready and not self._answers.readline():
                raise ElmError(f"the process that {_WHAT} does not start: is jinja2 installed?")
            self._ready = True
            request = {"source": None if source == self._source else source, "conversations": conversations}
            with suppress(BrokenPipeError):  # the end of the answers says why
                self._requests.write(json.dumps(request).encode() + b"\n")
                self._requests.flush()
            self._source = source
            line = self._line()
            if not line.endswith(b"\n"):  # none, or one that it was ended amid
                raise _EndedError(self._why())
            answer: dict[str, Any] = json.loads(line)
            return answer
        except BaseException:  # Ctrl-C too: nobody waits for this answer any more
            self.end()
            raise

    def end(self) -> None:
        child_process.end(self._process)

    def _line(self) -> bytes:
        while self._watched and not self._arrival.poll(_POLL):
            if child_process.footprint(self._process.pid) > self._memory - _CODE:
                raise _EndedError(self._needs_memory())
        return self._answers.readline()

    def _why(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGALRM:
            return f"takes more than {self._seconds:g} s"
        if code == jinja_worker.TOO_MUCH_MEMORY:
            return self._needs_memory()
        if code == jinja_worker.TOO_MUCH_TEXT:
            return "writes without end"
        return f"ended the process that rendered it ({f'signal {-code}' if code < 0 else f'exit code {code}'})"

    def _needs_memory(self) -> str:
        return f"needs more than {self._memory >> 20} MB"


_lock = threading.Lock()
_process: _Renderer | None = None


def _running() -> _Renderer:
    global _process
    if _process is None or _process.ended:
        _process = _Renderer()
    return _process


def _forget() -> None:
    """Forgets the process in a fork of this one: the pipes are the parent's."""
    global _lock, _process
    _lock, _process = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)
atexit.register(stop)
