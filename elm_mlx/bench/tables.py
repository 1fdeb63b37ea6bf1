"""Results as tables: for a terminal, in Markdown, and with charts on a page of HTML that needs no other file."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib import resources
from pathlib import Path

from elm_mlx.bench.results import Results, Row, Speeds, Spread, bounds
from elm_mlx.bench.suites import SIDES, Case
from elm_mlx.model.config import PRESETS
from elm_mlx.reading import printable

Table = tuple[list[str], list[list[str]]]  # headers, and lines of cells

NOTE = (
    "Medians of all measurements, least and greatest in brackets. Sides were measured in turn: a ratio is the median "
    "of pairs that ran one right after the other, × 2 where elm-mlx is twice as fast. For elm-mlx "
    "the share is given that it reaches of the machine's matmul speed or memory bandwidth, whichever bounds it, with "
    "weights as they are stored. *Same tokens* says how far a side's greedy text is ours."
)
_HEADER = [
    "model", "tokens", "side", "prompt, tokens/s", "beside it", "first token, s", "generation, tokens/s", "beside it",
    "memory", "same tokens",
]  # fmt: skip
_WIDTH, _FIGURE, _LABEL, _BAR, _GAP = 440, 60, 16, 16, 8  # of a chart, in its own units
_COMMIT, _SHORT = 40, 10  # letters of a commit, and of how it is shown
_OTHERS = ("llama.cpp", "pytorch")  # whose versions the machine's own software does not tell
_FIGURES = {"prompt": "reading the prompt", "decode": "generating"}


def speed(results: Results) -> Table:
    """A line for each side of each case that was measured; `beside it` has the roofline's share, or the ratio."""
    lines = []
    for row in results.rows:
        for side in row.figures:
            prompt, first, decode = (spread(row.spread(side, figure)) for figure in ("prompt", "first", "decode"))
            of_prompt, of_decode = (_beside(row, side, figure, results.speeds) for figure in ("prompt", "decode"))
            case = [f"{short(row.case)}, {_stored(row, side)}", tokens(row.case), SIDES[side]]
            lines.append([*case, prompt, of_prompt, first, decode, of_decode, _memory(row, side), _alike(row, side)])
    return _HEADER, lines


def brief(row: Row, speeds: Speeds) -> Table:
    """A case in medians, for a terminal of 80 columns: the share of the roofline, or how much faster ours is."""
    lines = []
    for side in row.figures:
        cells = []
        for figure in ("prompt", "decode"):
            found, bound = row.spread(side, figure), bounds(row, speeds)[figure]
            ratio = None if side == "ours" else row.ratio(side, figure)
            beside = f" {bound.share:.0%}" if side == "ours" and bound else f" ×{ratio.median:.2f}" if ratio else ""
            beside += _per_pass(row, side, figure)
            cells.append(number(found.median) + (beside if side == "ours" or ratio else "") if found else "")
        first = row.spread(side, "first")
        lines.append([SIDES[side], cells[0], number(first.median) if first else "", cells[1], _memory(row, side)])
    return ["", "prompt, tokens/s", "first token, s", "generation, tokens/s", "memory"], lines


def _beside(row: Row, side: str, figure: str, speeds: Speeds) -> str:
    bound = bounds(row, speeds)[figure]
    if side == "ours":
        return f"{bound.share:.0%} of {bound.by}" if bound else ""
    ratio = spread(row.ratio(side, figure))
    return f"× {ratio}{_per_pass(row, side, figure)}" if ratio else ""


def _per_pass(row: Row, side: str, figure: str) -> str:
    """How many tokens a pass over the model gave, of a side that guesses."""
    found = row.spread(side, "per_pass") if figure == "decode" else None
    return f", {found.median:.2f} a pass" if found else ""


def _memory(row: Row, side: str) -> str:
    found = row.spread(side, "memory")
    return f"{found.high / 1e9:.2f} GB" if found else ""


def _alike(row: Row, side: str) -> str:
    count = row.alike.get(side)
    return "" if count is None else "all" if count == row.case.new else f"first {count:,}"


def likeness(row: Row) -> str:
    """A line with the sides that wrote the same greedy tokens as ours; empty where none tells what it wrote."""
    sides = [f"{side} ({_alike(row, side)})" for side in row.alike]
    return f"the same tokens as elm-mlx: {', '.join(sides)}" if sides else ""


