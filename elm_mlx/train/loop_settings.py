"""The settings of a training loop, and the schedule of its learning rate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from elm_mlx.errors import InputError
from elm_mlx.reading import check_seed, counted

OptimizerName = Literal["adamw", "adafactor"]
ScheduleShape = Literal["cosine", "linear", "constant"]
OnNan = Literal["stop", "skip"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate by step: up in a straight line, then down.

    Args:
        peak: the highest.
        steps: how many there are at first, `warmup` included.
        warmup: steps from `start` to `peak`.
        shape: "cosine", "linear" or "constant" after that.
        end: what share of `peak` is left at the last step; of no effect on "constant".
        start: where warm-up begins.
        extend: steps that were added at the end, once or more: the rate begins anew with each, as in warm restarts
            (SGDR, arXiv 1608.03983), and a warm-up that is longer than they are is as long.

    Raises:
        InputError: a value makes no schedule.
    """

    peak: float
    steps: int
    warmup: int = 0
    shape: str = "cosine"
    end: float = 0.1
    start: float = 0.0
    extend: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice("learning rate schedule", self.shape, ScheduleShape)
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise InputError(f"the learning rate must be above 0, not {self.peak}")
        if not all(0 <= rate < math.inf for rate in (self.start, self.end)):
            raise InputError(f"a learning rate starts and ends at 0 or more, not at {self.start} and {self.end}")
        for steps, what in ((self.steps, "the updates"), *((steps, "the updates of extend") for steps in self.extend)):
            if steps < 1:
                raise InputError(f"{what} must be at least 1, not {steps}")
        if not 0 <= self.warmup <= self.steps:
            raise InputError(f"warm-up of {counted(self.warmup, 'update')} does not fit in {self.steps}")

    @property
    def total(self) -> int:
        """The steps in all."""
        return self.steps + sum(self.extend)

    def __call__(self, step: int) -> float:
        """The rate of update number `step`, counted from 0."""
        steps = self.steps
        for added in self.extend:
            if step < steps:
                break
            step, steps = step - steps, added
        warmup = min(self.warmup, steps)
        if step < warmup:
            return self.start + (self.peak - self.start) * (step + 1) / warmup
        if self.shape == "constant":
            return self.peak
        done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.peak * (self.end + (1 - self.end) * left)


@dataclass(frozen=True)
class Settings:
    """The settings of a training loop. All but the last group bear on the losses.

    Args:
        schedule: the learning rate; its `total` are the run's updates.
        optimizer: "adamw" or "adafactor".
        betas, eps: of AdamW.
        z_loss: weight of the squared log-partition in the objective (PaLM, section 5); reported losses are without it.
        clip: the limit on the gradients' norm; None for none.
        accumulate: batches to an update.
        seed: of dropout.
        grad_checkpoint: compute blocks again in the backward pass rather than keep their activations.
        spike: a loss that is so many nats above its running mean, which begins with the first update, counts as one
            that is no number; None for none. Of N trained tokens, 1 + 5/√N times as many, for their mean's scatter.
        on_nan: "stop", or "skip" the update.
        eval_every: updates between validations; the last is followed by one too. The same for `save_every`.
        keep: checkpoints to keep, beside the best.
        patience: validations in a row, none the best so far, that end the run; None for no such end.
    """

    schedule: Schedule
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    z_loss: float = 0.0
    clip: float | None = 1.0
    accumulate: int = 1
    seed: int = 0
    grad_checkpoint: bool = False
    spike: float | None = 3.0
    on_nan: str = "stop"

    eval_every: int = 200
    save_every: int = 100
    keep: int = 2
    patience: int | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_choice("optimizer", self.optimizer, OptimizerName)
        check_choice("on_nan", self.on_nan, OnNan)
        check_counts(self, "accumulate", "eval_every", "save_every", "keep", "patience")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are from 0 to below 1, not {self.betas}")
        if not (0 < self.eps < math.inf and 0 <= self.z_loss < math.inf):
            raise InputError(f"eps is above 0, and z_loss not below 0, not {self.eps} and {self.z_loss}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"the limit on the gradients' norm must be above 0, not {self.clip}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight decay must be at least 0, not {self.weight_decay}")

    def identity(self) -> dict[str, Any]:
        """Returns what must not change when a run is resumed, as checkpoints have it. When to save or end may."""
        free = ("eval_every", "save_every", "keep", "patience", "schedule")
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in free}
        rate = asdict(replace(self.schedule, extend=()))
        del rate["extend"]  # `Run` compares it, for it may become longer
        return own | {f"learning rate's {name}": value for name, value in rate.items()}


def check_counts(settings: Any, *names: str) -> None:
    """Raises InputError where a field of these is below 1; None is not."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")


def check_choice(what: str, name: str, choices: Any) -> None:
    """Raises InputError where a name is none of the choices, which are a Literal's."""
    if name not in get_args(choices):
        raise InputError(f"{what} {name!r} is not one of {', '.join(get_args(choices))}")
