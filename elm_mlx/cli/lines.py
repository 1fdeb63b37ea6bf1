"""Lines from whoever talks to us: a person at a terminal, with editing and a history that lasts, or a pipe.

Knows terminals and the history file; knows nothing of what the lines mean.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elm_mlx import files, reading

_KEPT = 1000  # lines of history


def interactive() -> bool:
    """Whether a person types to us and reads what we say."""
    return sys.stdin.isatty() and sys.stdout.isatty()


@contextmanager
def without_echo() -> Iterator[None]:
    """What is typed meanwhile at a terminal does not show amid the output. It is kept for the next line."""
    import termios

    try:
        before = termios.tcgetattr(sys.stdin)
        quiet = list(before)
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    except (termios.error, OSError):  # no terminal any more
        yield
        return
    try:
        yield
    finally:
        with suppress(termios.error, OSError):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class Pipe:
    """Lines as they come."""

    def __init__(self) -> None:
        self._number = 0

    def read(self, prompt: str) -> str:
        """The next line, without its end. Raises EOFError when there is none, InputError where it is no text."""
        self._number += 1
        where = f"stdin, line {self._number}"
        line = reading.limited_line(sys.stdin.buffer, reading.TEXT_BYTES, where)
        if not line:
            raise EOFError
        return reading.decoded_line(reading.unmarked(line, where) if self._number == 1 else line, where).rstrip("\r\n")


class Terminal:
    """Lines that a person edits, and finds again with arrow-up, next time too, where a history can be kept."""

    def __init__(self) -> None:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        self._history = _history_path()
        self._last = ""
        with suppress(ImportError):  # a Python without it still reads lines
            import readline

            for line in self._recall():
                with suppress(ValueError):  # what no terminal has typed, such as NUL
                    readline.add_history(line)
            if "libedit" not in (readline.__doc__ or "") and os.environ.get("TERM", "dumb") != "dumb":
                readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text is one line, whole

    def read(self, prompt: str) -> str:
        """The next line, without its end. Raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C."""
        line = input(prompt)
        if line.strip() and line != self._last:
            self._last = line
            self._remember(line)
        return line

    def _recall(self) -> list[str]:
        if self._history is None:
            return []
        try:
            records = self._history.read_text(encoding="utf-8", errors="replace").splitlines()
            if len(records) > 2 * _KEPT:
                with files.new_file(self._history) as file:
                    os.fchmod(file.fileno(), 0o600)
                    file.write("".join(f"{record}\n" for record in records[-_KEPT:]).encode())
        except Exception:  # of a comfort, nothing is worth an error
            return []
        lines = []
        for record in records[-_KEPT:]:
            with suppress(ValueError, RecursionError):
                lines.append(json.loads(record))
        return [line for line in lines if isinstance(line, str)]

    def _remember(self, line: str) -> None:
        """A line in a file of JSON strings: it may have line ends of its own, if it was pasted."""
        if self._history is None:
            return
        with suppress(OSError):
            descriptor = os.open(self._history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, (json.dumps(line) + "\n").encode())
            finally:
                os.close(descriptor)


def _history_path() -> Path | None:
    """The file in the user's state directory; None where there can be none."""
    try:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        directory = Path(base, "elm-mlx")
        if not directory.is_absolute():  # an empty HOME
            return None
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    return directory / "chat_history"