def norms(results: Results) -> Table:
    """RMSNorm by itself."""
    header = ["RMSNorm of", "in", "fused, µs", "naive, µs", "fused is faster by"]
    lines = [
        ["×".join(map(str, norm.shape)), norm.dtype, spread(Spread.of(norm.fused)), spread(Spread.of(norm.naive)),
         spread(norm.ratio)]
        for norm in results.norms
    ]  # fmt: skip
    return header, lines


def machine(results: Results) -> Table:
    """The machine and its speeds."""
    lines = [[label, text] for label, text in results.machine.items()]
    if results.commit:
        lines.append(["commit", ", ".join(each[:_SHORT] + each[_COMMIT:] for each in results.commit.split(", "))])
    readings = [each for row in results.rows for each in row.conditions]
    if sources := dict.fromkeys(each.power for each in readings if each.power):
        lines.append(["power", " and ".join(sources)])
    lines.append(["load before", f"{results.load:g}"])
    for dtype, flops in results.speeds.matmul.items():
        lines.append([f"products in {dtype}", f"{flops / 1e9:,.0f} GFLOP/s"])
    if results.speeds.bandwidth:
        lines.append(["memory read by a row times a matrix", f"{results.speeds.bandwidth / 1e9:,.1f} GB/s"])
    others = {(side, about.name) for row in results.rows for side, about in row.about.items() if side in _OTHERS}
    lines += [[SIDES[side], name.removeprefix(f"{SIDES[side]} ")] for side, name in sorted(others)]
    if results.note:
        lines.append(["note", results.note])
    return ["machine", ""], lines


def roofline(results: Results) -> Table:
    """The bound of each figure of ours."""
    header = ["model", "tokens", "figure", "to compute", "to move", "bound by", "share reached"]
    lines = []
    for row in results.rows:
        for name, bound in zip(("prompt", "a decode step"), bounds(row, results.speeds).values(), strict=True):
            if bound is not None:
                work = [f"{bound.flops / 1e9:,.2f} GFLOP", f"{bound.bytes / 1e6:,.0f} MB"]
                model = f"{short(row.case)}, {_stored(row, 'ours')}"
                lines.append([model, tokens(row.case), name, *work, bound.by, f"{bound.share:.0%}"])
    return header, lines


def left_out(results: Results) -> list[str]:
    """A sentence for each side that was not measured, with the reason; and for what may have slowed the machine."""
    lines = [
        f"{short(row.case)}, {row.case.precision}, {tokens(row.case)}: {SIDES[side]} left out: {reason}"
        for row in results.rows
        for side, reason in row.skipped.items()
    ]
    lines += [f"The machine may have been slower than it can be: {reason}." for reason in results.warnings]
    return [*dict.fromkeys(lines)] + ([] if results.complete else ["Interrupted: the cases after these are missing."])


