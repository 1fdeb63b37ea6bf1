"""A run under way: an update, a validation, a checkpoint, and where all that stands.

Knows how each is done, told and written, by one process or several. Knows nothing of their order, and of what makes a
run end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from elm_mlx import device
from elm_mlx.callbacks import Report, TrainingCallback
from elm_mlx.data.batches import Batch
from elm_mlx.errors import ElmError, InputError, counted
from elm_mlx.model.network import Model
from elm_mlx.train import checkpoint, metrics
from elm_mlx.train import optimizer as optimization
from elm_mlx.train.checkpoint import Identity, Progress
from elm_mlx.train.loss import Objective, TokenLoss
from elm_mlx.train.settings import Settings
from elm_mlx.train.step import Step, recompute_blocks
from elm_mlx.train.throughput import Meter

_REACH = 20  # updates, some, that the running mean of losses reaches over
_SCATTER = 5.0  # a spike's size is this many times as much larger of one token: so do the means of few tokens differ
_MOST_SKIPPED = 10  # in a row, before even "skip" stops
_LONG = 60.0  # seconds of a trial, of which compiling is then a small part


class Batches(Protocol):
    """An endless iterator that can say where it stands, and go there."""

    def __next__(self) -> Batch: ...
    def state(self) -> Any: ...
    def resume(self, state: Any) -> None: ...


class Run:
    """A run under way: the step, where it stands, and the files it writes.

    Attributes:
        progress: where it stands.
        saved: the step of the last checkpoint; -1 where there is none.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        out: Path,
        identity: Identity,
        compute_dtype: mx.Dtype | None,
        objective: Objective | None,
        meter: Meter | None,
        callback: TrainingCallback,
        export: Callable[[Path], None] | None,
    ):
        self.progress = Progress()
        self.saved = -1
        self._saved_at = time.monotonic()
        self._passing: int | None = None  # its step, where it is to last until the next one only
        self._settings, self._out, self._identity = settings, out, identity
        self._callback, self._export, self._meter = callback, export, meter
        self._group = mx.distributed.init()
        self._skipped_in_a_row = 0
        if settings.grad_checkpoint:
            recompute_blocks(model)
        model.train()
        optimizer = optimization.make_optimizer(settings.optimizer, settings.weight_decay, settings.betas, settings.eps)
        self._step = Step(model, optimizer, settings.clip, compute_dtype, objective or TokenLoss(settings.z_loss))

    def start(self) -> None:
        if checkpoint.all_of(self._out):
            raise InputError(f"{self._out}: holds a run already: resume it, or choose another directory")
        mx.random.seed(self._settings.seed + self._group.rank())
        if self._writes():
            try:
                self._out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{self._out}: cannot be made: {error.strerror}") from None
            (self._out / metrics.METRICS).unlink(missing_ok=True)

    def resume(self) -> None:
        """Go back to the newest checkpoint."""
        saved = checkpoint.load(checkpoint.newest(self._out), self._identity)
        before, now = len(saved.progress.random), self._group.size()
        if before != now:
            raise InputError(f"{saved.path}: was trained by {counted(before, 'process')}, and cannot go on with {now}")
        step = self._step
        step.model.update(
            checkpoint.fill(step.model.trainable_parameters(), saved.parameters, saved.path / checkpoint.PARAMETERS)
        )
        step.optimizer.state = checkpoint.fill(step.optimizer.state, saved.optimizer, saved.path / checkpoint.OPTIMIZER)
        self.progress.__dict__.update(saved.progress.__dict__)
        self.saved = self.progress.step
        _set_random_key(self.progress.random[self._group.rank()])
        if self._writes():
            checkpoint.cut_metrics(self._out, self.progress.step)

    def describe(self, about: Mapping[str, Any]) -> None:
        """Keep what the run was asked for."""
        if self._writes():
            metrics.describe(self._out, about)

    def rehearse(self, batch: Batch, stop: Event) -> None:
        """See how long an update takes of this batch, which leaves no trace; the first time compiles the step."""
        self._callback.progress("measuring an update")
        kept = mx.random.state[0].tolist()
        for _ in range(2):
            started = time.perf_counter()
            mx.eval(self._step.gradients(batch)[:2])
            seconds = time.perf_counter() - started
            if seconds > _LONG or stop.is_set():
                break
        _set_random_key(kept)
        if stop.is_set():
            return
        self._callback.ready(seconds * self._settings.accumulate, self._settings.schedule.steps - self.progress.step)

    def measure(self, dtype: mx.Dtype) -> None:
        """Find out what the machine can do, for the meter."""
        if self._meter is not None and self._writes():
            self._callback.progress("measuring the machine")
            self._meter.measure(dtype)

    def update(self, source: Batches) -> None:
        """One update, or one that is skipped. Raises ElmError where the loss says stop."""
        started = time.perf_counter()
        sums, gradients, count, trained, tokens = self._accumulated(source)
        norm = optimization.global_norm(gradients) / count
        mx.eval(sums, norm)
        (mean, *measured), length = self._means(sums, count), norm.item()
        rate = self._settings.schedule(self.progress.step)
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
        progress = self.progress
        progress.step += 1
        progress.tokens += tokens
        progress.trained_tokens += trained
        progress.seconds += seconds
        self._report(
            Report(
                step=progress.step,
                loss=mean,
                learning_rate=rate,
                grad_norm=length,
                tokens=tokens,
                trained_tokens=trained,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                matmul_share=None if self._meter is None else self._meter.share(seconds),
                memory=device.peak_memory(),
                skipped=wrong is not None,
                measures=self._named(measured),
            )
        )

    def validate(self, batches: Iterable[Batch], stop: Event | None = None) -> bool:
        """Whether the loss is the least so far, the base's included. Nothing comes of one that `stop` breaks off."""
        self._callback.progress("validating")
        started = time.perf_counter()
        total, count = mx.zeros(1 + len(self._step.objective.measures)), 0
        for batch in batches:
            if stop is not None and stop.is_set():
                break
            sums, units = self._step.loss(batch)
            total, count = total + sums, count + units
            mx.eval(total)
            device.trim_cache()
        count = int(self._summed(mx.array(count)).item())
        (mean, *measured), progress = self._means(self._summed(total), max(1, count)), self.progress
        if stop is not None and self.agreed(stop.is_set()):
            return False
        if progress.step > 0:
            progress.valid_loss = mean
        best = mean < (math.inf if progress.best_loss is None else progress.best_loss)
        if best:
            progress.best_step, progress.best_loss = progress.step, mean
        seconds, measures = time.perf_counter() - started, self._named(measured)
        self._report(Report(progress.step, valid_loss=mean, seconds=seconds, best=best or None, measures=measures))
        return best

    def unsaved(self) -> float:
        """Seconds since the last checkpoint, or since the beginning."""
        return time.monotonic() - self._saved_at

    def save(self, source: Batches, passing: bool = False) -> None:
        """A checkpoint of where the run stands; superfluous ones go, and a `passing` one with the next."""
        progress = self.progress
        progress.data = source.state()
        keys = mx.distributed.all_gather(mx.random.state[0][None], group=self._group)
        progress.random = keys.tolist()
        if self._writes():
            step = self._step
            parameters = step.model.trainable_parameters()
            checkpoint.save(self._out, parameters, step.optimizer.state, progress, self._identity, self._export)
            checkpoint.prune(self._out, self._settings.keep + passing, progress.best_step, self._passing)
        self.saved, self._saved_at = progress.step, time.monotonic()
        self._passing = progress.step if passing else None

    def agreed(self, stop: bool) -> bool:
        """Whether any process wants to stop."""
        return stop if self._group.size() == 1 else bool(self._summed(mx.array(int(stop))).item())

    def _accumulated(self, source: Batches) -> tuple[mx.array, Any, int, int, int]:
        """Summed loss and measures, summed gradients, count, trained tokens and tokens of an update, of all."""
        sums, gradients, count, trained, tokens = mx.array(0.0), None, 0, 0, 0
        for _ in range(self._settings.accumulate):
            batch = next(source)
            if self._meter is not None:
                self._meter.add(batch)
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

    def _means(self, sums: mx.array, count: int) -> list[float]:
        return [value / count for value in sums.tolist()]

    def _named(self, measured: list[float]) -> dict[str, float]:
        return dict(zip(self._step.objective.measures, measured, strict=True))

    def _what_is_wrong(self, loss: float, norm: float, trained: int) -> str | None:
        """Why an update of this loss, the mean over so many trained tokens, is not to be made."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss}, the gradients' norm {norm}"
        spike, mean = self._settings.spike, self.progress.loss_mean
        if spike is None or self.progress.made == 0:
            return None
        if loss > mean + spike * (1 + _SCATTER / math.sqrt(trained)):
            return f"the loss jumped to {loss:.3f}, from {mean:.3f}"
        return None

    def _refuse(self, wrong: str) -> None:
        """Count an update that is not made, or raise."""
        self.progress.skipped += 1
        self._skipped_in_a_row += 1
        if self._settings.on_nan == "skip" and self._skipped_in_a_row < _MOST_SKIPPED:
            return
        kept = checkpoint.all_of(self._out)
        good = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise ElmError(f"step {self.progress.step + 1}: {wrong}; {good}; a lower learning rate may help")

    def _note(self, loss: float) -> None:
        """Take a loss into the running mean."""
        progress = self.progress
        self._skipped_in_a_row = 0
        if progress.made == 0:
            progress.first_loss = loss
        share = max(1 / _REACH, 1 / (progress.made + 1))
        progress.loss_mean += share * (loss - progress.loss_mean)

    def _summed(self, value: mx.array) -> mx.array:
        return value if self._group.size() == 1 else mx.distributed.all_sum(value, group=self._group)

    def _writes(self) -> bool:
        return bool(self._group.rank() == 0)

    def _report(self, report: Report) -> None:
        if self._writes():
            metrics.append(self._out, report)
        self._callback.report(report)


def _set_random_key(key: list[int]) -> None:
    high, low = key
    mx.random.seed(high << 32 | low)  # a key is its seed's two halves
