"""`elm-mlx models`: what of the hub lies on this machine, and removes it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from elm_mlx.cli.screen import byte_size, counted, line, say, table
from elm_mlx.errors import InputError


def models(
    remove: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Remove OWNER/NAME, or one OWNER/NAME@REVISION of it; may be repeated."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models that were downloaded from the hub or converted from there, or remove some."""
    from elm_mlx.store import cached_models
    from elm_mlx.store.model_names import conversions

    found = cached_models.cached_models()
    if remove:
        going = list({each.directory: each for name in remove for each in cached_models.chosen(found, name)}.values())
        size = byte_size(sum(each.nbytes for each in going))
        for each in going:
            say("remove", each.directory)
        if not yes:
            if not sys.stdin.isatty():
                raise InputError(f"--remove asks before {size} are gone, and nobody can answer here: pass --yes")
            typer.confirm(f"Remove {size}?", abort=True)
        cached_models.remove(going)
        say("removed", f"{counted(len(going), 'model')}, {size}")
        return
    if as_json:
        print(json.dumps([asdict(each) | {"directory": str(each.directory)} for each in found], indent=2))
        return
    if not found:
        from elm_mlx import hub

        line(f"no models in {hub.cache()} or {conversions()}; a command that takes MODEL downloads OWNER/NAME")
        return
    rows = [
        [
            f"{each.name}:{each.file}" if each.file else each.name, each.commit[: cached_models.SHOWN],
            "converted" if each.converted else "hub", each.about, byte_size(each.nbytes),
            time.strftime("%Y-%m-%d", time.localtime(each.used)),
        ]
        for each in found
    ]  # fmt: skip
    table(["model", "commit", "from", "what it is", "size", "last used"], rows, left=(0, 1, 2, 3, 5))