def markdown(results: Results) -> str:
    """All of it as Markdown, without a title."""
    parts = [measured_on(results)]
    parts += [_markdown(speed(results)), NOTE, _markdown(roofline(results)), _markdown(norms(results))]
    parts.append("\n".join(f"- {line}" for line in left_out(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


def measured_on(results: Results) -> str:
    """The day and the machine, in a sentence."""
    about = [
        text if label in ("processor", "system") else f"{text} cores" if label == "cores" else f"{label} {text}"
        for label, text in machine(results)[1]
    ]
    return f"Measured on {results.when[:10]}: {'; '.join(about)}."


def _markdown(table: Table) -> str:
    header, lines = table
    rule = ["---" if column < 3 else "---:" for column in range(len(header))]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells)) if lines else ""


def short(case: Case) -> str:
    """The model's name without the directory."""
    return printable(case.model if case.model in PRESETS else Path(case.model).name or case.model)


def _stored(row: Row, side: str) -> str:
    about = row.about.get(side)
    stored = "" if row.case.precision == "stored" else row.case.precision
    if about is None or about.dtype == stored:
        return stored
    return f"{stored} in {about.dtype}" if stored else about.dtype


def tokens(case: Case) -> str:
    return f"{case.prompt:,} + {case.new:,}{case.manner}"


def spread(values: Spread | None) -> str:
    """`541 (530 to 550)`."""
    if values is None or values.low == values.high:
        return number(values.median) if values else ""
    return f"{number(values.median)} ({number(values.low)} to {number(values.high)})"


def number(value: float) -> str:
    """Three digits, or all of those before the point; of millions and more, a unit."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def page(results: Results) -> str:
    """The text of one HTML file without anything outside it, nor a script."""
    title = escape(f"elm-mlx bench: {results.suite.name}")
    style = resources.files("elm_mlx").joinpath("page.css").read_text("utf-8")
    body = [
        f"<h1>{title}</h1>",
        f'<p class="note">{escape(results.when)}. {escape(NOTE)} A dashed line is the roofline.</p>',
        '<div class="charts">', *_charts(results), "</div>",
        *_section("Speed", speed(results)), *_section("Roofline", roofline(results)),
        *_section("RMSNorm by itself", norms(results)), *_section("Machine", machine(results)),
        *(f'<p class="note">{escape(line)}</p>' for line in left_out(results)),
    ]  # fmt: skip
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(body) + "\n</body>\n</html>\n"


def _section(title: str, table: Table) -> Iterator[str]:
    header, lines = table
    if not lines:
        return
    cards = ' class="cards"' if any(header[1:]) else ""
    yield f'<h2>{escape(title)}</h2>\n<div class="scroll"><table{cards}>'
    if any(header[1:]):
        yield "<thead><tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header) + "</tr></thead>"
    names = [f' data-name="{escape(name)}"' if name else "" for name in header[1:]]
    for first, *rest in lines:
        cells = "".join(f"<td{name}>{escape(cell)}</td>" for name, cell in zip(names, rest, strict=True))
        yield f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</table></div>"


def _charts(results: Results) -> Iterator[str]:
    """Ours over all cases, and then all sides in each case with a scale of its own, for sizes differ by a thousand."""
    if len([row for row in results.rows if row.figures]) > 2:
        for figure, what in (*_FIGURES.items(), ("memory", "memory")):
            bars = [
                (f"{short(row.case).removeprefix('OpenELM-')} {row.case.precision}, {tokens(row.case)}", found, 0)
                for row in results.rows
                if (found := row.spread("ours", figure))
            ]
            if bars:
                unit, name = (1e9, "GB") if figure == "memory" else (1.0, "tokens/s")
                yield _chart(f"elm-mlx: {what}, {name}", bars, unit=unit)
    for row in results.rows:
        case, bound = row.case, bounds(row, results.speeds)
        for figure, what in _FIGURES.items():
            sides = [(side, each) for side in row.figures if (each := row.spread(side, figure))]
            if sides:
                count = f"{case.prompt:,} tokens" if figure == "prompt" else f"{case.new:,} after {case.prompt:,}"
                title = f"{short(case)}, {case.precision}: {what}, {count}{case.manner}; tokens/s"
                bars = [(SIDES[side], each, colour) for colour, (side, each) in enumerate(sides)]
                ours, limit = row.spread("ours", figure), bound[figure]
                yield _chart(title, bars, ours.median / limit.share if ours and limit else None)


def _chart(title: str, bars: list[tuple[str, Spread, int]], roof: float | None = None, unit: float = 1) -> str:
    """Bars to medians, in colours by number, each below its label and with a line from the least to the greatest.

    Args:
        roof: the throughput that the machine could reach.
        unit: of the figures that are written.
    """
    most = max(found.high for _, found, _ in bars)
    roof = roof if roof is not None and roof < 4 * most else None  # one far above would leave no room for the bars
    scale = (_WIDTH - _FIGURE) / max(most, roof or 0.0)
    height = len(bars) * (_LABEL + _BAR + _GAP) + _GAP
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for place, (label, found, colour) in enumerate(bars):
        y = place * (_LABEL + _BAR + _GAP) + _LABEL
        middle, low, high = y + _BAR / 2, scale * found.low, scale * found.high
        parts += [
            f'<text x="0" y="{y - 4}">{escape(label)}</text>',
            f'<rect x="0" y="{y}" width="{scale * found.median:.1f}" height="{_BAR}" '
            f'style="fill:var(--c{colour % 7})"/>',
            f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<text x="{high + 6:.1f}" y="{middle + 4:.1f}">{number(found.median / unit)}</text>',
        ]
    if roof is not None:
        x = scale * roof
        parts.append(f'<line class="cross" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    return f'<div class="chart"><h3>{escape(title)}</h3>\n' + "\n".join([*parts, "</svg></div>"])
