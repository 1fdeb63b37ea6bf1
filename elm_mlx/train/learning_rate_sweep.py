"""The sweep of learning rates: short runs of one recipe, alike in all else, one after the other in this process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from elm_mlx import files
from elm_mlx.errors import InputError, LossError
from elm_mlx.train import checkpoint, metrics
from elm_mlx.train.pretraining import Pretraining
from elm_mlx.train.pretraining_recipe import Recipe

_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the recipe's rate
_TAIL = 10  # the last tenth of a run tells its loss


@dataclass(frozen=True)
class Trial:
    """One short run.

    Attributes:
        loss: nats a token: the validation's at the end, or the last tenth's mean; None where the run broke off.
        harmed: whether the loss is no lower than before training, as of `run.Result`.
        interrupted: whether someone ended it.
    """

    rate: float
    directory: Path
    loss: float | None
    harmed: bool = False
    interrupted: bool = False


def rates(recipe: Recipe) -> list[float]:
    """Returns five learning rates around the recipe's own, each twice the one before."""
    return [recipe.optimizer.lr * factor for factor in _FACTORS]


def sweep(
    recipe: Recipe, learning_rates: Sequence[float], steps: int, out: Path, on_start: Callable[[float], None]
) -> Iterator[Trial]:
    """Runs `steps` updates with each learning rate, whole schedule included, in directories of their own in `out`.

    Args:
        on_start: called with the rate that is tried next.

    Raises:
        InputError: `out` holds something already, a rate is given twice, or it or the recipe makes no run.
        ElmError: another process writes to `out`.
    """
    recipes = {rate: _short(recipe, rate, steps) for rate in learning_rates}
    for short in recipes.values():
        short.loop()  # raises what would otherwise end the sweep halfway
    if len({f"{rate:g}" for rate in recipes}) < len(learning_rates):
        raise InputError(f"learning rates {', '.join(f'{rate:g}' for rate in learning_rates)}: one is given twice")
    with checkpoint.hold(out):
        if out.exists() and any(entry.name != files.LOCK for entry in out.iterdir()):
            raise InputError(f"{out}: holds something already; choose another directory")
        for rate, short in recipes.items():
            on_start(rate)
            yield _trial(short, rate, out / f"lr-{rate:g}")


def _short(recipe: Recipe, rate: float, steps: int) -> Recipe:
    """Returns the recipe with its schedule compressed into so few updates."""
    optimizer = recipe.optimizer
    rising = optimizer.warmup_steps()
    warmup = min(rising, max(1, round(steps * max(0.05, rising / optimizer.steps))))
    return replace(
        recipe,
        optimizer=replace(optimizer, lr=rate, steps=steps, warmup=warmup),
        run=replace(recipe.run, eval_every=steps, save_every=steps, keep=1, on_nan="stop"),
    )


def _trial(recipe: Recipe, rate: float, directory: Path) -> Trial:
    with Pretraining(recipe, directory) as run:
        try:
            result = run.train()
        except LossError:  # too high a rate
            return Trial(rate, directory, None)
    (made,) = metrics.read([directory])
    validated = made.columns.get("valid_loss")
    losses = made.columns["loss"].finite()
    tail = statistics.fmean(losses[-max(1, len(losses) // _TAIL) :])
    loss = validated.values[-1] if validated else tail
    return Trial(rate, directory, loss, result.harm is not None, result.interrupted)
