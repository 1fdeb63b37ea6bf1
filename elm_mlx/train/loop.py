"""A run: updates, validation, metrics, checkpoints, and an end that leaves something to go on from.

Knows the order of these things. Knows nothing of where batches come from, which parameters are trained, or how
anything is shown. A run that is resumed has the losses of one that was never interrupted, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from elm_mlx.callbacks import SILENT, TrainingCallback
from elm_mlx.data.batches import Batch
from elm_mlx.model.network import Model
from elm_mlx.train import checkpoint
from elm_mlx.train.checkpoint import Identity, Progress
from elm_mlx.train.interrupts import stop_requests
from elm_mlx.train.loss import Objective
from elm_mlx.train.run import Batches, Run
from elm_mlx.train.settings import Settings
from elm_mlx.train.throughput import Meter

_SAVE_AFTER = 300.0  # seconds since a checkpoint, after which one is due however few updates there were
_RISEN = 1.5  # times the first update's loss, above which that of the last ones is no chance of their batches


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        interrupted: whether someone stopped it before its last update; it can be resumed.
        last, best: checkpoints; the best by validation is None where there was none, or none was below the base's.
    """

    progress: Progress
    interrupted: bool
    last: Path
    best: Path | None

    @property
    def harm(self) -> tuple[float, float] | None:
        """The loss at the end and before training, where training made it worse: by validation, if there was any."""
        done = self.progress
        if done.valid_loss is not None and done.best_loss is not None:
            return (done.valid_loss, done.best_loss) if done.best_step == 0 else None
        risen = done.first_loss is not None and done.loss_mean > _RISEN * done.first_loss
        return (done.loss_mean, done.first_loss) if risen and done.first_loss is not None else None


def train(
    model: Model,
    batches: Batches,
    validation: Callable[[], Iterable[Batch]] | None,
    settings: Settings,
    out: Path,
    identity: Identity,
    *,
    resume: bool = False,
    compute_dtype: mx.Dtype | None = None,
    objective: Objective | None = None,
    rehearsal: Batch | None = None,
    meter: Meter | None = None,
    callback: TrainingCallback = SILENT,
    about: Mapping[str, Any] | None = None,
    export: Callable[[Path], None] | None = None,
) -> Result:
    """Train `model`'s trainable parameters in place. Ctrl-C, SIGTERM and SIGHUP end it after an update, and save.

    Args:
        batches: at their beginning.
        validation: gives the same batches at each call.
        out: the run's directory.
        identity: of the run; `settings.identity()` is added to its config here.
        resume: go on from the newest checkpoint.
        compute_dtype: what trainable parameters are rounded to for the forward pass; None for what they are.
        objective: what is made small; None for trained tokens' cross-entropy.
        rehearsal: a batch as those to come, to see how long one takes.
        meter: what says how much of the machine's matmul speed updates reach; measures that before the first one.
        about: what the run was asked for; kept in `out`.
        export: writes into each checkpoint's directory what other programs read.

    Raises:
        InputError: `out` holds another run, or one that wasn't to be resumed.
        ElmError: the loss was no number, or a spike; says which checkpoint is the last good one.
        KeyboardInterrupt: someone ended it before its first update, and nothing was saved.
    """
    config = {**identity.config, **settings.identity()}
    own = Identity(identity.model, identity.data, config)
    run = Run(model, settings, out, own, compute_dtype, objective, meter, callback, export)
    progress, steps = run.progress, settings.schedule.steps
    if resume:
        run.resume()
        batches.resume(progress.data)
        callback.resumed(progress.step)
    else:
        run.start()
    if about is not None:
        run.describe(about)
    with stop_requests(callback.stopping) as stop:
        if rehearsal is not None and progress.step < steps:
            run.rehearse(rehearsal, stop)
        if not stop.is_set():
            run.measure(compute_dtype or mx.float32)
        if not resume and validation is not None:
            run.validate(validation(), stop)
        callback.progress("starting")
        while progress.step < steps and not run.agreed(stop.is_set()):
            run.update(batches)
            last, better = progress.step == steps, False
            if validation is not None and (last or progress.step % settings.eval_every == 0):
                better = run.validate(validation())
            if last or better or progress.step % settings.save_every == 0:
                run.save(batches)
            elif run.agreed(run.unsaved() > _SAVE_AFTER):
                run.save(batches, passing=True)
        if progress.step == 0:  # nothing that would be worth going on from
            raise KeyboardInterrupt
        if run.saved != progress.step:
            run.save(batches)
    best = checkpoint.directory(out, progress.best_step) if progress.best_step else None
    return Result(progress, progress.step < steps, checkpoint.directory(out, run.saved), best)
