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
        Path, typer.Argument(metavar="SRC", help="A directory of PEFT's, a CoreNet .pt, or an adapter of ours.")
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    to: Annotated[Literal["mlx", "peft"], typer.Option(help="mlx is what --adapter and mlx-lm read.")] = "mlx",
    alpha: Annotated[
        float | None, typer.Option(help="The strength of a CoreNet adapter. (default: what --config says)")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="CoreNet's, with lora_alpha in it. (default: beside SRC)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter at DST.")] = False,
) -> None:
    """Bring an adapter into the layout of mlx-lm or of PEFT, checked against the model that it is for."""
    from elm_mlx.store.adapter_conversion import convert_adapter

    made = convert_adapter(model, src, dst, to=to, alpha=alpha, settings=config, overwrite=overwrite)
    say("wrote", f"{dst}: {made.describe()}")
