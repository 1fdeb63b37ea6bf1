"""Makes the tables and the plot of README.md from recorded trainings: `python examples/layerwise/page.py [RECORDS]`.

Without a file it makes them again from records.jsonl beside it. Knows numbers alone; nothing of models.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import study  # noqa: E402
from pages import fill, recorded  # noqa: E402
from spread import interval  # noqa: E402
from study import LAYERWISE, UNIFORM, Cell, Record, Training  # noqa: E402

_COLOURS = {study.CORENET: "#0072B2", study.FAN_IN: "#D55E00"}  # Okabe and Ito's
_LIKELY_TRIALS = 3  # of a shape, where none has been made


def main() -> None:
    results = Results(recorded(HERE / "records.jsonl", study.read))
    fill(HERE / "README.md", tables(results))
    if importlib.util.find_spec("matplotlib"):
        draw(results, HERE / "losses.png")


class Results:
    """The records of a study, by what was asked of them."""

    def __init__(self, records: dict[Training, Record]) -> None:
        self.records = records

    def tuning(self, size: str, shape: str, initial: str) -> dict[float, float]:
        """Returns nats a token by learning rate, at the end of short runs, on documents like those trained on."""
        kind = (size, shape, initial, study.TRIAL, 0)
        losses = {
            one.rate: last_loss(record) for one, record in self.records.items()
            if (one.size, one.shape, one.initial, one.budget, one.seed) == kind
        }  # fmt: skip
        return dict(sorted(losses.items()))

    def finals(self, cell: Cell) -> dict[int, Record]:
        """Returns a cell's records by seed, those of the best rate times the first of its `times`."""
        rates = self.tuning(cell.size, cell.shape, cell.initial)
        if not rates:
            return {}
        rate = cell.times[0] * min(rates, key=rates.__getitem__)
        trained = (Training(cell.size, cell.shape, cell.initial, cell.budget, rate, seed) for seed in cell.seeds)
        return {one.seed: self.records[one] for one in trained if one in self.records}

    def differences(self, cell: Cell, measure: int = 0, book: str | None = None) -> list[float]:
        """Returns by seed a cell's held-out loss less the uniform model's; 0 is nats a token, 1 bits a byte."""
        base = self.finals(Cell(cell.size, UNIFORM, cell.initial, cell.budget))
        return [
            held_out(record, measure, book) - held_out(base[seed], measure, book)
            for seed, record in self.finals(cell).items() if seed in base
        ]  # fmt: skip


def last_loss(record: Record) -> float:
    """Returns nats a token at the end of training, infinite where it broke off."""
    last = record["validation"][-1][1]
    return math.inf if last is None else float(last)


def held_out(record: Record, measure: int = 0, book: str | None = None) -> float:
    """Returns the loss on a held-out book, or the mean over the books."""
    return statistics.fmean(losses[measure] for title, losses in record["held_out"].items() if book in (None, title))


def tables(results: Results) -> str:
    """Markdown: the differences, every run's loss, the learning rates, speed, and what is left to do."""
    return "\n\n".join(filter(None, (make(results) for make in (_differences, _losses, _rates, _speeds, _left))))


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Returns a table whose first columns, so many, are texts, and the others numbers; nothing without rows."""
    if not rows:
        return ""
    rule = ["---"] * texts + ["---:"] * (len(names) - texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *rows))


def compared() -> list[Cell]:
    """Returns the cells that are set against the uniform model, in the study's order."""
    cells = (cell for part in study.PARTS for cell in part if cell.shape != UNIFORM and cell.times == (1.0,))
    return sorted(cells, key=lambda cell: (list(study.SIZES).index(cell.size), -cell.budget))


