"""The callbacks that work which takes a while reports to. Imports nothing, so that commands can say their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class OnProgress(Protocol):
    """The progress callback: `done` of `total` parts of `what` are done; the total is 0 where it is unknown."""

    def __call__(self, what: str, done: int = 0, total: int = 0, /) -> None: ...


def no_progress(what: str, done: int = 0, total: int = 0, /) -> None:
    """The callback of work that nobody watches."""


@dataclass(frozen=True)
class Sample:
    """An answer of the model that is trained, and a program's verdict of it: right, wrong or unreadable."""

    prompt: str
    answer: str
    verdict: str


@dataclass(frozen=True)
class Report:
    """An update of a training run, a validation after it, or the test at the end; one line of its `metrics.jsonl`.

    Attributes:
        step: updates made, this one included.
        loss: mean over its trained tokens, in nats, or over its pairs; None for a validation.
        valid_loss, test_loss: the validation's, and the test's; None for an update.
        grad_norm: before clipping.
        tokens_per_second: of this update, trained or not, padding excepted.
        matmul_share: the throughput as a share of this machine's own matmul speed: see `train.throughput`.
        memory: bytes at most in use so far.
        skipped: whether the update was left out.
        best: True where the validation's loss is the least so far; of step 0, the model's before training.
        measures: means of what the objective measures, an update's or a validation's, by name. In the file each of
            them is a value of its own, a validation's as `valid_NAME` and a test's as `test_NAME`.
        samples: of a validation that asks the model; None of others.
    """

    step: int
    loss: float | None = None
    valid_loss: float | None = None
    test_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    matmul_share: float | None = None
    memory: int | None = None
    skipped: bool | None = None
    best: bool | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Sample] | None = None


class TrainingCallback:
    """The callback of a training run. This one ignores all that it is called with."""

    def progress(self, what: str, done: int = 0, total: int = 0, /) -> None:
        """Is called during work that is no update, as `OnProgress`; with no text where an update follows at once."""

    def resumed(self, step: int) -> None:
        """Is called when a run resumes after so many updates."""

    def ready(self, seconds: float, left: int) -> None:
        """Is called before the first update, with the seconds that an update took in a trial, and the updates left."""

    def report(self, report: Report) -> None:
        """Is called after each update and each validation."""

    def warn(self, text: str) -> None:
        """Is called with what a person should know of."""

    def stopping(self) -> None:
        """Is called when Ctrl-C or a signal asks the run to end; from another thread, at any time."""


SILENT = TrainingCallback()


@dataclass(frozen=True)
class Callbacks(TrainingCallback):
    """Several callbacks as one, each called in turn."""

    each: Sequence[TrainingCallback]

    def progress(self, what: str, done: int = 0, total: int = 0, /) -> None:
        for callback in self.each:
            callback.progress(what, done, total)

    def resumed(self, step: int) -> None:
        for callback in self.each:
            callback.resumed(step)

    def ready(self, seconds: float, left: int) -> None:
        for callback in self.each:
            callback.ready(seconds, left)

    def report(self, report: Report) -> None:
        for callback in self.each:
            callback.report(report)

    def warn(self, text: str) -> None:
        for callback in self.each:
            callback.warn(text)

    def stopping(self) -> None:
        for callback in self.each:
            callback.stopping()
