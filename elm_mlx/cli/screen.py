"""The screen: lines, labelled lines, notes and errors, tables, bars, and what a model writes.

All output goes through here, so that nothing from outside steers a terminal, and lines break between words. In a pipe a
line is one line, however long.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, TextIO

import typer

from elm_mlx.errors import InputError
from elm_mlx.reading import byte_size, counted, printable, stripped, visible

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from elm_mlx.documents.index_file import Passage
    from elm_mlx.documents.retrieval import DocumentIndex

__all__ = [
    "ProgressBar", "Speech", "bad_records_named", "bar", "byte_size", "counted", "duration",
    "folded", "line", "name_bad", "note", "printable", "say", "say_all", "show_sources", "silence",
    "table", "terminal_width", "visible",
]  # fmt: skip

reader_left = False  # that of stdout has: the command ends with the exit code of SIGPIPE
_NAMED = 50  # bad records that are named one by one: a file of another kind has as many as it has lines
_LONG_WORD = 24  # characters


def say(label: str, text: object, column: int = 12, err: bool = False) -> None:
    """Prints a label, and from `column` on the text."""
    line(f"{label:<{column - 1}} {text}", column, err)


def say_all(rows: Iterable[tuple[str, object]], column: int = 12, indent: int = 0) -> None:
    """Prints labels and texts, but for those without a text."""
    for label, text in rows:
        if text:
            say(" " * indent + label, text, column)


def note(text: object) -> None:
    """Prints what a person should know, or an error, on stderr under the program's name."""
    line(f"elm-mlx: {text}", err=True)


def line(text: str, column: int = 0, err: bool = False) -> None:
    """Prints a line; on a terminal it goes on at `column`. A reader that has left does not end the command's work."""
    global reader_left
    stream = sys.stderr if err else sys.stdout
    text = printable(text)
    try:
        print(folded(text, column) if stream.isatty() else text, file=stream, flush=True)
    except BrokenPipeError:
        silence(stream)
        reader_left |= not err


def show_sources(documents: DocumentIndex, sources: Sequence[Passage] | None) -> None:
    """Prints on stderr which passages an answer was given, by number; or that nothing was found."""
    if sources is None:
        return
    if not sources:
        line(f"nothing found in {documents.path}: answered without documents", err=True)
    for number, passage in enumerate(sources, 1):
        line(f"[{number}] {documents.shown(passage)}", 4, err=True)


def silence(stream: TextIO) -> None:
    """Discards what is written to `stream` from now on, the last flush included."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def folded(text: str, column: int = 0) -> str:
    """`text` in lines of the terminal's width, the second and later ones from `column` on.

    A word that no line can hold stays beside its label, and is the terminal's to break: a path can be copied.
    """
    width = terminal_width()
    indent = " " * (column if column <= width // 2 else 2)
    lines = textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    if len(lines) > 1 and lines[0] == text[:column].rstrip() and len(lines[1].split()[0]) > width - len(indent):
        lines[:2] = [text[:column] + lines[1].lstrip()]
    return "\n".join(lines)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> None:
    """Rows under `headers`, the columns in `left` flush left and the others right.

    Where a terminal is too narrow, headers break between words, and then cells go below each other.
    """
    headers, rows = [printable(header) for header in headers], [[printable(cell) for cell in row] for row in rows]
    columns = [*zip(*rows, strict=True)] or [()] * len(headers)
    heads = [[header] for header in headers]
    room = terminal_width() if sys.stdout.isatty() else sys.maxsize
    if _total(heads, columns) > room:
        least = [max(map(_cells, (*column, *header.split()))) for header, column in zip(headers, columns, strict=True)]
        heads = [textwrap.wrap(header, width) or [""] for header, width in zip(headers, least, strict=True)]
    if _total(heads, columns) > room:
        _below_each_other(headers, rows)
        return
    height = max(map(len, heads))
    padded = []
    for number, (head, column) in enumerate(zip(heads, columns, strict=True)):
        cells = [*[""] * (height - len(head)), *head, *column]
        width = max(map(_cells, cells))
        blanks = [" " * (width - _cells(cell)) for cell in cells]
        pairs = zip(cells, blanks, strict=True)
        padded.append([cell + blank if number in left else blank + cell for cell, blank in pairs])
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, row in enumerate(zip(*padded, strict=True)):
        text = "  ".join(row).rstrip()
        print(typer.style(text, bold=True) if bold and number < height else text)


def _total(heads: Sequence[Sequence[str]], columns: Sequence[Sequence[str]]) -> int:
    """Returns how many columns of the terminal a table takes."""
    return sum(max(map(_cells, (*head, *column))) + 2 for head, column in zip(heads, columns, strict=True)) - 2


def _below_each_other(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    column = 4 + max(map(_cells, headers[1:]))
    for row in rows:
        if row[0]:
            line(row[0], 2)
        for header, cell in zip(headers[1:], row[1:], strict=True):
            if cell:
                say(f"  {header}", cell, column)


class Speech:
    """Prints what a model writes as it comes: on a terminal without control characters, and broken between words."""

    def __init__(self) -> None:
        self._stream: TextIO = sys.stdout
        self._on_terminal = self._stream.isatty()
        self._column = 0  # of the cursor
        self._word = ""  # held back until it is known on which line it fits
        self._begun = False  # the beginning of the word is on the screen
        self.at_line_start = True

    def write(self, text: str, dim: bool = False) -> None:
        """Shows the next piece; on a terminal the word that it ends with may wait for the rest of it."""
        if text:
            self.at_line_start = text.endswith("\n")
        if self._on_terminal:
            text = self._broken(stripped(text))
            text = typer.style(text, dim=True) if dim and text else text
        print(text, end="", file=self._stream, flush=True)

    def finish(self) -> None:
        """Shows what was held back."""
        print(self._placed(), end="", file=self._stream, flush=True)

    def _broken(self, text: str) -> str:
        """Returns the part of `text`, and of what was held back, that is to be shown now."""
        done = []
        for character in text:
            if character == "\n":
                done += [self._placed(), "\n"]
                self._column, self._begun = 0, False
            elif character.isspace():
                done.append(self._placed())
                self._begun = False
                if self._column < terminal_width() - 1:
                    done.append(character)
                    self._column += 8 - self._column % 8 if character == "\t" else 1
                else:
                    done.append("\n")
                    self._column = 0
            elif _cells(character) == 2:  # of a script without spaces, which may break anywhere
                done.append(self._placed())
                self._word, self._begun = character, False
                done.append(self._placed())
            else:
                self._word += character
        if self._begun or self._column + _cells(self._word) + _LONG_WORD < terminal_width():
            done.append(self._placed())
        return "".join(done)

    def _placed(self) -> str:
        """Returns the word that was held back, on a new line where the cursor's has no room for it."""
        word, self._word, cells = self._word, "", _cells(self._word)
        if word and not self._begun and self._column and self._column + cells >= terminal_width():
            word, self._column = "\n" + word, 0
        self._column = (self._column + cells) % terminal_width()
        self._begun |= cells > 0
        return word


