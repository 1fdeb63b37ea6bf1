"""The losses of two shapes, from several seeds each: tables and a plot.

Knows numbers alone; nothing of models and how they came about.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Student's t, 95 %, by the number of differences.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
_COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito's


@dataclass(frozen=True)
class Results:
    """Everything by shape; there are two.

    Attributes:
        parameters: of a model.
        speed: tokens a second.
        tuning: nats a token by learning rate, on documents like those that were trained on.
        losses: nats a token and bits a byte by held-out book, for each seed.
    """

    parameters: dict[str, int]
    speed: dict[str, float]
    tuning: dict[str, dict[float, float]]
    losses: dict[str, list[dict[str, tuple[float, float]]]]

    def of(self, shape: str, book: str | None, measure: int = 0) -> list[float]:
        """Each seed's loss on a book, or the mean over the books; 0 is nats a token, 1 bits a byte."""
        return [
            statistics.fmean(values[measure] for title, values in seed.items() if book in (None, title))
            for seed in self.losses[shape]
        ]

    @property
    def books(self) -> list[str]:
        return list(next(iter(self.losses.values()))[0])


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences, and how far to either side of it the 95 % interval reaches, by Student's t.

    It says what another draw of weights and order would do, and nothing of other texts or sizes.
    """
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), _T[len(differences)] * error


def tables(results: Results) -> str:
    """Markdown: the shapes, the learning rates, and the losses with their spread."""
    first, second = results.parameters
    lines = ["| | parameters | tokens/s | best learning rate |", "| --- | ---: | ---: | ---: |"]
    for shape, tuned in results.tuning.items():
        best = min(tuned, key=tuned.__getitem__)
        lines.append(f"| {shape} | {results.parameters[shape]:,} | {results.speed[shape]:,.0f} | {best:g} |")
    lines += ["", *_tuning(results), ""]
    columns = [*results.books, None]
    lines += ["| held out, nats a token | " + " | ".join(book or "mean of these" for book in columns) + " |"]
    lines += ["| --- |" + " ---: |" * len(columns)]
    for shape in results.parameters:
        cells = [[f"{loss:.4f}" for loss in results.of(shape, book)] for book in columns]
        for number, row in enumerate(zip(*cells, strict=True), 1):
            lines.append(f"| {shape}, seed {number} | " + " | ".join(row) + " |")
    for shape in results.parameters:
        cells = [results.of(shape, book) for book in columns]
        spread = " | ".join(f"{statistics.fmean(cell):.4f} (sd {statistics.stdev(cell):.4f})" for cell in cells)
        lines.append(f"| {shape}, mean | {spread} |")
    lines.append(f"| {first} less {second}, 95 % | {_differences(results, columns, 0)} |")
    lines.append(f"| the same, bits a byte | {_differences(results, columns, 1)} |")
    return "\n".join(lines)


def _tuning(results: Results) -> list[str]:
    rates = sorted({rate for tuned in results.tuning.values() for rate in tuned})
    lines = ["| nats a token, by learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("| --- |" + " ---: |" * len(rates))
    for shape, tuned in results.tuning.items():
        texts = {rate: f"{loss:.4f}" if math.isfinite(loss) else "broke off" for rate, loss in tuned.items()}
        cells = " | ".join(texts.get(rate, "") for rate in rates)
        lines.append(f"| {shape} | {cells} |")
    return lines


def _differences(results: Results, columns: Sequence[str | None], measure: int) -> str:
    cells = []
    for book in columns:
        first, second = (results.of(shape, book, measure) for shape in results.parameters)
        mean, reach = interval([a - b for a, b in zip(first, second, strict=True)])
        cells.append(f"{mean:+.4f} ± {reach:.4f}")
    return " | ".join(cells)


def draw(results: Results, path: Path) -> None:
    """Learning rates to the left; then each book, a line for each seed from one shape to the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    tuning, *panels = figure.subplots(1, 1 + len(results.books))
    for (shape, tuned), colour, marker in zip(results.tuning.items(), _COLOURS, "os", strict=True):
        finite = {rate: loss for rate, loss in tuned.items() if math.isfinite(loss)}
        tuning.plot(list(finite), list(finite.values()), color=colour, marker=marker, label=shape)
    tuning.set(xscale="log", xlabel="learning rate", ylabel="nats a token")
    tuning.set_title("set aside, one seed", fontsize="medium")
    rates = sorted({rate for tuned in results.tuning.values() for rate in tuned})
    tuning.set_xticks(rates, [f"{rate:g}" for rate in rates])
    tuning.set_xticks([], minor=True)
    tuning.legend()
    for panel, book in zip(panels, results.books, strict=True):
        both = [results.of(shape, book) for shape in results.parameters]
        for pair in zip(*both, strict=True):
            panel.plot([0, 1], pair, color="0.7", zorder=1)
        for at, (losses, colour, marker) in enumerate(zip(both, _COLOURS, "os", strict=True)):
            panel.scatter([at] * len(losses), losses, color=colour, marker=marker, zorder=2)
            panel.plot([at - 0.12, at + 0.12], [statistics.fmean(losses)] * 2, color=colour, linewidth=2)
        panel.set(xlim=(-0.5, 1.5), ylabel="nats a token")
        panel.set_title(book, fontsize="medium")
        panel.set_xticks([0, 1], list(results.parameters))
    for panel in (tuning, *panels):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
