"""The screen: lines, labelled lines, notes and errors, tables, bars, what a model writes, a training run as it goes.

All output goes through here, so that nothing from outside steers a terminal, and lines break between words. In a pipe a
line is one line, however long.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TextIO

import typer

from elm_mlx.callbacks import TrainingCallback
from elm_mlx.errors import InputError
from elm_mlx.reading import byte_size, counted, printable, stripped, visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.progress import Progress as RichProgress

    from elm_mlx.callbacks import Report
    from elm_mlx.documents.index_file import Passage
    from elm_mlx.documents.retrieval import DocumentIndex

__all__ = [
    "ProgressBar", "Speech", "TrainingDisplay", "bad_records_named", "bar", "byte_size", "counted", "duration",
    "folded", "line", "name_bad", "note", "printable", "say", "say_all", "show_sources", "shown_measures", "silence",
    "table", "terminal_width", "visible",
]  # fmt: skip

reader_left = False  # that of stdout has: the command ends with the exit code of SIGPIPE
_NAMED = 50  # bad records that are named one by one: a file of another kind has as many as it has lines
_LONG_WORD = 24  # characters
_SMOOTH = 0.1  # the share of an update in the loss that is shown
_EXCERPT = 100  # characters of a prompt, or of an answer
_SHOWN = ("margin", "accuracy", "reward", "entropy")  # measures
_IF_ANY = {"truncated": "cut off", "skipped_groups": "of the groups skipped", "clipped": "of the tokens clipped"}
_PAUSE = 10.0  # seconds between lines where there is no terminal
_BAR, _LEAST_BAR = 40, 8  # columns


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


class TrainingDisplay(TrainingCallback):
    """Shows the reports of a run of `steps` updates, between `with` and its end.

    Attributes:
        validates: whether the run does.
        asks: whether validations ask the model, and their losses are shares of wrong answers.
        quiet: to show nothing.

    Args:
        every: updates between lines; None for a bar, or a line every few seconds.
    """

    def __init__(self, steps: int, validates: bool = True, quiet: bool = False, every: int | None = None):
        self._steps, self.validates, self.quiet, self._every = steps, validates, quiet, every
        self.asks = False
        self._loss: float | None = None
        self._base: float | None = None  # the validation's loss before training
        self._rate = self._seconds = self._matmul = 0.0
        self._updates, self._resumed = 0, False
        self._measures: dict[str, float] = {}
        self._sampled = self._spent = 0.0  # seconds of sampling, and of all updates
        self._last = self._told = time.monotonic()  # the last line of an update, and of what is being done
        self._step, self._shown, self._doing = 0, list[str](), ""
        self._bar: Live | None = None

    def lines(self, lines: Iterable[tuple[str, str]]) -> None:
        """Prints labels and texts."""
        if not self.quiet:
            say_all(lines, 10)

    def warn(self, text: str) -> None:
        """Prints a warning on stderr."""
        if not self.quiet:
            say("warning", text, 10, err=True)

    def ready(self, seconds: float, left: int) -> None:
        """Prints how long the run is going to take."""
        self._seconds = seconds
        if not self.quiet:
            also = " and validations" if self.validates else ""
            self.say(f"time      about {duration(seconds * left)}{also}, {seconds:.2g} s an update")

    def progress(self, what: str, done: int = 0, total: int = 0, /) -> None:
        """Shows what is being done in place of what is known of the updates; without a bar, where it has parts."""
        self._doing = f"{what}: {done:,} of {total:,}" if total else what
        if self._bar is not None:
            if not done:
                with _if_anyone_looks():
                    self._bar.refresh()  # at once: what follows may keep this thread, and others, from it
        elif total and not self.quiet and time.monotonic() - max(self._last, self._told) > _PAUSE:
            self._told = time.monotonic()  # not `_last`: updates that take long to sample have lines all the same
            self.say(self._doing)

    def resumed(self, step: int) -> None:
        """Begins the bar at the update that the run is resumed from."""
        self._step, self._resumed = step, True
        if not self.quiet:
            self.say(f"resumed   after {counted(step, 'update')}")

    def __enter__(self) -> TrainingDisplay:
        if not self.quiet and sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console()
            self._bar = Live(console=console, get_renderable=lambda: self._line(console.width))
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            with _if_anyone_looks():
                self._bar.stop()

    def report(self, report: Report) -> None:
        """Shows an update or a validation."""
        if self.quiet:
            return
        self._doing = ""
        if report.valid_loss is not None:
            self._validated(report)
        elif report.loss is not None:
            self._updated(report)

    def _updated(self, report: Report) -> None:
        assert report.loss is not None and report.tokens_per_second is not None and report.memory is not None
        self._step = report.step
        if report.skipped:
            self.say(f"step {report.step:,}: left out, with a loss of {report.loss:.4g}")
            return
        self._updates += 1
        self._loss = report.loss if self._loss is None else self._loss + _SMOOTH * (report.loss - self._loss)
        share = 1.0 if self._updates <= 2 else _SMOOTH  # the first waits until the window of texts is filled
        self._rate += share * (report.tokens_per_second - self._rate)
        self._matmul += share * ((report.matmul_share or 0.0) - self._matmul)
        if self._updates > 1 or not self._seconds:
            self._seconds += share * ((report.seconds or 0.0) - self._seconds)
        for name, value in report.measures.items():
            before = self._measures.get(name, value)
            self._measures[name] = before + _SMOOTH * (value - before)
        sampled = report.measures.get("sampling_seconds")
        # A policy gradient's loss is about 0, whatever is learnt.
        self._shown = [f"loss {self._loss:.3f}"] if sampled is None else []
        self._shown += [*shown_measures(self._measures), f"{self._rate:,.0f} tokens/s"]
        if report.matmul_share:
            self._shown.append(f"{self._matmul:.0%} of matmul speed")
        if sampled is not None:
            self._sampled, self._spent = self._sampled + sampled, self._spent + (report.seconds or 0.0)
            share, each = self._sampled / max(self._spent, 1e-9), self._spent / self._updates
            parts = (("sampling", share), ("training", 1 - share))
            self._shown += [f"{part:.0%} {what} ({duration(part * each)})" for what, part in parts]
        self._shown.append(byte_size(report.memory))
        if self._every is None:
            due = self._bar is None and (time.monotonic() - self._last > _PAUSE or report.step == self._steps)
        else:
            due = report.step % self._every == 0 or report.step == self._steps
        if due:
            self._last = time.monotonic()
            left = duration((self._steps - report.step) * self._seconds)
            self.say(f"step {report.step:,} of {self._steps:,}: {', '.join(self._shown)}, {left} left")

    def _line(self, width: int) -> RenderableType:
        """Returns the bar as it is now."""
        left = str(timedelta(seconds=round((self._steps - self._step) * self._seconds))) if self._seconds else "-:--:--"
        texts = [self._doing] if self._doing else self._shown
        return bar_line(width, self._step, self._steps, texts, left)

    def stopping(self) -> None:
        """Confirms Ctrl-C."""
        if self.quiet:
            return
        begun = self._updates or self._resumed
        self.say(
            f"stopping{' after this update' if begun else ', with nothing to save yet'}; Ctrl-C again ends at once"
        )

    def _validated(self, report: Report) -> None:
        loss, asked = report.valid_loss, self.asks
        assert loss is not None
        texts = [*([] if asked else [f"validation loss {loss:.4f}"]), *shown_measures(report.measures)]
        if report.step == 0:
            self._base = loss
        elif report.best:
            texts.append("the best yet")
        elif self._base is not None and not loss < self._base:
            texts.append(f"no better than {'' if asked else f'the {self._base:.4f} '}before training")
        self.say(f"step {report.step:,}: {'held-out problems: ' if asked else ''}{', '.join(texts)}")
        for sample in report.samples or ():
            self.say(f"  {sample.verdict}: {_in_a_line(sample.prompt)} → {_in_a_line(sample.answer)}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar."""
        with _if_anyone_looks():
            if self._bar is not None:
                text = folded(printable(text), 10)
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                line(text, 10)