def _differences(results: Results) -> str:
    rows = []
    for cell in compared():
        nats, bits = results.differences(cell), results.differences(cell, 1)
        if nats:
            each = ", ".join(f"{value:+.3f}" for value in nats)
            kind = (cell.size, f"{cell.budget:g}", cell.initial, cell.shape)
            rows.append((*kind, _spread(nats), each, _spread(bits)))
    names = ("parameters", "tokens a parameter", "initial weights", "less the uniform model's loss")
    return _table((*names, "nats a token, 95 %", "by seed", "bits a byte, 95 %"), rows, 4)


def _spread(differences: Sequence[float]) -> str:
    if len(differences) == 1:
        return f"{differences[0]:+.4f}"
    mean, reach = interval(differences)
    return f"{mean:+.4f} ± {reach:.4f}"


def _losses(results: Results) -> str:
    books = list(dict.fromkeys(title for record in results.records.values() for title in record["held_out"]))
    rows = []
    for cell in (cell for part in study.PARTS for cell in part if cell.times == (1.0,)):
        records = list(results.finals(cell).values())
        if records:
            columns = [*((0, book) for book in books), (0, None), (1, None)]
            means = (_mean([held_out(record, *column) for record in records]) for column in columns)
            rows.append((_named(cell), str(len(records)), *means))
    return _table(("held out, nats a token: mean of the seeds (sd)", "seeds", *books, "mean", "bits a byte"), rows)


def _named(cell: Cell) -> str:
    return f"{cell.size}, {cell.budget:g} a parameter, {cell.initial}, {cell.shape}"


def _mean(values: Sequence[float]) -> str:
    spread = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _rates(results: Results) -> str:
    cells = [cell for part in study.PARTS for cell in part]
    tried = {_named(replace(cell, budget=study.TRIAL)): results.tuning(cell.size, cell.shape, cell.initial)
             for cell in cells}  # fmt: skip
    for cell in (cell for cell in cells if cell.times != (1.0,)):
        kind = (cell.size, cell.shape, cell.initial, cell.budget, cell.seeds[0])
        tried[_named(cell)] = {
            one.rate: last_loss(record) for one, record in results.records.items()
            if (one.size, one.shape, one.initial, one.budget, one.seed) == kind
        }  # fmt: skip
    rates = sorted({rate for losses in tried.values() for rate in losses})
    rows = [(name, *_row(losses, rates)) for name, losses in tried.items() if len(losses) > 1]
    return _table(("set aside, nats a token, by learning rate", *(f"{rate:g}" for rate in rates)), rows)


def _row(losses: dict[float, float], rates: Sequence[float]) -> list[str]:
    texts = {rate: f"{loss:.4f}" if math.isfinite(loss) else "broke off" for rate, loss in losses.items()}
    best = min(losses, key=losses.__getitem__)
    return [f"**{texts[rate]}**" if rate == best else texts.get(rate, "") for rate in rates]


def _speeds(results: Results) -> str:
    rows = []
    for size in study.SIZES:
        pairs = []
        for cell in (cell for cell in compared() if cell.size == size and cell.shape == LAYERWISE):
            uniform, scaled = results.finals(replace(cell, shape=UNIFORM)), results.finals(cell)
            pairs += [(uniform[seed], scaled[seed]) for seed in uniform if seed in scaled]
        if pairs:
            found = sorted({record["flops"] for pair in pairs for record in pair})
            flops = " and ".join(f"{each / 1e6:.3f}" for each in found)
            speeds = [[record["tokens_per_second"] for record in side] for side in zip(*pairs, strict=True)]
            ratio = statistics.median(scaled / uniform for uniform, scaled in zip(*speeds, strict=True))
            name = f"{size} ({pairs[0][0]['parameters']:,} in each)"
            rows.append((name, flops, *(f"{statistics.median(side):,.0f}" for side in speeds), f"{ratio:.2f}"))
    names = ("parameters", "MFLOPs a token, forward", "uniform, tokens/s of a training", "layer-wise")
    return _table((*names, "ratio, median of the pairs"), rows)


