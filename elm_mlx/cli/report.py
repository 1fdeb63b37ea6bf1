"""`elm-mlx report`: runs side by side on one page."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elm_mlx.cli.screen import counted, line, table
from elm_mlx.errors import InputError

if TYPE_CHECKING:
    from elm_mlx.train.metrics import RunMetrics


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Directories of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write. (default: report.html in the first run's directory)")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the charts into this file too; needs matplotlib.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are not reports, too.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write nothing: show the page on this machine, and let it follow the runs.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="For --watch: the port; 0 for any.")] = 8081,
    open_: Annotated[bool, typer.Option("--open", help="For --watch: open the page in a browser.")] = False,
) -> None:
    """Write one page with the curves of training runs, laid over each other."""
    if watch:
        if out is not None or png is not None:
            raise InputError("--watch writes no file: leave out --out and --png")
        _watch(runs, port, open_)
        return
    from elm_mlx import directories
    from elm_mlx.train import metrics
    from elm_mlx.train import run_report as pages

    found = metrics.read(runs)
    out = runs[0] / "report.html" if out is None else out
    directories.check_file(out, overwrite, pages.PAGE_MARK)
    if png is not None:
        directories.check_file(png, overwrite, directories.PNG_MARK)
        pages.write_png(found, png)
    pages.write_page(found, out)
    for run in found:
        for note in run.notes:
            line(f"{run.name}: {note}", err=True)
    if sys.stdout.isatty():
        _print(found)
    count = counted(len(found), "run")
    line(f"wrote {out}" + (f" and {png}" if png is not None else "") + f": {count}")


def _watch(runs: list[Path], port: int, open_: bool) -> None:
    """Serves the page until Ctrl-C or SIGTERM."""
    import uvicorn

    from elm_mlx.serve.server import listen, url_of
    from elm_mlx.train.run_watch import app

    for run in runs:
        if not run.is_dir():
            raise InputError(f"{run}: no such directory; give the directory that a run was written to")
    bound = listen("127.0.0.1", port)
    bound.listen()
    url = url_of(bound, "127.0.0.1")
    line(f"the page is at {url}; Ctrl-C ends")
    if open_:
        typer.launch(url)
    config = uvicorn.Config(app(runs), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    for each in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has ended, which is a good end
        signal.signal(each, lambda number, frame: None)
    uvicorn.Server(config).run([bound])


def _print(runs: list[RunMetrics]) -> None:
    from elm_mlx.train.run_report import summary

    table(["", *(run.name for run in runs)], [[label, *cells] for label, cells in summary(runs)])
