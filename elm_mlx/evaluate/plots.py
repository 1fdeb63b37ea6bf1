"""Runs' scores as a picture. Knows `results.json` and matplotlib, which is imported only here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elm_mlx import files
from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate.scores import SHARES


def draw(runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars with their standard errors, a group a task, a colour a run, in per cent.

    Args:
        runs: results by the name to show.

    Raises:
        InputError: they have no score in per cent in common.
        ElmError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ElmError("--plot needs matplotlib: pip install 'elm-mlx[plot]'") from None
    tables = [_mains(results) for results in runs.values()]
    tasks = [key for key in tables[0] if all(key in table for table in tables)]
    if not tasks:
        raise InputError("the runs have no score in common that could be drawn")
    width = 0.8 / len(tables)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(tasks) + 1), 4), layout="constrained")
    try:
        for number, (name, table) in enumerate(zip(runs, tables, strict=True)):
            places = [place + (number - (len(tables) - 1) / 2) * width for place in range(len(tasks))]
            heights, errors = zip(*(table[key] for key in tasks), strict=True)
            axes.bar(places, heights, width, yerr=errors, label=name, capsize=2, error_kw={"linewidth": 0.8})
        axes.set_xticks(range(len(tasks)), [_label(*key) for key in tasks], rotation=25, ha="right")
        axes.set_ylabel("per cent, ± one standard error")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        with files.new_file(path) as file:
            figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=150)
    except ValueError as error:  # a format that matplotlib does not know
        raise InputError(f"{path}: {error}") from None
    finally:
        pyplot.close(figure)


def _mains(results: Mapping[str, Any]) -> dict[tuple[str, int, str], tuple[float, float]]:
    """Each task's first metric, if it is a share."""
    found: dict[tuple[str, int, str], tuple[float, float]] = {}
    seen = set()
    for line in results["scores"]:
        if (line["task"], line["shots"]) not in seen and line["metric"] in SHARES:
            key = (line["task"], line["shots"], line["metric"])
            found[key] = 100 * line["value"], 100 * (line["stderr"] or 0.0)
        seen.add((line["task"], line["shots"]))
    return found


def _label(task: str, shots: int, metric: str) -> str:
    return f"{task}, {shots} shots" if shots else task