def _left(results: Results) -> str:
    """Returns what is done of each part, and the time that the rest takes two processors with nothing else to do."""
    rows, counted = [], set[tuple[str, str, str]]()
    for part in study.PARTS:
        done = wanted = 0
        tokens = 0.0
        for cell in part:
            kind, parameters = (cell.size, cell.shape, cell.initial), study.SIZES[cell.size].parameters
            trained = sum(len(results.finals(replace(cell, times=(times,)))) for times in cell.times)
            asked = len(cell.seeds) * len(cell.times)
            done, wanted = done + trained, wanted + asked
            tokens += (asked - trained) * cell.budget * parameters
            if kind not in counted:
                counted.add(kind)
                tokens += max(0, _LIKELY_TRIALS - len(results.tuning(*kind))) * study.TRIAL * parameters
        minutes = tokens / study.SIZES[part[0].size].tokens_per_second / 2 / 60
        left = f"{minutes:.0f} min" if minutes < 60 else f"{minutes / 60:.1f} h"
        rows.append((_name(part), f"{done} of {wanted}", left if done < wanted else "–"))
    return _table(("the study's parts, in their order", "trained", "left, two processors"), rows)


def _name(cells: Sequence[Cell]) -> str:
    shapes = ", ".join(dict.fromkeys(cell.shape for cell in cells))
    initial = ", ".join(dict.fromkeys(cell.initial for cell in cells))
    rates = ", half and double rates" if cells[0].times != (1.0,) else ""
    return f"{cells[0].size}, {cells[0].budget:g} a parameter: {shapes}; {initial}{rates}"


def draw(results: Results, path: Path) -> None:
    """The differences with their intervals to the left; to the right how they came about while training went on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    forest, course = figure.subplots(1, 2)
    cells = [cell for cell in compared() if results.differences(cell)]
    for at, cell in enumerate(cells):
        found, colour = results.differences(cell), _COLOURS[cell.initial]
        if len(found) > 1:
            mean, reach = interval(found)
            forest.errorbar(mean, -at, xerr=reach, fmt="o", color=colour, capsize=3)
        forest.plot(found, [-at] * len(found), "|", color=colour, markersize=9)
        if cell.shape == LAYERWISE:
            points = _course(results, cell)
            style = {"color": colour, "linestyle": ("-", "--", ":")[list(study.SIZES).index(cell.size)]}
            course.plot(
                *zip(*points, strict=True), label=f"{cell.size}, {cell.budget:g} a parameter, {cell.initial}", **style
            )
    forest.set_yticks(
        [-at for at in range(len(cells))],
        [f"{cell.size}, {cell.budget:g} a parameter\n{cell.shape}, {cell.initial}" for cell in cells], fontsize="small",
    )  # fmt: skip
    forest.set(xlabel="nats a token above the uniform model, 95 %")
    forest.set_title("held-out books", fontsize="medium")
    course.set(xlabel="tokens a parameter", ylabel="nats a token, layer-wise less uniform")
    course.set_title("while training, documents set aside", fontsize="medium")
    forest.axvline(0, color="0.7", zorder=0)
    course.axhline(0, color="0.7", zorder=0)
    if cells:
        course.legend(frameon=False)
    for panel in (forest, course):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


def _course(results: Results, cell: Cell) -> list[tuple[float, float]]:
    """Returns tokens a parameter and the mean difference from the uniform model, at each validation but the first."""
    base, scaled = results.finals(Cell(cell.size, UNIFORM, cell.initial, cell.budget)), results.finals(cell)
    runs = [(base[seed]["validation"], scaled[seed]["validation"]) for seed in scaled if seed in base]
    points = []
    for pairs in zip(*(zip(*each, strict=True) for each in runs), strict=True):
        step = pairs[0][0][0]
        if step and all(loss is not None for pair in pairs for _, loss in pair):
            mean = statistics.fmean(other - one for (_, one), (_, other) in pairs)
            points.append((step * study.UPDATE / study.SIZES[cell.size].parameters, mean))
    return points


if __name__ == "__main__":
    main()