@contextmanager
def _if_anyone_looks() -> Iterator[None]:
    """Lets a run go on that nobody sees any more: its terminal is closed, or Ctrl-C has ended its `tee` too."""
    try:
        yield
    except OSError:
        silence(sys.stdout)


def _in_a_line(text: str) -> str:
    """Returns a text's beginning, or all of it, without its line breaks."""
    return textwrap.shorten(text, _EXCERPT, placeholder=" …") or "nothing"


def shown_measures(measures: Mapping[str, float]) -> list[str]:
    """Returns the measures of pairs and of answers that are shown; the others are in the metrics."""
    shown = [f"{name} {value:.3g}" for name, value in measures.items() if name in _SHOWN or name.startswith("pass@")]
    more = [(name, words) for name, words in _IF_ANY.items() if measures.get(name, 0) >= 0.005]  # not 0%
    return shown + [f"{measures[name]:.0%} {words}" for name, words in more]


def bar_line(width: int, step: int, steps: int, texts: Sequence[str], left: str) -> RenderableType:
    """Returns `width` columns with the step, the time `left`, and as many of `texts` from the first on as fit."""
    from rich import progress_bar
    from rich.table import Table
    from rich.text import Text

    count, left = f"{step:,}/{steps:,}", f"{left} left"
    room = width - len(count) - len(left) - 2  # for a bar and a text, with a space between
    joined = (", ".join(texts[:number]) for number in range(len(texts), 0, -1))
    text = next((text for text in joined if len(text) + 1 + _LEAST_BAR <= room), ", ".join(texts[:1]))
    if len(text) > room:
        text = ""
    bar = min(_BAR, room - len(text) - 1)
    parts: list[RenderableType] = [count, progress_bar.ProgressBar(steps, step, width=bar)] if bar > 0 else [count]
    grid = Table.grid(padding=(0, 1))
    grid.add_row(*parts, Text(text, no_wrap=True), Text(left, "progress.remaining", no_wrap=True))
    return grid


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
