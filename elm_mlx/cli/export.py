"""`elm-mlx export MODEL DST`: a model becomes a PyTorch checkpoint again."""

from __future__ import annotations

from typing import Annotated

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import byte_size, say


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or what `convert` reads.")],
    dst: options.Destination,
    dtype: options.WeightDType = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Write a model as CoreNet's PyTorch checkpoint: checkpoint.pt, config.yaml and the tokenizer."""
    import elm_mlx_convert

    plan = elm_mlx_convert.export(model, dst, dtype=dtype, overwrite=overwrite)
    for name, lines in (("note", plan.notes), ("warning", plan.warnings)):
        for line in lines:
            say(name, line)
    say("wrote", f"{dst}: {plan.parameters:,} parameters in {plan.dtype}, {byte_size(plan.nbytes)}")
