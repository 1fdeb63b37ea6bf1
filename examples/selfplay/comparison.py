"""Held-out problems asked of several models, each the same ones with the same luck, and what the answers say."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from elm_mlx import load
from elm_mlx.inference.solving import solve
from elm_mlx.problems.built_in import TASKS
from elm_mlx.problems.drawn_problems import held_out_problems
from elm_mlx.problems.pass_rates import pass_at_k, pass_rate

ANSWERS = 8  # to each problem
Counts = list[tuple[int, int]]  # of each problem its right answers, and all
Measured = Mapping[tuple[str, int], Counts]  # by what was done, and the seed


def measured(model: Path, adapter: Path, task: str, difficulty: int, problems: int, to: Path) -> Counts:
    """Returns the counts of held-out problems; those of an earlier call, if the file `to` is there."""
    if not to.exists():
        network, tokenizer = load(model, adapter_path=adapter)
        drawn = held_out_problems(TASKS[task], [difficulty], problems)
        solved = solve(network, tokenizer, None, TASKS[task], drawn, ANSWERS, max_tokens=24, seed=0)
        to.write_text(json.dumps([each.count for each in solved]))
    return [(right, of) for right, of in json.loads(to.read_text())]


def gain(before: Counts, after: Sequence[Counts]) -> tuple[float, float, float]:
    """Returns how much higher pass@1 is in the runs `after` than `before`, in points, and its 95 % interval.

    Paired by problems, for what is hard is so for both; the interval is of other problems and of other seeds.
    """
    first = [right / of for right, of in before]
    rates = [[right / of for right, of in run] for run in after]
    by_problem = [
        100 * (statistics.fmean(late) - early) for early, late in zip(first, zip(*rates, strict=True), strict=True)
    ]
    by_run = [100 * statistics.fmean(run) for run in rates]
    mean, square = statistics.fmean(by_problem), statistics.variance(by_problem) / len(by_problem)
    if len(by_run) > 1:
        square += statistics.variance(by_run) / len(by_run)
    return mean, mean - 1.96 * math.sqrt(square), mean + 1.96 * math.sqrt(square)


def table(counts: Measured, ways: Sequence[str]) -> list[str]:
    """Returns the README's table: a row for each way, its runs pooled, with what it has gained over SFT."""
    lines = ["| | pass@1 | each seed | pass@8 | gain in pass@1 |", "| --- | --- | --- | --- | --- |"]
    (first,) = (found for (way, _), found in counts.items() if way not in ways)
    for name in ("after SFT", *ways):
        runs = [found for (way, _), found in counts.items() if way == name]
        pooled = [(sum(right for right, _ in each), sum(of for _, of in each)) for each in zip(*runs, strict=True)]
        one = pass_rate(pooled, 1)
        eight = statistics.fmean(pass_at_k(right, of, ANSWERS) for run in runs for right, of in run)
        seeds = ", ".join(f"{pass_rate(run, 1).rate:.1%}" for run in runs)
        gained = ""
        if name in ways:
            mean, low, high = gain(first, runs)
            gained = f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"
        lines.append(
            f"| {name} | {one.rate:.1%} ({one.low:.1%} to {one.high:.1%}) | {seeds} | {eight:.1%} | {gained} |"
        )
    return lines


def plot(counts: Measured, ways: Sequence[str], to: Path) -> None:
    """Draws pass@1 of each run, and pass@8 above it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(("after SFT", *ways)):
        for k, marker, colour in ((1, "o", "#0072B2"), (ANSWERS, "s", "#D55E00")):
            rates = [100 * pass_rate(found, k).rate for (way, _), found in counts.items() if way == name]
            label = f"pass@{k}, a run each" if place == 0 else None
            axes.plot([place] * len(rates), rates, marker, color=colour, alpha=0.7, label=label)
    axes.set_xticks(range(1 + len(ways)), ["after SFT", *ways])
    axes.set_ylabel("held-out problems, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to)
