"""Results as tables of text: for a terminal, in Markdown, and for the page.

Knows which columns there are and how numbers are written. Knows nothing of HTML.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from elm_mlx.bench.figures import SIDES, Case
from elm_mlx.bench.machine import Speeds
from elm_mlx.bench.results import Results, Row, Spread, bounds
from elm_mlx.escape import printable
from elm_mlx.model.config import PRESETS

Table = tuple[list[str], list[list[str]]]

NOTE = (
    "Medians of all measurements, least and greatest in brackets. Sides were measured in turn: a ratio is the median "
    "of pairs that ran one right after the other, × 2 where elm-mlx is twice as fast. Of elm-mlx it is said what share "
    "of the machine's own speed it reaches, of the one of two that bounds it."
)
_HEADER = [
    "model", "tokens", "side", "prompt, tokens/s", "beside it", "first token, s", "generation, tokens/s", "beside it",
    "memory",
]  # fmt: skip


def speed(results: Results) -> Table:
    """A line for each side of each case that was measured; `beside it` is what the bound or the ratio is."""
    lines = []
    for row in results.rows:
        for side in row.figures:
            prompt, first, decode = (spread(row.spread(side, figure)) for figure in ("prompt", "first", "decode"))
            of_prompt, of_decode = (_beside(row, side, figure, results.speeds) for figure in ("prompt", "decode"))
            case = [f"{short(row.case)}, {_stored(row, side)}", tokens(row.case), SIDES[side]]
            lines.append([*case, prompt, of_prompt, first, decode, of_decode, _memory(row, side)])
    return _HEADER, lines


def brief(row: Row, speeds: Speeds) -> Table:
    """A case in medians, for a terminal of 80 columns: the share of the roofline, or how much faster ours is."""
    lines = []
    for side in row.figures:
        cells = []
        for figure in ("prompt", "decode"):
            found, ratio, bound = row.spread(side, figure), row.ratio(side, figure), bounds(row, speeds)[figure]
            beside = f" {bound.share:.0%}" if side == "ours" and bound else f" ×{ratio.median:.2f}" if ratio else ""
            cells.append(number(found.median) + (beside if side == "ours" or ratio else "") if found else "")
        first = row.spread(side, "first")
        lines.append([SIDES[side], cells[0], number(first.median) if first else "", cells[1], _memory(row, side)])
    return ["", "prompt, tokens/s", "first token, s", "generation, tokens/s", "memory"], lines


def _beside(row: Row, side: str, figure: str, speeds: Speeds) -> str:
    bound = bounds(row, speeds)[figure]
    if side == "ours":
        return f"{bound.share:.0%} of {bound.by}" if bound else ""
    ratio = spread(row.ratio(side, figure))
    return f"× {ratio}" if ratio else ""


def _memory(row: Row, side: str) -> str:
    found = row.spread(side, "memory")
    return f"{found.high / 1e9:.2f} GB" if found else ""


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
    """What it is, and what it can do."""
    lines = [[label, text] for label, text in results.machine.items()]
    for dtype, flops in results.speeds.matmul.items():
        lines.append([f"products in {dtype}", f"{flops / 1e9:,.0f} GFLOP/s"])
    if results.speeds.bandwidth:
        lines.append(["memory read by a row times a matrix", f"{results.speeds.bandwidth / 1e9:,.1f} GB/s"])
    return ["machine", ""], lines


def roofline(results: Results) -> Table:
    """Of each figure of ours, what it is bound by."""
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
    """What was not measured and why, a sentence each."""
    lines: dict[str, None] = {}
    for row in results.rows:
        for side, reason in row.skipped.items():
            lines[f"{short(row.case)}, {row.case.precision}, {tokens(row.case)}: {SIDES[side]} left out: {reason}"] = (
                None
            )
    return [*lines] + ([] if results.complete else ["Interrupted: the cases after these are missing."])


def markdown(results: Results) -> str:
    """All of it as Markdown, without a title."""
    parts = [f"Measured on {results.when[:10]}: " + "; ".join(_named(results)) + "."]
    parts += ["\n".join(_markdown(speed(results))), NOTE, "\n".join(_markdown(roofline(results)))]
    if results.norms:
        parts.append("\n".join(_markdown(norms(results))))
    parts.append("\n".join(f"- {line}" for line in left_out(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _named(results: Results) -> Iterator[str]:
    """The machine in a sentence."""
    plain = ("processor", "system")
    for label, text in machine(results)[1]:
        yield text if label in plain else f"{text} cores" if label == "cores" else f"{label} {text}"


def _markdown(table: Table) -> Iterator[str]:
    header, lines = table
    if not lines:
        return
    yield "| " + " | ".join(header) + " |"
    yield "| " + " | ".join("---" if column < 3 else "---:" for column in range(len(header))) + " |"
    for line in lines:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"


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
    return f"{case.prompt:,} + {case.new:,}" + (f", {case.batch} at once" if case.batch > 1 else "")


def spread(values: Spread | None) -> str:
    """`541 (530 to 550)`."""
    if values is None:
        return ""
    if values.low == values.high:
        return number(values.median)
    return f"{number(values.median)} ({number(values.low)} to {number(values.high)})"


def number(value: float) -> str:
    """Three digits, or all of those before the point; of millions and more, a unit."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
