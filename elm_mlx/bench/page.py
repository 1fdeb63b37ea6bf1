"""Results as a page that opens anywhere: bars that are drawn into it, and the tables.

Knows HTML and SVG. What is in the tables is `tables`'; the looks are those of all our pages.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib import resources

from elm_mlx.bench import tables
from elm_mlx.bench.figures import SIDES
from elm_mlx.bench.results import Bound, Results, Row, Spread, bounds
from elm_mlx.bench.tables import Table

_WIDTH, _FIGURE, _LABEL, _BAR, _GAP = 440, 60, 16, 16, 8  # of a chart, in its own units
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
    cards = ' class="cards"' if any(header[1:]) else ""
    yield f'<h2>{html.escape(title)}</h2>\n<div class="scroll"><table{cards}>'
    if any(header[1:]):
        yield "<thead><tr>" + "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header) + "</tr></thead>"
    for first, *rest in lines:
        names = [f' data-name="{html.escape(name, quote=True)}"' if name else "" for name in header[1:]]
        cells = "".join(f"<td{name}>{html.escape(cell)}</td>" for name, cell in zip(names, rest, strict=True))
        yield f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>'
    yield "</table></div>"


def _charts(results: Results) -> Iterator[str]:
    """Ours over all cases, and then all sides in each case with a scale of its own, for sizes differ by a thousand."""
    if len([row for row in results.rows if row.figures]) > 2:
        for figure, what in (*_FIGURES.items(), ("memory", "memory")):
            bars = [(_label(row), found, 0) for row in results.rows if (found := row.spread("ours", figure))]
            if bars:
                memory = figure == "memory"
                yield _chart(f"elm-mlx: {what}, {'GB' if memory else 'tokens/s'}", bars, unit=1e9 if memory else 1)
    for row in results.rows:
        case, bound = row.case, bounds(row, results.speeds)
        for figure, what in _FIGURES.items():
            sides = [(side, each) for side in row.figures if (each := row.spread(side, figure))]
            if sides:
                count = f"{case.prompt:,} tokens" if figure == "prompt" else f"{case.new:,} after {case.prompt:,}"
                many = f", {case.batch} at once" if case.batch > 1 else ""
                title = f"{tables.short(case)}, {case.precision}: {what}, {count}{many}; tokens/s"
                bars = [(SIDES[side], each, number) for number, (side, each) in enumerate(sides)]
                yield _chart(title, bars, _roof(row, figure, bound[figure]))


def _label(row: Row) -> str:
    return f"{tables.short(row.case).removeprefix('OpenELM-')} {row.case.precision}, {tables.tokens(row.case)}"


def _roof(row: Row, figure: str, bound: Bound | None) -> float | None:
    """Tokens a second that the machine could do."""
    ours = row.spread("ours", figure)
    return ours.median / bound.share if ours and bound else None


def _chart(title: str, bars: list[tuple[str, Spread, int]], roof: float | None = None, unit: float = 1) -> str:
    """Bars to medians, in colours by number, each below its label and with a line from the least to the greatest."""
    most = max(found.high for _, found, _ in bars)
    roof = roof if roof is not None and roof < 4 * most else None  # one far above would leave no room for the bars
    scale = (_WIDTH - _FIGURE) / max(most, roof or 0.0)
    height = len(bars) * (_LABEL + _BAR + _GAP) + _GAP
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(title, quote=True)}">']
    for number, (label, found, colour) in enumerate(bars):
        top = number * (_LABEL + _BAR + _GAP)
        y, middle = top + _LABEL, top + _LABEL + _BAR / 2
        low, high = (scale * value for value in (found.low, found.high))
        parts += [
            f'<text x="0" y="{y - 4}">{html.escape(label)}</text>',
            f'<rect x="0" y="{y}" width="{scale * found.median:.1f}" height="{_BAR}" '
            f'style="fill:var(--c{colour % 7})"/>',
            f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<text x="{high + 6:.1f}" y="{middle + 4:.1f}">{tables.number(found.median / unit)}</text>',
        ]
    if roof is not None:
        x = scale * roof
        parts.append(f'<line class="cross" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    return f'<div class="chart"><h3>{html.escape(title)}</h3>\n' + "\n".join([*parts, "</svg></div>"])
