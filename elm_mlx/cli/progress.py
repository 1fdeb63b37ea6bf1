"""A training run as it goes: a bar on a terminal, lines elsewhere.

Knows reports and how they are shown. Knows nothing of how a run is made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from elm_mlx.callbacks import TrainingCallback
from elm_mlx.cli.show import byte_size, counted, folded, line, printable, say, silence

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from elm_mlx.callbacks import Report

_SMOOTH = 0.1  # the share of an update in the loss that is shown
_PAUSE = 10.0  # seconds between lines where there is no terminal
_BAR, _LEAST_BAR = 40, 8  # columns


class Progress(TrainingCallback):
    """Shows the reports of a run of `steps` updates, between `with` and its end.

    Attributes:
        validates: whether the run does.
        quiet: to show nothing.
    """

    def __init__(self, steps: int, validates: bool = True, quiet: bool = False):
        self._steps, self.validates, self.quiet = steps, validates, quiet
        self._loss: float | None = None
        self._base: float | None = None  # the validation's loss before training
        self._rate = self._seconds = self._matmul = 0.0
        self._updates, self._resumed = 0, False
        self._measures: dict[str, float] = {}
        self._last = time.monotonic()
        self._step, self._told, self._doing = 0, list[str](), ""
        self._bar: Live | None = None

    def lines(self, lines: Iterable[tuple[str, str]]) -> None:
        """A table of two columns."""
        if not self.quiet:
            for label, text in lines:
                say(label, text, 10)

    def warn(self, text: str) -> None:
        """What must not be missed, on stderr."""
        if not self.quiet:
            say("warning", text, 10, err=True)

    def ready(self, seconds: float, left: int) -> None:
        """What is known when the model is loaded: how long an update takes, and how many are left."""
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
        elif total and not self.quiet and (time.monotonic() - self._last > _PAUSE or done == total):
            self._last = time.monotonic()
            self.say(self._doing)

    def resumed(self, step: int) -> None:
        """The bar begins there."""
        self._step, self._resumed = step, True
        if not self.quiet:
            self.say(f"resumed   after {counted(step, 'update')}")

    def __enter__(self) -> Progress:
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
        """An update or a validation."""
        if self.quiet:
            return
        self._doing = ""
        if report.valid_loss is not None:
            self._validated(report.step, report.valid_loss, bool(report.best), report.measures)
        else:
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
        self._told = [f"loss {self._loss:.3f}", *_named(self._measures), f"{self._rate:,.0f} tokens/s"]
        if report.matmul_share:
            self._told.append(f"{self._matmul:.0%} of matmul speed")
        self._told.append(byte_size(report.memory))
        if self._bar is None and (time.monotonic() - self._last > _PAUSE or report.step == self._steps):
            self._last = time.monotonic()
            left = duration((self._steps - report.step) * self._seconds)
            self.say(f"step {report.step:,} of {self._steps:,}: {', '.join(self._told)}, {left} left")

    def _line(self, width: int) -> RenderableType:
        """The bar as it is now."""
        left = str(timedelta(seconds=round((self._steps - self._step) * self._seconds))) if self._seconds else "-:--:--"
        told = [self._doing] if self._doing else self._told
        return bar_line(width, self._step, self._steps, told, left)

    def stopping(self) -> None:
        """Someone wants to end the run."""
        if self.quiet:
            return
        begun = self._updates or self._resumed
        self.say(f"stopping{' after this update' if begun else ', with nothing to save yet'}; again ends at once")

    def _validated(self, step: int, loss: float, best: bool, measures: Mapping[str, float]) -> None:
        told = [f"validation loss {loss:.4f}", *_named(measures)]
        if step == 0:
            self._base = loss
        elif best:
            told.append("the best yet")
        elif self._base is not None and not loss < self._base:
            told.append(f"no better than the {self._base:.4f} before training")
        self.say(f"step {step:,}: {', '.join(told)}")

    def say(self, text: str) -> None:
        """A line, above the bar."""
        with _if_anyone_looks():
            if self._bar is not None:
                text = folded(printable(text), 10)
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                line(text, 10)


@contextmanager
def _if_anyone_looks() -> Iterator[None]:
    """No run ends because nobody can see it any more: its terminal is closed, or Ctrl-C has ended its `tee` too."""
    try:
        yield
    except OSError:
        silence(sys.stdout)


def _named(measures: Mapping[str, float]) -> list[str]:
    """Of pairs, what they are told by; their rewards are in the metrics."""
    return [f"{name} {measures[name]:.3g}" for name in ("margin", "accuracy") if name in measures]


def bar_line(width: int, step: int, steps: int, told: Sequence[str], left: str) -> RenderableType:
    """`width` columns with the step, the time `left`, and of `told`, the most important first, as many as fit."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    count, left = f"{step:,}/{steps:,}", f"{left} left"
    room = width - len(count) - len(left) - 2  # for a bar and a text, with a space between
    texts = (", ".join(told[:number]) for number in range(len(told), 0, -1))
    text = next((text for text in texts if len(text) + 1 + _LEAST_BAR <= room), ", ".join(told[:1]))
    if len(text) > room:
        text = ""
    bar = min(_BAR, room - len(text) - 1)
    parts: list[RenderableType] = [count, ProgressBar(steps, step, width=bar)] if bar > 0 else [count]
    grid = Table.grid(padding=(0, 1))
    grid.add_row(*parts, Text(text, no_wrap=True), Text(left, "progress.remaining", no_wrap=True))
    return grid


def duration(seconds: float) -> str:
    """`2 h 5 min`, `5 min 3 s`, `4.2 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
