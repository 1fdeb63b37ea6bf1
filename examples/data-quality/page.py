"""Table and plot of what run.py recorded: `python examples/data-quality/page.py [RESULTS]`.

Without a file it makes those of this folder's page again, from results.json beside it. Knows numbers alone.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from pages import fill, recorded  # noqa: E402
from spread import cell, interval  # noqa: E402

BASE = "classics"
ARMS = {
    "classics": "the classics, as they are",
    "classics, strict": "a third, by strict limits",
    "classics, like": "a third, by likeness",
    "noise-25": "with 25 % of noise",
    "noise-25, filters": "25 %, by the default filters",
    "noise-25, like": "25 %, by these and likeness",
    "noise-50": "with 50 % of noise",
    "noise-50, filters": "50 %, by the default filters",
    "noise-50, like": "50 %, by these and likeness",
}
KINDS = {"clean": ("clean",), "copies": ("copy", "changed copy"), "scans": ("scan",), "boilerplate": ("boilerplate",)}
NATS, BITS = 0, 1
COLOURS = {"classics": "#0072B2", "noise-25": "#E69F00", "noise-50": "#D55E00"}  # Okabe and Ito's


def main() -> None:
    results = recorded(HERE / "results.json")
    fill(HERE / "README.md", table(results))
    if importlib.util.find_spec("matplotlib"):
        plot(results, HERE / "losses.png")


def losses(results: dict[str, Any], arm: str, measure: int = NATS) -> dict[str, float]:
    """By seed, the mean of the books."""
    found = results["losses"][arm].items()
    return {seed: statistics.fmean(book[measure] for book in books.values()) for seed, books in found}


def more(results: dict[str, Any], arm: str, measure: int = NATS) -> list[float]:
    """How much more it loses than the classics as they are, for each seed that both have."""
    base = losses(results, BASE, measure)
    return [loss - base[seed] for seed, loss in losses(results, arm, measure).items() if seed in base]


def table(results: dict[str, Any]) -> str:
    lines = [
        f"| trained on | seeds | nats a token | more than the classics | bits a byte | {' | '.join(KINDS)} |",
        "| --- |" + " ---: |" * (4 + len(KINDS)),
    ]
    for arm in (arm for arm in ARMS if arm in results["losses"]):
        found = losses(results, arm)
        tokens = results["made of"].get(arm, {})
        shares = [sum(tokens.get(kind, 0) for kind in kinds) / max(1, sum(tokens.values())) for kinds in KINDS.values()]
        against = "" if arm == BASE else cell(more(results, arm), "+.3f")
        cells = [
            ARMS[arm], str(len(found)), cell([*found.values()]), against,
            f"{statistics.fmean(losses(results, arm, BITS).values()):.3f}", *(f"{share:.0%}" for share in shares),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """How much more each loses than the classics: a bar with the interval of the mean, a point a seed."""
    from matplotlib.figure import Figure

    arms = [arm for arm in ARMS if arm in results["losses"]][::-1]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        found = more(results, arm)
        mean, reach = interval(found)
        axes.barh(
            place, mean, xerr=0 if arm == BASE else reach, color=COLOURS[arm.split(",")[0]], height=0.6, alpha=0.8
        )
        axes.plot(found, [place] * len(found), "k.", markersize=4)
    axes.set_yticks(range(len(arms)), [ARMS[arm] for arm in arms])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("held-out loss, more than that of the classics, nats a token")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
