"""Trackers: a run's reports for TensorBoard and Weights & Biases too, beside its own metrics.

Their values have the names that they have in `metrics.jsonl`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elm_mlx import files
from elm_mlx.callbacks import Callbacks, Report, TrainingCallback
from elm_mlx.errors import InputError
from elm_mlx.train import metrics
from elm_mlx.train.settings import TrackerName

PACKAGES: Mapping[TrackerName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_LATE, _AGAIN = 5, 1000  # seconds until events are written; steps that a resumed run writes again: more than in these
WANDB_ID = "wandb.id"  # in a run's directory: the name by which it is resumed there

Log = Callable[[int, dict[str, float]], None]  # of a step its values
Opened = tuple[Log, Callable[[], None]]  # and what ends it


def check(names: Sequence[TrackerName]) -> None:
    """Raises InputError where a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(f"--report-to {name}: needs a package: pip install 'elm-mlx[{name}]'")


@contextmanager
def tracking(
    names: Sequence[TrackerName], out: Path, about: Mapping[str, Any], callback: TrainingCallback
) -> Iterator[TrainingCallback]:
    """Gives a callback that calls `callback` and passes the reports of the run in `out` to the trackers of `names`.

    Args:
        about: the run's settings.
    """
    trackers = [_Tracker(name, out, about, callback) for name in names]
    try:
        yield Callbacks((callback, *trackers)) if trackers else callback
    finally:
        for tracker in trackers:
            tracker.close()


class _Tracker(TrainingCallback):
    """One tracker. What goes wrong in it is told, and ends no run: it gets no more reports."""

    def __init__(self, name: TrackerName, out: Path, about: Mapping[str, Any], callback: TrainingCallback) -> None:
        self._name, self._out, self._about, self._callback = name, out, about, callback
        self._step = -1  # that it is resumed after
        self._opened: Opened | None = None
        self._failed = False

    def resumed(self, step: int) -> None:
        self._step = step
        self._safely(self._open)  # while the metrics have what there was, and none of what is reported from now on

    def report(self, report: Report) -> None:
        self._safely(lambda: self._open()[0](report.step, _values(metrics.line_of(report))))

    def close(self) -> None:
        if self._opened is not None:
            self._safely(self._opened[1])

    def _open(self) -> Opened:
        if self._opened is None:
            open_ = {"tensorboard": _tensorboard, "wandb": _wandb}[self._name]
            self._opened = open_(self._out, self._about, self._step)
        return self._opened

    def _safely(self, act: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:  # of whatever kind: it is another program's
            self._failed = True
            self._callback.warn(f"{self._name} failed, and gets no more of this run: {error}")


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns what a tracker is given of a line of the metrics."""
    hidden = ("step", "best", "samples", *(() if "loss" in line else ("seconds",)))  # the updates' curve
    return {name: value for name, value in line.items() if name not in hidden}


def _tensorboard(out: Path, about: Mapping[str, Any], step: int) -> Opened:
    """Writes events into `OUT/tensorboard`, at most some seconds late.

    A run that is resumed writes its last steps again as its metrics have them, and what is there of these and of later
    steps counts no more: one that was killed had not written all, and the test at an end is not that of a later one.
    """
    from tensorboardX import SummaryWriter

    begin = max(0, step - _AGAIN)
    # Files are read by their names, which have the second that they were begun in; of several in one this says which.
    name = f".{time.time_ns()}"
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=begin, filename_suffix=name, flush_secs=_LATE)
    writer.add_text("settings", f"```json\n{json.dumps(about, indent=1)}\n```", max(0, step))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    for line in metrics.lines_of(out, begin, step):
        log(line["step"], _values(line))
    return log, writer.close


def _wandb(out: Path, about: Mapping[str, Any], step: int) -> Opened:
    """Logs to the project WANDB_PROJECT, or elm-mlx. A resumed run goes on there; of a step, the last values count."""
    import wandb

    kept = out / WANDB_ID
    if step < 0 or not kept.exists():
        files.write_text(kept, secrets.token_hex(8))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "elm-mlx"), name=out.resolve().name, id=kept.read_text().strip(),
        resume="allow", dir=str(out), config=dict(about), settings=wandb.Settings(console="off"),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")  # wandb's own steps cannot go back to a checkpoint
    return lambda step, values: run.log({"step": step, **values}), run.finish
