"""Runs side by side: a page that opens anywhere, a picture, and the few figures that sum a run up.

A long run's points are thinned, its extremes kept. The page's script is in `report.html`, the looks of all our pages in
`page.css`.
"""

from __future__ import annotations

import html
import io
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elm_mlx import directories, files
from elm_mlx.errors import ElmError
from elm_mlx.train.metrics import Column, RunMetrics, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE_MARK = b"content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # near its top

_FIRST = ("loss", "learning_rate", "tokens_per_second", "matmul_share", "grad_norm", "memory")
_AS_IT_IS = ("learning_rate", "memory")  # nothing to smooth
_LAST_LOSSES = 20  # whose mean is the final one
_BUCKETS, _LEAST, _MOST = 22_000, 40, 1_000  # of the page; of a column at least, at most: a page of 2 MB or less
_EXCERPT = 2_000  # characters of a prompt, or of an answer
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito's
_MARKERS = "os^D"
_LINES = ("-", "--", ":", "-.")  # of the first seven runs, the next seven, …

Rows = list[tuple[str, list[str]]]


def write_page(runs: Sequence[RunMetrics], out: Path) -> None:
    """Writes one HTML file without anything outside it. Raises ElmError where it cannot be written."""
    files.write_text(out, page(runs))


def page(runs: Sequence[RunMetrics], watched: bool = False) -> str:
    """Returns the page: `report.html` with the runs in it as JSON, which cannot end the element that it is in.

    Args:
        watched: the page asks where it comes from for `content` again and again.
    """
    template = resources.files("elm_mlx.train").joinpath("report.html").read_text("utf-8")
    style = resources.files("elm_mlx").joinpath("page.css").read_text("utf-8")
    head, _, tail = template.partition("{{content}}")
    for name, text in (
        ("style", style), ("title", html.escape(_title(runs))), ("watched", " data-watched" if watched else ""),
        ("connect", "; connect-src 'self'" if watched else ""),
    ):  # fmt: skip
        head = head.replace(f"{{{{{name}}}}}", text)
    return head + content(runs) + tail


