"""`elm-mlx lr-sweep CONFIG`: a few short runs, to see which learning rate is best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import bar, say
from elm_mlx.errors import InputError

_BAR = 30


def lr_sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A recipe, as for `pretrain`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory of the runs.")],
    lr: Annotated[
        str | None,
        typer.Option(help="Learning rates to try, as 0.001,0.002,0.004. (default: a quarter to four times its own)"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates of each run.")] = 100,
    set_: options.Overrides = None,
) -> None:
    """Try learning rates in short runs of a recipe, and draw them over each other."""
    from elm_mlx.train import learning_rate_sweep, metrics, pretraining_recipe, run_report, sections

    plan = sections.read(config, pretraining_recipe.Recipe, set_ or [])
    rates = learning_rate_sweep.rates(plan) if lr is None else _rates(lr)
    trials = []
    for trial in learning_rate_sweep.sweep(
        plan, rates, steps, out, lambda rate: print(f"learning rate {rate:g} …", flush=True)
    ):
        trials.append(trial)
        if trial.interrupted:
            raise typer.Exit(130)
    losses = [trial.loss for trial in trials if trial.loss is not None]
    for trial in trials:
        if trial.loss is None:
            print(f"{trial.rate:<9g} {'broke off':>9}")
        else:
            share = (trial.loss - min(losses)) / max(1e-9, max(losses) - min(losses))
            best = "  the least" if trial.loss == min(losses) and not trial.harmed else ""
            print(f"{trial.rate:<9g} {trial.loss:>9.4f}  {bar(share, _BAR)}{best}")
    if all(trial.loss is None or trial.harmed for trial in trials):
        say("warning", "no rate brought the loss below that before training: lower ones may help", 10, err=True)
    run_report.write_page(metrics.read([trial.directory for trial in trials]), out / "report.html")
    say("wrote", out / "report.html", 10)


def _rates(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise InputError(f"--lr {text}: needs numbers like 0.001,0.002") from None
