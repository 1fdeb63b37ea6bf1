"""`elm-mlx report`: runs side by side on one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elm_mlx.cli.screen import counted, line, table

if TYPE_CHECKING:
    from elm_mlx.train.metrics import RunMetrics


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Directories of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write. (default: report.html in the first run's directory)")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the charts into this file too; needs matplotlib.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are not reports, too.")] = False,
) -> None:
    """Write one page with the curves of training runs, laid over each other."""
    from elm_mlx import directories
    from elm_mlx.train import metrics
    from elm_mlx.train import run_report as pages

    found = metrics.read(runs)
    out = runs[0] / "report.html" if out is None else out
    directories.check_file(out, overwrite, pages.PAGE_HEAD)
    if png is not None:
        directories.check_file(png, overwrite, pages.PNG_HEAD)
        pages.write_png(found, png)
    pages.write_page(found, out)
    for run in found:
        for note in run.notes:
            line(f"{run.name}: {note}", err=True)
    if sys.stdout.isatty():
        _print(found)
    count = counted(len(found), "run")
    line(f"wrote {out}" + (f" and {png}" if png is not None else "") + f": {count}")


def _print(runs: list[RunMetrics]) -> None:
    from elm_mlx.train.run_report import summary

    table(["", *(run.name for run in runs)], [[label, *cells] for label, cells in summary(runs)])
