"""`elm-mlx adapter MODEL SRC DST`: an adapter from PEFT or CoreNet, or to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import say


def adapter(
    model: options.ModelPath,
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="A PEFT directory, a CoreNet .pt, or an adapter of elm-mlx.")
    ],
    dst: options.Destination,
    to: Annotated[Literal["mlx", "peft"], typer.Option(help="mlx is for --adapter and mlx-lm.")] = "mlx",
    alpha: Annotated[
        float | None, typer.Option(help="Alpha of a CoreNet adapter. (default: what --config says)")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="CoreNet's config, which has lora_alpha. (default: beside SRC)")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Bring an adapter into the layout of mlx-lm or of PEFT, checked against the model that it is for."""
    from elm_mlx.store.adapter_conversion import convert_adapter

    made = convert_adapter(
        options.directory_of(model), src, dst, to=to, alpha=alpha, settings=config, overwrite=overwrite
    )
    say("wrote", f"{dst}: {made.describe()}")
