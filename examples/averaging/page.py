"""Make the table and the picture of what run.py measured: `python examples/averaging/page.py [RESULTS]`.

Without a file it makes those of this folder's page again, from results.json beside it. Knows numbers alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from pages import fill, recorded  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's


@dataclass(frozen=True)
class Mean:
    """The loss of a mean of checkpoints.

    Attributes:
        every: updates from one checkpoint to the next, but for the last, which ends the run.
        steps: updates that each of the checkpoints has had.
        start: by book: nats a token of its first 16 windows of 512 tokens.
        whole: the same of all of it.
    """

    every: int
    steps: list[int]
    start: dict[str, float]
    whole: dict[str, float]


def main() -> None:
    means = [Mean(**each) for each in recorded(HERE / "results.json")]
    fill(HERE / "README.md", table(means))
    if importlib.util.find_spec("matplotlib"):
        draw(means, HERE / "losses.png")


def table(means: list[Mean]) -> str:
    """Markdown: nats a token of each book's beginning and of all of it, and how much less than the last one's."""
    last, titles = means[0], list(means[0].start)
    heads = [f"{title}, {part}" for part in ("beginning", "all") for title in titles]
    lines = ["| mean of | updates apart | " + " | ".join(heads) + " | all, less than the last |"]
    lines.append("| --- |" + " ---: |" * (len(heads) + 2))
    for each in means:
        losses = [measured[title] for measured in (each.start, each.whole) for title in titles]
        less = sum(last.whole[title] - each.whole[title] for title in titles) / len(titles)
        name, apart, gain = f"the last {len(each.steps)}", f"{each.every:,}", f"{less:.4f}"
        if each is last:
            name, apart, gain = "the last alone", "", ""
        lines.append(f"| {name} | {apart} | " + " | ".join(f"{loss:.4f}" for loss in losses) + f" | {gain} |")
    return "\n".join(lines)


def draw(means: list[Mean], path: Path) -> None:
    """A panel for each book: its loss by the number of checkpoints, a line for each distance between them."""
    from matplotlib.figure import Figure

    last, titles = means[0], list(means[0].whole)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for panel, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        for every, colour in zip(sorted({each.every for each in means[1:]}), COLOURS, strict=False):
            points = [(1, last.whole[title])]
            points += [(len(each.steps), each.whole[title]) for each in means if each.every == every]
            panel.plot(*zip(*points, strict=True), color=colour, marker="o", label=f"{every} updates apart")
        panel.set(xlabel="checkpoints in the mean", ylabel="nats a token", title=title)
        panel.legend()
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
