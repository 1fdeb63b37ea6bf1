"""A training run: updates, validations, reports and checkpoints, and an end that leaves something to go on from.

A run that is resumed has the losses of one that was never interrupted, to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Protocol, TypeVar, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from elm_mlx import device
from elm_mlx.callbacks import SILENT, Report, Sample, TrainingCallback
from elm_mlx.data import batches as batching
from elm_mlx.data.batches import Batch
from elm_mlx.directories import checkpoints_of
from elm_mlx.errors import InputError, LossError
from elm_mlx.reading import counted
from elm_mlx.train import checkpoint, metrics
from elm_mlx.train.checkpoint import Identity, RunProgress
from elm_mlx.train.loop_settings import Settings
from elm_mlx.train.loss import Objective
from elm_mlx.train.step import Step, global_norm
from elm_mlx.train.stop_signals import stop_requests
from elm_mlx.train.throughput import Meter

_REACH = 20  # updates, some, that the running mean of losses reaches over
_SCATTER = 5.0  # a spike's size is this many times as much larger of one token: so do the means of few tokens differ
_MOST_SKIPPED = 10  # in a row, before even "skip" stops
_LONG = 60.0  # seconds of a trial, of which compiling is then a small part
_SAVE_AFTER = 300.0  # seconds since a checkpoint, after which one is due however few updates there were
_RISEN = 1.5  # times the first update's loss, above which that of the last ones is no chance of their batches
HeldRunType = TypeVar("HeldRunType", bound="HeldRun")


class BatchSource(Protocol):
    """An endless iterator that can say where it stands, and go there."""

    def __next__(self) -> Batch: ...
    def state(self) -> Any: ...
    def resume(self, state: Any) -> None: ...


@runtime_checkable
class UpdateSource(Protocol):
    """Makes all batches of an update when it is due, by the parameters as they are then.

    Attributes:
        measures: what it has measured on the way to the last ones, by name.
    """

    measures: dict[str, float]

    def update(self, stop: Event) -> Sequence[Batch]:
        """Returns the batches; none once `stop` is set, and the next call makes the same ones."""

    def state(self) -> Any: ...
    def resume(self, state: Any) -> None: ...


@runtime_checkable
class Examination(Protocol):
    """A validation that asks the model, in place of a loss over batches."""

    def examine(self, stop: Event) -> tuple[float, dict[str, float], list[Sample]]:
        """Returns what counts as the loss, measures, and samples. Once `stop` is set, they are of no use."""


@dataclass(frozen=True)
class Validation:
    """The batches of a validation, the same at each iteration: the first `most`, or all if that is below 0."""

    batches: batching.Batches
    most: int = -1

    def __iter__(self) -> Iterator[Batch]:
        return islice(self.batches.once(), None if self.most < 0 else self.most)


class HeldRun:
    """A run in a directory that other runs are kept out of, until it is closed: a context manager.

    Attributes:
        out: the directory.
        resumed: the checkpoint that the run goes on from; None where it begins.
        rank, world: this process's number, and how many there are that train together.
        leads: whether this is the one that writes and speaks.

    Raises:
        InputError: `out` holds no run to `resume`, or one that was not to be resumed.
        ElmError: another process writes to `out`.
    """

    def __init__(self, out: Path, resume: bool) -> None:
        group = mx.distributed.init()
        self.out, self.rank, self.world = out, int(group.rank()), int(group.size())
        self.leads = self.rank == 0
        with ExitStack() as held:
            held.enter_context(checkpoint.hold(out))
            self.resumed = checkpoint.to_resume(out, resume)
            self._held = held.pop_all()

    def __enter__(self: HeldRunType) -> HeldRunType:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        interrupted: whether someone stopped it before its last update; it can be resumed.
        early: whether it ended before that because validations brought no better loss.
        last, best: checkpoints; the best by validation is None where there was none, or none was below the base's.
        test: the report of the test split, by what the run leaves; None where it has none, or was interrupted.
    """

    progress: RunProgress
    interrupted: bool
    early: bool
    last: Path
    best: Path | None
    test: Report | None = None

    @property
    def harm(self) -> tuple[float, float] | None:
        """The loss at the end and before training, where training made it worse: by validation, if there was any."""
        done = self.progress
        if done.valid_loss is not None and done.best_loss is not None:
            return (done.valid_loss, done.best_loss) if done.best_step == 0 else None
        risen = done.first_loss is not None and done.loss_mean > _RISEN * done.first_loss
        return (done.loss_mean, done.first_loss) if risen and done.first_loss is not None else None