def terminal_width() -> int:
    """Columns of the terminal, or what COLUMNS says; 80 where there is none, or it says none."""
    return max(20, shutil.get_terminal_size().columns or 80)  # Python 3.10 leaves the 0 of a terminal that says none


def _cells(text: str) -> int:
    """Returns how many columns `text` takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def name_bad(reasons: Iterable[str]) -> None:
    """Prints each bad record on a line of stderr; of very many the first ones, and how many there are besides."""
    reasons = list(reasons)
    for reason in reasons[:_NAMED]:
        line(reason, err=True)
    if len(reasons) > _NAMED:
        line(f"… and {len(reasons) - _NAMED:,} more", err=True)


@contextmanager
def bad_records_named(path: str) -> Iterator[None]:
    """Prints all bad records, and not the first alone, before the InputError that ends the command."""
    from elm_mlx.data.examples import BadRecords

    try:
        yield
    except BadRecords as error:
        name_bad(error.reasons)
        count, they = counted(len(error.reasons), "bad record"), "it" if len(error.reasons) == 1 else "them"
        raise InputError(f"{path}: {count}; mend {they}, or --skip-bad leaves {they} out") from None


class ProgressBar:
    """Shows how work goes on as a bar on stderr, where someone is looking. It is called as `OnProgress`.

    Args:
        unit: what is counted and shown beside the bar: "bytes", "items" or nothing.
    """

    def __init__(self, unit: Literal["bytes", "items", ""] = "") -> None:
        self._unit = unit
        self._bars: RichProgress | None = None
        self._done = self._total = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.hide()

    def hide(self) -> None:
        """Takes the bar off the screen; the next call begins a new one."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, what: str, done: int = 0, total: int = 0, /) -> None:
        if not sys.stderr.isatty():
            return
        if self._bars is None:
            self._bars = self._begun()
        (task,) = self._bars.task_ids
        if total != self._total or done < self._done:
            self._bars.reset(task, total=total or None)
        self._bars.update(task, description=printable(what), completed=done)
        self._done, self._total = done, total

    def _begun(self) -> RichProgress:
        from rich import progress
        from rich.console import Console

        counts: list[progress.ProgressColumn] = []
        if self._unit:
            counts = [progress.DownloadColumn() if self._unit == "bytes" else progress.MofNCompleteColumn()]
        columns = [
            progress.TextColumn("{task.description:<12}", markup=False), progress.BarColumn(), *counts,
            progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), progress.TextColumn("left"),
        ]  # fmt: skip
        bars = progress.Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
        bars.add_task("", total=None)
        bars.start()
        return bars


def bar(share: float, width: int) -> str:
    """Returns a bar of eighths of a character, `width` characters at a `share` of 1, and never none."""
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def duration(seconds: float) -> str:
    """Returns a time as `2 h 5 min`, `5 min 3 s` or `4.2 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
