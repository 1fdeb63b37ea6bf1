"""A training run in the terminal as it goes: its updates and validations as lines, and a bar below them."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from elm_mlx.callbacks import TrainingCallback
from elm_mlx.cli.screen import byte_size, counted, duration, folded, line, printable, say, say_all, silence

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from elm_mlx.callbacks import Report

_SMOOTH = 0.1  # the share of an update in the loss that is shown
_EXCERPT = 100  # characters of a prompt, or of an answer
_SHOWN = ("margin", "accuracy", "reward", "entropy")  # measures
_IF_ANY = {"truncated": "cut off", "skipped_groups": "of the groups skipped", "clipped": "of the tokens clipped"}
_PAUSE = 10.0  # seconds between lines where there is no terminal
_BAR, _LEAST_BAR = 40, 8  # columns


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