@dataclass(eq=False)
class Run:
    """A training run, which updates `model`'s trainable parameters in place.

    Args:
        batches: at their beginning; a source that makes an update's batches has no use for `settings.accumulate`.
        validation: gives the same batches at each iteration, or asks the model; None for none.
        out: the run's directory, which exists.
        identity: of the run; `settings.identity()` is added to its config here.
        resumed: the checkpoint to go on from; None to begin.
        compute_dtype: what trainable parameters are rounded to for the forward pass; None for what they are.
        objective: what to minimize; None for trained tokens' cross-entropy.
        rehearsal: a batch as those to come, to see how long one takes.
        meter: what says how much of the machine's matmul speed updates reach; measures that before the first one.
        about: what the run was asked for; kept in `out`.
        export: writes into each checkpoint's directory what other programs read.

    Attributes:
        progress: where it stands.
    """

    model: nn.Module
    batches: BatchSource | UpdateSource
    validation: Iterable[Batch] | Examination | None
    settings: Settings
    out: Path
    identity: Identity
    resumed: Path | None = None
    compute_dtype: mx.Dtype | None = None
    objective: Objective | None = None
    rehearsal: Batch | None = None
    meter: Meter | None = None
    callback: TrainingCallback = SILENT
    about: Mapping[str, Any] | None = None
    export: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        settings, identity = self.settings, self.identity
        self.identity = replace(identity, config={**identity.config, **settings.identity()})
        self.progress = RunProgress(extend=list(settings.schedule.extend))
        self._saved = -1  # the step of the last checkpoint
        self._saved_at = time.monotonic()
        self._passing: int | None = None  # its step, where it is to last until the next one only
        self._group = mx.distributed.init()
        self._leads = bool(self._group.rank() == 0)
        self._skipped_in_a_row = 0
        self._step = Step(self.model, settings, self.compute_dtype, self.objective)

    def train(self) -> Result:
        """Trains to the end. Ctrl-C, SIGTERM and SIGHUP end it after an update, and save.

        Raises:
            InputError: `resumed` is damaged, or of another run.
            LossError: the loss was no number, or a spike; says which checkpoint is the last good one.
            KeyboardInterrupt: someone ended it before its first update, and nothing was saved.
        """
        if self.resumed is None:
            self._begin()
        else:
            self._resume(self.resumed)
        progress, settings, steps = self.progress, self.settings, self.settings.schedule.total
        if self.about is not None and self._leads:
            metrics.describe(self.out, self.about)
        with stop_requests(self.callback.stopping) as stop:
            if self.rehearsal is not None and progress.step < steps:
                self._rehearse(self.rehearsal, stop)
            if self.meter is not None and self._leads and not stop.is_set():
                self.callback.progress("measuring the machine")
                self.meter.measure(self.compute_dtype or mx.float32)
            if self.resumed is None:
                self._validate(stop)
            elif progress.validation_due:
                self._conclude(stop)
            self.callback.progress("starting")
            while not (progress.validation_due or self._ended() or self._agreed(stop.is_set())):
                if self._update(stop):
                    progress.validation_due = progress.step == steps or progress.step % settings.eval_every == 0
                    self._conclude(stop)
            if progress.step == 0:  # nothing that would be worth going on from
                raise KeyboardInterrupt
            if self._saved != progress.step:
                self._save()
        best = checkpoint.directory(self.out, progress.best_step) if progress.best_step else None
        interrupted = progress.validation_due or not self._ended()
        early = progress.step < steps and not interrupted
        return Result(progress, interrupted, early, checkpoint.directory(self.out, self._saved), best)

    def _ended(self) -> bool:
        """Says whether all updates are made, or as many validations as it has patience for brought no better loss."""
        patience, progress = self.settings.patience, self.progress
        return progress.step >= self.settings.schedule.total or (patience is not None and progress.worse >= patience)

    def _conclude(self, stop: Event) -> None:
        """Validates after an update, and saves, where these are due. Nothing is concluded where `stop` is set."""
        progress = self.progress
        better = progress.validation_due and self._validate(stop)
        if progress.validation_due:  # it was broken off
            return
        if better or progress.step == self.settings.schedule.total or progress.step % self.settings.save_every == 0:
            self._save()
        elif self._agreed(time.monotonic() - self._saved_at > _SAVE_AFTER):
            self._save(passing=True)

    def _begin(self) -> None:
        mx.random.seed((self.settings.seed + self._group.rank()) % 2**64)
        if self._leads:
            (self.out / metrics.METRICS).unlink(missing_ok=True)

    def _resume(self, path: Path) -> None:
        """Goes back to a checkpoint."""
        step = self._step
        trained, optimizer, saved = checkpoint.restore(
            path, self.identity, step.model.trainable_parameters(), step.optimizer.state
        )
        before, now = len(saved.random), self._group.size()
        if before != now:
            raise InputError(f"{path}: was trained by {counted(before, 'process')}, and cannot go on with {now}")
        self._lengthen(path, saved)
        self.batches.resume(saved.data)
        step.model.update(trained)
        step.optimizer.state = optimizer
        self.progress, self._saved = saved, saved.step
        _set_random_key(saved.random[self._group.rank()])
        if saved.parts and self.identity.config.get("dropout") and not device.on_gpu():
            step.cut_into(saved.parts)  # or other activations would be dropped
        if self._leads:
            metrics.cut(self.out, saved.step)
        self.callback.resumed(saved.step)

    def _lengthen(self, path: Path, saved: RunProgress) -> None:
        """Lets a run that has ended go on with what its schedule has been extended by.

        Raises:
            InputError: it has not ended, or was extended otherwise.
        """
        schedule = self.settings.schedule
        before, now = saved.extend, list(schedule.extend)
        total = replace(schedule, extend=tuple(before)).total
        if now[: len(before)] != before:
            raise InputError(f"{path}: was extended by {before} updates, not by {now}; resume with the same, or more")
        if now != before and saved.step < total:
            raise InputError(
                f"{path}: the run has {total:,} updates, and can be extended when it has ended; resume it as it is"
            )
        if now != before:
            saved.worse = 0
        saved.extend = now

    def _rehearse(self, batch: Batch, stop: Event) -> None:
        """Measures the time of an update on this batch, and undoes it; the first one compiles the step."""
        self.callback.progress("measuring an update")
        kept = mx.random.state[0].tolist()
        for _ in range(2):
            started = time.perf_counter()
            mx.eval(self._step.gradients(batch)[:2])
            seconds = time.perf_counter() - started
            if seconds > _LONG or stop.is_set():
                break
        _set_random_key(kept)
        if not stop.is_set():
            left = self.settings.schedule.total - self.progress.step
            self.callback.ready(seconds * self.settings.accumulate, left)

    def _update(self, stop: Event) -> bool:
        """Makes an update, or skips it; returns False where `stop` has ended what comes before it.

        Raises LossError where the loss says stop.
        """
        started, progress = time.perf_counter(), self.progress
        batches = self._due(stop)
        if batches is None:
            return False
        sums, gradients, count, trained, tokens = self._accumulated(batches)
        norm = global_norm(gradients) / count
        mx.eval(sums, norm)
        (mean, *measured), length = _means(sums, count), norm.item()
        rate = self.settings.schedule(progress.step)
        wrong = self._what_is_wrong(mean, length, max(1, trained))
        if wrong is None:
            self._step.apply(gradients, norm, count, rate)
            self._note(mean)
        else:
            self._refuse(wrong)
        del gradients  # so that their memory can be used by what replaces the parameters
        mx.eval(self._step.state())
        device.trim_cache()
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.tokens += tokens
        progress.trained_tokens += trained
        progress.seconds += seconds
        share = None if self.meter is None else self.meter.share(seconds)
        self._report(
            Report(
                progress.step, loss=mean, learning_rate=rate, grad_norm=length, tokens=tokens, trained_tokens=trained,
                seconds=seconds, tokens_per_second=tokens / seconds, matmul_share=share, memory=device.peak_memory(),
                skipped=wrong is not None, measures=self._named(measured) | self._sampled(seconds),
            )
        )  # fmt: skip
        return True

    def _validate(self, stop: Event) -> bool:
        """Says whether the loss is the least so far, the base's included. One that `stop` breaks off has no effect."""
        validation = self.validation
        if validation is None:
            self.progress.validation_due = False
            return False
        self.callback.progress("validating")
        started, progress = time.perf_counter(), self.progress
        samples: list[Sample] | None = None
        if isinstance(validation, Examination):
            mean, measures, samples = validation.examine(stop)
        else:
            mean, *measured = self._mean_over(validation, stop)
            measures = self._named(measured)
        if self._agreed(stop.is_set()):
            return False
        progress.validation_due = False
        if progress.step > 0:
            progress.valid_loss = mean
        best = mean < (math.inf if progress.best_loss is None else progress.best_loss)
        progress.worse = 0 if best else progress.worse + 1
        if best:
            progress.best_step, progress.best_loss = progress.step, mean
        seconds = time.perf_counter() - started
        self._report(
            Report(
                progress.step, valid_loss=mean, seconds=seconds, best=best or None, measures=measures, samples=samples
            )
        )
        return best

    def test(self, batches: Iterable[Batch]) -> Report:
        """Computes the loss of batches that no choice was made by, with the parameters as they are; and reports it."""
        self.callback.progress("testing")
        started = time.perf_counter()
        mean, *measured = self._mean_over(batches)
        seconds = time.perf_counter() - started
        report = Report(self.progress.step, test_loss=mean, seconds=seconds, measures=self._named(measured))
        self._report(report)
        return report

    def _mean_over(self, batches: Iterable[Batch], stop: Event | None = None) -> list[float]:
        """The mean loss, and means of what the objective measures, over all processes' batches, as far as `stop`."""
        total, count = mx.zeros(1 + len(self._step.objective.measures)), 0
        for batch in batches:
            if stop is not None and stop.is_set():
                break
            sums, units = self._step.loss(batch)
            total, count = total + sums, count + units
            mx.eval(total)
            device.trim_cache()
        count = int(self._summed(mx.array(count)).item())
        return _means(self._summed(total), max(1, count))

    def _save(self, passing: bool = False) -> None:
        """Writes a checkpoint; superfluous ones go, and a `passing` one with the next."""
        progress, step = self.progress, self._step
        progress.data, progress.parts = self.batches.state(), step.parts
        progress.random = mx.distributed.all_gather(mx.random.state[0][None], group=self._group).tolist()
        if self._leads:
            trained = step.model.trainable_parameters()
            checkpoint.save(self.out, trained, step.optimizer.state, progress, self.identity, self.export)
            checkpoint.prune(self.out, self.settings.keep + passing, progress.best_step, self._passing)
        self._saved, self._saved_at = progress.step, time.monotonic()
        self._passing = progress.step if passing else None

    def _agreed(self, stop: bool) -> bool:
        """Says whether any process wants to stop."""
        return stop if self._group.size() == 1 else bool(self._summed(mx.array(int(stop))).item())

    def _accumulated(self, batches: Iterable[Batch]) -> tuple[mx.array, Any, int, int, int]:
        """Sums the loss, measures, gradients, count, trained tokens and tokens of an update over all processes."""
        sums, gradients, count, trained, tokens = mx.array(0.0), None, 0, 0, 0
        for batch in batches:
            if self.meter is not None:
                self.meter.add(batch)
            new_sums, new, units = self._step.gradients(batch)
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            sums, count = sums + new_sums, count + units
            trained, tokens = trained + int(batch.trained.sum()), tokens + batch.tokens
            mx.eval(sums, gradients)  # one batch's activations at a time
        size = self._group.size()
        if size > 1:  # MLX averages; sums are wanted
            averaged = nn.average_gradients(gradients, self._group)
            gradients = tree_map(lambda grad: grad * size, averaged)
            sums = self._summed(sums)
            count, trained, tokens = (int(self._summed(mx.array(each)).item()) for each in (count, trained, tokens))
        return sums, gradients, max(1, count), trained, tokens

    def _due(self, stop: Event) -> Iterable[Batch] | None:
        """Returns the batches of the next update; None where `stop` ended their making."""
        source = self.batches
        if isinstance(source, UpdateSource):
            batches = source.update(stop)
            self.callback.progress("")
            return batches or None
        return (next(source) for _ in range(self.settings.accumulate))

    def _sampled(self, seconds: float) -> dict[str, float]:
        """Returns what the source of an update that took so many seconds has measured."""
        if not isinstance(self.batches, UpdateSource):
            return {}
        measures = self.batches.measures
        return measures | {"training_seconds": seconds - measures["sampling_seconds"]}

    def _named(self, measured: list[float]) -> dict[str, float]:
        return dict(zip(self._step.objective.measures, measured, strict=True))

    def _what_is_wrong(self, loss: float, norm: float, trained: int) -> str | None:
        """Says why an update of this loss, the mean over so many trained tokens, is not to be made."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss}, the gradients' norm {norm}"
        spike, mean = self.settings.spike, self.progress.loss_mean
        if spike is None or self.progress.made == 0:
            return None
        if loss > mean + spike * (1 + _SCATTER / math.sqrt(trained)):
            return f"the loss jumped to {loss:.3f}, from {mean:.3f}"
        return None

    def _refuse(self, wrong: str) -> None:
        """Counts an update that is not made, or raises LossError."""
        self.progress.skipped += 1
        self._skipped_in_a_row += 1
        if self.settings.on_nan == "skip" and self._skipped_in_a_row < _MOST_SKIPPED:
            return
        kept = checkpoints_of(self.out)
        good = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise LossError(f"step {self.progress.step + 1}: {wrong}; {good}; a lower learning rate may help")

    def _note(self, loss: float) -> None:
        """Takes a loss into the running mean."""
        progress = self.progress
        self._skipped_in_a_row = 0
        if progress.made == 0:
            progress.first_loss = loss
        share = max(1 / _REACH, 1 / (progress.made + 1))
        progress.loss_mean += share * (loss - progress.loss_mean)

    def _summed(self, value: mx.array) -> mx.array:
        return value if self._group.size() == 1 else mx.distributed.all_sum(value, group=self._group)

    def _report(self, report: Report) -> None:
        if self._leads:
            metrics.append(self.out, report)
        self.callback.report(report)


def _means(sums: mx.array, count: int) -> list[float]:
    return [value / count for value in sums.tolist()]


def _set_random_key(key: list[int]) -> None:
    high, low = key
    mx.random.seed(high << 32 | low)  # a key is its seed's two halves
