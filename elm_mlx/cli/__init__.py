"""The command line: one file a command; parse, call one function, print. No logic.

What a command needs of MLX is imported when the command runs, so that `--help` and errors come at once.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from elm_mlx.cli.adapter import adapter
from elm_mlx.cli.average import average
from elm_mlx.cli.chat import chat
from elm_mlx.cli.convert import convert
from elm_mlx.cli.data import data
from elm_mlx.cli.dpo import DpoCommand, dpo
from elm_mlx.cli.eval import evaluate
from elm_mlx.cli.export import export
from elm_mlx.cli.fuse import fuse
from elm_mlx.cli.generate import generate
from elm_mlx.cli.info import info
from elm_mlx.cli.lora import LoraCommand, lora
from elm_mlx.cli.lr_sweep import lr_sweep
from elm_mlx.cli.pretrain import pretrain
from elm_mlx.cli.report import report
from elm_mlx.cli.show import printable
from elm_mlx.cli.train_tokenizer import train_tokenizer
from elm_mlx.errors import ElmError
from elm_mlx.version import __version__

app = typer.Typer(
    name="elm-mlx",
    help="Own a small language model: convert, talk to, fine-tune and measure Apple's OpenELM with MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(adapter)
app.command()(average)
app.command()(chat)
app.command()(convert)
app.command()(data)
app.command(cls=DpoCommand)(dpo)
app.command("eval")(evaluate)
app.command()(export)
app.command()(fuse)
app.command()(generate)
app.command()(info)
app.command(cls=LoraCommand)(lora)
app.command()(lr_sweep)
app.command()(pretrain)
app.command()(report)
app.command()(train_tokenizer)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"elm-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    global _debug
    _debug = debug


_debug = False


def main() -> None:
    """Run the command line. An error is one line on stderr; 2 is the exit code of bad input, 1 of any other."""
    _prepare_streams()
    try:
        app()
    except (ElmError, OSError) as error:  # OSError: such as a full disk behind stdout
        if _debug:
            raise
        print(f"elm-mlx: {printable(error)}", file=sys.stderr)
        if isinstance(error, ElmError):
            sys.exit(error.exit_code)
        with suppress(OSError):  # or the exit would flush to it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as error:  # MLX's own
        if _debug:
            raise
        print(f"elm-mlx: MLX failed: {printable(error)} (--debug shows where)", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _prepare_streams() -> None:
    """A closed stream becomes an empty one, or the next file would get its number; what stdout cannot show, a `?`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
