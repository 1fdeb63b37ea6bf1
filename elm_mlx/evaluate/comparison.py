"""Comparison of runs on the same questions: how far apart they are, and whether that could be chance; and a picture.

Scores of one question by two models go together, so their differences are resampled, not each model's scores: a paired
bootstrap (Efron, 1979; Koehn, 2004). Where a score is right or wrong, the p-value is that of McNemar's exact test on
the questions on which the models differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elm_mlx import directories, files
from elm_mlx.errors import ElmError, InputError
from elm_mlx.evaluate import tasks
from elm_mlx.evaluate.scores import LOWER_IS_BETTER, SHARES

RESAMPLES = 10_000
_AT_ONCE = 1 << 22  # drawn indices held at once

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoreDifference:
    """One metric of one task, of a second run less a first one's.

    Attributes:
        first, second: means, as fractions where scores are.
        low, high: limits of 95 % of the resampled differences.
        p: probability of a difference as large or larger by chance: McNemar's where scores are 0 or 1, else the
            bootstrap's.
        better: whether the second is better, by its sign alone.
    """

    task: str
    shots: int
    metric: str
    count: int
    first: float
    second: float
    low: float
    high: float
    p: float
    better: bool

    @property
    def value(self) -> float:
        return self.second - self.first


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[ScoreDifference]:
    """Compares every metric of every task in both results, a group's tasks as one where both have all of them.

    Raises:
        InputError: they have no task in common, or not the same questions of it.
    """
    ours, theirs = (
        {(entry["task"], entry["shots"]): entry for entry in results["tasks"].values()} for results in (first, second)
    )
    common = sorted(key for key in ours if key in theirs)
    for key in common:
        if ours[key]["questions"] != theirs[key]["questions"]:
            raise InputError(f"{key[0]}: not the same questions in both runs; run both with the same --limit and data")
    a, b = (_gathered([run[key] for key in common]) for run in (ours, theirs))
    if not a:
        raise InputError("the runs have no task in common, nor a text of several documents")
    found = []
    for (task, shots, metric), values in a.items():
        one, other = np.asarray(values, np.float64), np.asarray(b[task, shots, metric], np.float64)
        low, high, p = bootstrap(other - one)
        if np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all():
            p = mcnemar(one, other)
        means = float(one.mean()), float(other.mean())
        better = means[1] < means[0] if metric in LOWER_IS_BETTER else means[1] > means[0]
        found.append(ScoreDifference(task, shots, metric, len(one), *means, low, high, p, better))
    return found


def bootstrap(differences: Values, seed: int = 0) -> tuple[float, float, float]:
    """Limits of 95 % of the means of resampled `differences`, and how often they'd be as far from 0 by chance."""
    draw = np.random.default_rng(seed)
    count = len(differences)
    means = np.empty(RESAMPLES)
    step = max(1, _AT_ONCE // count)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        means[start : start + size] = differences[draw.integers(0, count, (size, count))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    middle = differences.mean()
    further = np.count_nonzero(np.abs(means - middle) >= abs(middle) - 1e-12)
    return float(low), float(high), (further + 1) / (RESAMPLES + 1)


def mcnemar(first: Values, second: Values) -> float:
    """McNemar's test, two-sided and exact, on the questions that only one of two got right."""
    only_first = int(np.count_nonzero((first == 1) & (second == 0)))
    only_second = int(np.count_nonzero((first == 0) & (second == 1)))
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = ways = 1  # of a fair coin, thrown so often: whole numbers, for a float cannot hold 2 ** 1024
    for k in range(fewer):
        ways = ways * (count - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**count)


def _gathered(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, str], list[float]]:
    """Each question's values by name, shots and metric."""
    names = tasks.report_names([(entry["task"], entry["group"], entry["shots"]) for entry in entries])
    found: dict[tuple[str, int, str], list[float]] = {}
    for task, entry in zip(names, entries, strict=True):
        for metric, values in entry["values"].items():
            # A perplexity's values are log-probabilities, and so is their mean.
            name = "log-likelihood" if metric == "perplexity" else metric
            found.setdefault((task, entry["shots"], name), []).extend(values)
    return found


def draw(runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws scores as bars with their standard errors, a group for each task, a colour for each run, in per cent.

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
    tables = [_percentages(results) for results in runs.values()]
    common = [key for key in tables[0] if all(key in table for table in tables)]
    if not common:
        raise InputError("the runs have no score in common that could be drawn")
    width = 0.8 / len(tables)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(common) + 1), 4), layout="constrained")
    try:
        for number, (name, table) in enumerate(zip(runs, tables, strict=True)):
            places = [place + (number - (len(tables) - 1) / 2) * width for place in range(len(common))]
            heights, errors = zip(*(table[key] for key in common), strict=True)
            axes.bar(places, heights, width, yerr=errors, label=name, capsize=2, error_kw={"linewidth": 0.8})
        labels = [f"{task}, {shots} shots" if shots else task for task, shots, _ in common]
        axes.set_xticks(range(len(common)), labels, rotation=25, ha="right")
        axes.set_ylabel("per cent, ± one standard error")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        with files.new_file(path) as file:
            kind = path.suffix.removeprefix(".").lower() or "png"
            figure.savefig(file, format=kind, dpi=150, metadata=directories.PNG_METADATA if kind == "png" else None)
    except ValueError as error:  # a format that matplotlib does not know
        raise InputError(f"{path}: {error}") from None
    finally:
        pyplot.close(figure)


def _percentages(results: Mapping[str, Any]) -> dict[tuple[str, int, str], tuple[float, float]]:
    """The first metric and its standard error of each task for which it is a share."""
    first: dict[tuple[str, int], Mapping[str, Any]] = {}
    for line in results["scores"]:
        first.setdefault((line["task"], line["shots"]), line)
    return {
        (*key, line["metric"]): (100 * line["value"], 100 * (line["stderr"] or 0.0))
        for key, line in first.items()
        if line["metric"] in SHARES
    }