def content(runs: Sequence[RunMetrics]) -> str:
    """Returns all that the page shows, as JSON without `<`."""
    charted = [chart for chart in charts(runs) if chart]
    count = sum(key in run.columns for run in runs for chart in charted for key in chart) + len(runs)
    buckets = min(_MOST, max(_LEAST, _BUCKETS // count))
    found = {
        "title": _title(runs),
        "charts": charted,
        "smoothed": [key for key, *_ in charted if key not in _AS_IT_IS],
        "runs": [_embedded(run, charted, buckets) for run in runs],
        "summary": summary(runs),
        "about": about(runs),
        "samples": samples(runs),
    }
    return json.dumps(found, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _title(runs: Sequence[RunMetrics]) -> str:
    return ", ".join(run.name for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")


def charts(runs: Sequence[RunMetrics]) -> list[list[str]]:
    """Returns the keys of each chart: a key, and its `valid_` counterpart if there is one. A test is in the summary."""
    found = (key for run in runs for key in run.columns)
    keys = dict.fromkeys(key for key in found if key != "skipped" and not key.startswith("test_"))
    bases = dict.fromkeys(key.removeprefix("valid_") for key in keys)
    order = [key for key in _FIRST if key in bases] + [key for key in bases if key not in _FIRST]
    return [[key for key in (base, f"valid_{base}") if key in keys] for base in order]


def summary(runs: Sequence[RunMetrics]) -> Rows:
    """Returns rows of a label and a cell for each run; rows that no run has anything for are left out."""
    columns = [_summed_up(run) for run in runs]
    return [(label, [column[label] for column in columns]) for label in columns[0] if any(c[label] for c in columns)]


def about(runs: Sequence[RunMetrics]) -> list[tuple[str, list[str], bool]]:
    """Returns each key of the runs' `run.json`, its values, and whether they differ; those that do come first."""
    keys = dict.fromkeys(key for run in runs for key in run.about)
    telling = [run.about for run in runs if run.about]
    rows = []
    for key in keys:
        differs = len({values.get(key) for values in telling}) > 1
        rows.append((key, [run.about.get(key, "") for run in runs], differs))
    return sorted(rows, key=lambda row: not row[2])


def samples(runs: Sequence[RunMetrics]) -> list[list[str]]:
    """Returns run, step, verdict, prompt and answer of what the models of the runs were asked, first and last."""
    return [
        [run.name, f"{step:,}", verdict, *(text[:_EXCERPT] for text in texts)]
        for run in runs for step, asked in run.samples for verdict, *texts in asked
    ]  # fmt: skip


def _summed_up(run: RunMetrics) -> dict[str, str]:
    valid, losses = run.column("valid_loss"), run.column("loss").finite()
    numbers = valid.finite()
    best = min(numbers, default=math.nan)
    at = valid.steps[valid.values.index(best)] if numbers else 0
    rates, memory = run.column("tokens_per_second").finite(), run.column("memory").finite()
    shares = run.column("matmul_share").finite()
    lost = sum(len(column.values) - len(column.finite()) for column in (valid, run.column("loss")))
    return {
        "steps": f"{run.steps:,}",
        "tokens": f"{run.tokens.values[-1]:,.0f}" if run.tokens.values and run.tokens.values[-1] else "",
        "training loss at the end": _loss(statistics.fmean(losses[-_LAST_LOSSES:])) if losses else "",
        "validation, first": _loss(numbers[0]) if numbers else "",
        "validation, last": _loss(numbers[-1]) if numbers else "",
        "validation, best": _loss(best) if numbers else "",
        "best at step": (f"{at:,}" if at else "0, before training") if numbers else "",
        "test": _loss(tests[-1]) if (tests := run.column("test_loss").finite()) else "",
        "tokens/s, median": f"{statistics.median(rates):,.0f}" if rates else "",
        "share of matmul speed, median": f"{statistics.median(shares):.1%}" if shares else "",
        "peak memory": f"{max(memory) / 1e9:.2f} GB" if memory else "",
        "time in updates": _duration(run.seconds.values[-1]) if run.seconds.values else "",
        "skipped updates": f"{sum(run.column('skipped').values):.0f}" if "skipped" in run.columns else "",
        "NaN or infinite losses": f"{lost:,}" if lost else "",
    }


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


def _embedded(run: RunMetrics, charted: Sequence[Sequence[str]], buckets: int) -> dict[str, Any]:
    # One step in so many: between these, tokens and seconds grow evenly enough for an axis.
    every = max(1, len(run.tokens.steps) // buckets)
    kept = sorted({*range(0, len(run.tokens.steps), every), len(run.tokens.steps) - 1} - {-1})
    columns = {key: run.columns[key] for chart in charted for key in chart if key in run.columns}
    return {
        "name": run.name,
        "path": readable(str(run.path)),
        "notes": run.notes,
        "clock": {
            "step": [run.tokens.steps[i] for i in kept],
            "tokens": [round(run.tokens.values[i]) for i in kept],
            "seconds": [round(run.seconds.values[i], 2) for i in kept],
        },
        "series": {key: thinned(column, buckets) for key, column in columns.items()},
    }


def thinned(column: Column, buckets: int) -> dict[str, list[Any]]:
    """Returns a column as JSON can hold it; NaN and infinities are null.

    One of more than twice `buckets` values is cut into as many stretches. Of each stay, under `step` and `value`, its
    least and its greatest value and the first that is no number, and, under `mean`, `count` and `at`, the mean of its
    numbers, how many they are and the last one's step: what smoothing needs, whose result is then that of all values.
    """
    steps, values = column.steps, column.values
    if len(steps) <= 2 * buckets:
        return {"step": steps.tolist(), "value": [_short(value) for value in values]}
    kept, means = {0, len(steps) - 1}, []
    for bucket in range(buckets):
        part = range(bucket * len(steps) // buckets, (bucket + 1) * len(steps) // buckets)
        numbers = [i for i in part if math.isfinite(values[i])]
        if len(numbers) < len(part):
            kept.add(next(i for i in part if not math.isfinite(values[i])))
        if numbers:
            kept |= {min(numbers, key=values.__getitem__), max(numbers, key=values.__getitem__)}
        mean = statistics.fmean(values[i] for i in numbers) if numbers else math.nan
        means.append((steps[part[-1]], _short(mean), len(numbers)))
    at, mean_values, counts = (list(each) for each in zip(*means, strict=True))
    order = sorted(kept)
    return {
        "step": [steps[i] for i in order],
        "value": [_short(values[i]) for i in order],
        "at": at,
        "mean": mean_values,
        "count": counts,
    }


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def smoothed(values: Sequence[float], over: float) -> list[float]:
    """Returns an exponential mean over about `over` values, without a bias to 0 at its start; NaN stays NaN."""
    decay = 1 - 1 / max(1.0, over)
    total = weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight if math.isfinite(value) else math.nan)
    return means


def check_plotting() -> None:
    """Raises ElmError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ElmError("a PNG needs matplotlib: pip install 'elm-mlx[plot]'; the page needs nothing") from None


def write_png(runs: Sequence[RunMetrics], out: Path) -> None:
    """Draws the page's charts as a picture. Raises ElmError where matplotlib is missing or `out` cannot be written."""
    check_plotting()
    from matplotlib.figure import Figure  # draws with Agg: no display, no window

    charted = charts(runs)
    rows = 1 + math.ceil((len(charted) - 1) / 2)
    figure = Figure(figsize=(11, 4.5 + 2.6 * (rows - 1)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(rows, 2, height_ratios=[1.7] + [1.0] * (rows - 1))
    for number, keys in enumerate(charted):
        place = grid[0, :] if number == 0 else grid[1 + (number - 1) // 2, (number - 1) % 2]
        _draw(figure.add_subplot(place), runs, keys)
    handles = [figure.axes[0].plot([], [], **_style(i))[0] for i in range(len(runs))]
    columns = min(4, max(1, 130 // (8 + max(len(run.name) for run in runs))))
    legend = figure.legend(handles, [""] * len(runs), loc="outside upper left", ncols=columns, frameon=False)
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text(run.name)
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that no font has
        figure.savefig(image, format="png", metadata=directories.PNG_METADATA)
    with files.new_file(out) as file:
        file.write(image.getvalue())


def _style(number: int) -> dict[str, Any]:
    line = _LINES[number // len(_COLOURS) % len(_LINES)]
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": line, "linewidth": 1.6}


def _draw(axes: Axes, runs: Sequence[RunMetrics], keys: Sequence[str]) -> None:
    from matplotlib.ticker import EngFormatter

    for i, run in enumerate(runs):
        for key in keys:
            column, style = run.column(key), _style(i)
            points = thinned(column, _MOST)
            steps, values = points["step"], [math.nan if value is None else value for value in points["value"]]
            lost = [step for step, value in zip(steps, values, strict=True) if math.isnan(value)]
            if lost:
                top = axes.get_xaxis_transform()
                (marks,) = axes.plot(lost, [1.0] * len(lost), "x", color=style["color"], transform=top, clip_on=False)
                marks.set_in_layout(False)
            if key.startswith("valid_"):
                style |= {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 4.5, "markerfacecolor": "white"}
            elif key not in _AS_IT_IS and len(column.steps) > 1:
                axes.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.35)
                every = max(1, len(column.steps) // _MOST)
                steps = column.steps[::every].tolist()
                count = len(column.steps)
                values = smoothed(column.values, max(min(8, count / 4), count / 50))[::every]
            axes.plot(steps, values, **style)
    axes.set_title(keys[0].replace("_", " "), loc="left", fontsize=10).set_parse_math(False)
    axes.set_xlabel("step", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if keys[0] == "memory":
        axes.yaxis.set_major_formatter(EngFormatter())
