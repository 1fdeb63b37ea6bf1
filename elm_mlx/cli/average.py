"""`elm-mlx average CKPT… --out DST`: several checkpoints of one model become their mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elm_mlx import reading
from elm_mlx.cli import options
from elm_mlx.cli.screen import ProgressBar, bar, byte_size, counted, say
from elm_mlx.errors import InputError

if TYPE_CHECKING:
    from elm_mlx_convert.averaging import Average

_BAR = 30


def average(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CKPT...", help="Checkpoints of a run, or anything that `convert` reads.")
    ],
    out: Annotated[Path, typer.Option(metavar="DST", help="The model directory to make.")],
    last: Annotated[
        int | None,
        typer.Option(metavar="N", help="Take the newest N checkpoints of the one run named. (default: all named)"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json or CoreNet YAML for all. (default: the one beside each)")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE|DIR|REPO", help="The tokenizer.model for all. (default: the one beside each)"),
    ] = None,
    dtype: Annotated[options.DType, typer.Option(help="Type of the averaged weights.")] = "float32",
    overwrite: options.Overwrite = False,
) -> None:
    """Average the weights of checkpoints, and say how far each lies from the mean."""
    from elm_mlx_convert import averaging

    chosen: list[str] = checkpoints
    if last is not None:
        if len(checkpoints) > 1:
            raise InputError(f"--last {last}: takes the checkpoints of one run, and {len(checkpoints)} are named")
        chosen = [str(path) for path in averaging.last(reading.expanded(checkpoints[0]), last)]
    with ProgressBar("bytes") as progress:
        done = averaging.average(
            chosen, out, config=config, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite, on_progress=progress
        )
    _print(done, chosen)


def _print(done: Average, checkpoints: list[str]) -> None:
    plan = done.plan
    say("mean of", f"{counted(len(checkpoints), 'checkpoint')} of {plan.parameters:,} parameters, in float64")
    say("config", plan.config_origin)
    say("tokenizer", str(plan.tokenizer or "none"))
    furthest = max(done.distances)
    for given, distance in zip(checkpoints, done.distances, strict=True):
        drawn = bar(distance / furthest, _BAR) if furthest else ""
        say("distance", f"{distance:<#8.2g}  {drawn:<{_BAR}}  {given}")
    for note in plan.notes:
        say("note", note)
    for warning in done.warnings:
        say("warning", warning, err=True)
    say("wrote", f"{done.destination}, {plan.dtype}, {byte_size(plan.nbytes)}")
