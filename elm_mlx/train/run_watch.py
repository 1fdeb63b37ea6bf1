"""A page that follows runs: it comes from this machine alone, and its figures are read anew as they grow."""

from __future__ import annotations

import html
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elm_mlx.directories import RUN_RECORD
from elm_mlx.errors import InputError
from elm_mlx.train import metrics, run_report
from elm_mlx.train.metrics import METRICS, RunMetrics

if TYPE_CHECKING:
    from starlette.applications import Starlette

_WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<title>elm-mlx report</title><p>{}</p></html>"""


def app(paths: Sequence[Path]) -> Starlette:
    """Returns the server of a page that shows the runs in these directories, which may not have begun.

    A request by another name than this machine's is refused, so that no page from elsewhere reads it (DNS rebinding).
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    latest = _Latest(paths)

    def page(request: Request) -> Response:
        try:
            return HTMLResponse(run_report.page(latest.runs()[1], watched=True))
        except InputError as error:
            return HTMLResponse(_WAITING.format(html.escape(str(error))))

    def content(request: Request) -> Response:
        try:
            tag, runs = latest.runs()
        except InputError as error:
            return PlainTextResponse(str(error), 503)
        if request.headers.get("If-None-Match") == tag:
            return Response(status_code=304)
        return Response(run_report.content(runs), media_type="application/json", headers={"ETag": tag})

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)
    return Starlette(routes=[Route("/", page), Route("/content", content)], middleware=[hosts])


class _Latest:
    """The metrics of runs, read again where their files have changed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths, self._tag, self._runs = paths, "", list[RunMetrics]()
        self._reading = threading.Lock()

    def runs(self) -> tuple[str, list[RunMetrics]]:
        """Returns them, after a text that changes with them. Raises InputError where one has none yet."""
        with self._reading:
            files = [path / name for path in self._paths for name in (METRICS, RUN_RECORD)]
            found = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
            tag = f'"{hash(tuple(found)):x}"'
            if tag != self._tag:
                self._runs = metrics.read(self._paths)
                self._tag = tag
            return self._tag, self._runs
