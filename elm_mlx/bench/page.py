"""Results as a page that opens anywhere: bars that are drawn into it, and the tables.

Knows HTML and SVG. What is in the tables is `tables`'; the looks are those of all our pages.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib import resources

from elm_mlx.bench import tables
from elm_mlx.bench.figures import SIDES
from elm_mlx.bench.results import Bound, Results, Row, bounds
from elm_mlx.bench.tables import Table

_WIDTH, _LABEL, _BAR, _GAP = 560, 175, 20, 8  # of a chart, in its own units
_FIGURES = {"prompt": "reading the prompt", "decode": "generating"}


def page(results: Results) -> str:
    """The text of one HTML file without anything outside it, nor a script."""
    title = f"elm-mlx bench: {results.suite}"
    style = resources.files("elm_mlx").joinpath("page.css").read_text("utf-8")
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="note">{html.escape(results.when)}. {html.escape(tables.NOTE)} A dashed line is the roofline.</p>',
        '<div class="charts">', *_charts(results), "</div>",
        *_section("Speed", tables.speed(results)), *_section("Roofline", tables.roofline(results)),
        *_section("RMSNorm by itself", tables.norms(results)), *_section("Machine", tables.machine(results)),
        *(f'<p class="note">{html.escape(line)}</p>' for line in tables.left_out(results)),
    ]  # fmt: skip
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(body) + "\n</body>\n</html>\n"


def _section(title: str, table: Table) -> Iterator[str]:
    header, lines = table
    if not lines:
        return
    yield f'<h2>{html.escape(title)}</h2>\n<div class="scroll"><table>'
    if any(header[1:]):
        yield "<thead><tr>" + "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header) + "</tr></thead>"
    for first, *rest in lines:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        yield f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>'
    yield "</table></div>"


def _charts(results: Results) -> Iterator[str]:
    """Two for each case: its own scale, for sizes differ by a thousand."""
    for row in results.rows:
        bound = bounds(row, results.speeds)
        for figure, what in _FIGURES.items():
            if any(row.spread(side, figure) for side in row.figures):
                case = row.case
                many = f", {case.batch} at once" if case.batch > 1 else ""
                count = f"{case.prompt:,} tokens" if figure == "prompt" else f"{case.new:,} after {case.prompt:,}"
                title = f"{tables.short(case)}, {case.precision}: {what}, {count}{many}; tokens/s"
                chart = _bars(row, figure, bound[figure], title)
                yield f'<div class="chart"><h3>{html.escape(title)}</h3>\n{chart}</div>'


def _bars(row: Row, figure: str, bound: Bound | None, title: str) -> str:
    """A bar for each side to its median, a line from its least to its greatest value."""
    spreads = {side: found for side in row.figures if (found := row.spread(side, figure))}
    ceiling = spreads["ours"].median / bound.share if bound and "ours" in spreads else None
    most = max(each.high for each in spreads.values())
    shown = ceiling is not None and ceiling < 4 * most  # a roof far above would leave no room for the bars
    scale = (_WIDTH - _LABEL - 70) / max(most, ceiling if shown and ceiling else 0.0)
    height = len(spreads) * (_BAR + _GAP) + _GAP
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(title, quote=True)}">']
    for number, (side, found) in enumerate(spreads.items()):
        y, middle = _GAP + number * (_BAR + _GAP), _GAP + number * (_BAR + _GAP) + _BAR / 2
        low, high = (_LABEL + scale * value for value in (found.low, found.high))
        parts += [
            f'<text x="{_LABEL - 8}" y="{middle + 4:.1f}" text-anchor="end">{html.escape(SIDES[side])}</text>',
            f'<rect x="{_LABEL}" y="{y}" width="{scale * found.median:.1f}" height="{_BAR}" '
            f'style="fill:var(--c{number % 7})"/>',
            f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<text x="{high + 6:.1f}" y="{middle + 4:.1f}">{tables.number(found.median)}</text>',
        ]
    if shown and ceiling:
        x = _LABEL + scale * ceiling
        parts.append(f'<line class="cross" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    return "\n".join([*parts, "</svg>"])
