"""A training run as it goes: a bar on a terminal, lines elsewhere.

Knows reports and how they are shown. Knows nothing of how a run is made.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from elm_mlx.cli.show import counted, printable, size
from elm_mlx.train.listener import Listener

if TYPE_CHECKING:
    from elm_mlx.train.journal import Report

_SMOOTH = 0.1  # the share of an update in the loss that is shown
_PAUSE = 10.0  # seconds between lines where there is no terminal


class Progress(Listener):
    """Shows the reports of a run of `steps` updates, between `with` and its end. `quiet` shows nothing."""

    def __init__(self, steps: int, quiet: bool = False):
        self._steps, self.quiet = steps, quiet
        self._loss: float | None = None
        self._rate = self._seconds = self._matmul = 0.0
        self._updates, self._resumed = 0, False
        self._measures: dict[str, float] = {}
        self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def lines(self, lines: Iterable[tuple[str, str]]) -> None:
        """A table of two columns."""
        if not self.quiet:
            for label, text in lines:
                print(f"{label:<9} {printable(text)}", flush=True)

    def ready(self, seconds: float, left: int) -> None:
        """What is known when the model is loaded: how long an update takes, and how many are left."""
        self._seconds = seconds
        self.lines([("time", f"about {duration(seconds * left)} and validations, {seconds:.2g} s an update")])

    def doing(self, what: str) -> None:
        """What takes a while, in place of what is known of the updates."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def resumed(self, step: int) -> None:
        """The bar begins there."""
        self._resumed = True
        self.lines([("resumed", f"after {counted(step, 'update')}")])
        if self._bar is not None:
            self._bar.reset(self._task, completed=step)

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.completed:,}/{task.total:,}"), BarColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(), TextColumn("left"), speed_estimate_period=120,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            with _if_anyone_looks():
                self._bar.stop()

    def reference(self, done: int, pairs: int) -> None:
        """So many pairs' reference is computed."""
        text = f"reference of {done:,} of {pairs:,} pairs"
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        elif not self.quiet and (time.monotonic() - self._last > _PAUSE or done == pairs):
            self._last = time.monotonic()
            self.say(text)

    def report(self, report: Report) -> None:
        """An update or a validation."""
        if self.quiet:
            return
        if report.valid_loss is not None:
            self._validated(report.step, report.valid_loss, bool(report.best), report.measures)
        else:
            self._updated(report)

    def _updated(self, report: Report) -> None:
        assert report.loss is not None and report.tokens_per_second is not None and report.memory is not None
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
        reached = f", {self._matmul:.0%} of matmul speed" if report.matmul_share else ""
        rate = f"{self._rate:,.0f} tokens/s{reached}"
        text = f"loss {self._loss:.3f}{_named(self._measures)}, {rate}, {size(report.memory)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, description=text)
        elif time.monotonic() - self._last > _PAUSE or report.step == self._steps:
            self._last = time.monotonic()
            left = (self._steps - report.step) * self._seconds
            self.say(f"step {report.step:,} of {self._steps:,}: {text}, {duration(left)} left")

    def stopping(self) -> None:
        """Someone wants to end the run."""
        if self.quiet:
            return
        begun = self._updates or self._resumed
        self.say(f"stopping{' after this update' if begun else ', with nothing to save yet'}; again ends at once")

    def _validated(self, step: int, loss: float, best: bool, measures: Mapping[str, float]) -> None:
        self.say(f"step {step:,}: validation loss {loss:.4f}{_named(measures)}" + (", the best yet" if best else ""))

    def say(self, text: str) -> None:
        """A line, above the bar."""
        with _if_anyone_looks():
            if self._bar is not None:
                self._bar.console.print(text, highlight=False, markup=False)
            else:
                print(text, flush=True)


@contextmanager
def _if_anyone_looks() -> Iterator[None]:
    """No run ends because nobody can see it any more: its terminal is closed, or Ctrl-C has ended its `tee` too."""
    try:
        yield
    except OSError:
        with suppress(OSError):  # what comes now, the last flush included, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _named(measures: Mapping[str, float]) -> str:
    """Of pairs, what they are told by; their rewards are in the metrics."""
    return "".join(f", {name} {measures[name]:.3g}" for name in ("margin", "accuracy") if name in measures)


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
