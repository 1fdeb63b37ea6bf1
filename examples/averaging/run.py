"""The last checkpoint of a run against means of its last ones: `python examples/averaging/run.py RUN`.

Means are made by a command of elm-mlx's, which is printed before it runs, and measured (../measure.py) on books that
were not trained on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
from command import elm  # noqa: E402
from measure import held_out_loss  # noqa: E402

import elm_mlx  # noqa: E402

CLASSICS = HERE.parent / "classics"
MOST = 5  # checkpoints of a mean
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's


@dataclass(frozen=True)
class Mean:
    """The loss of a mean of checkpoints.

    Attributes:
        every: updates from one checkpoint to the next, but for the last, which ends the run.
        steps: updates that each of the checkpoints has had.
        start: by book: nats a token and bits a byte of its first 16 windows of 512 tokens.
        whole: the same of all of it.
    """

    every: int
    steps: list[int]
    start: dict[str, tuple[float, float]]
    whole: dict[str, tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a run's last checkpoint with means of its last ones.")
    parser.add_argument("run", type=Path, nargs="?", default=Path("build/remake/run"), help="a run of `pretrain`")
    parser.add_argument("--held-out", type=Path, default=CLASSICS / "held-out.jsonl.gz", help="what is measured on")
    parser.add_argument("--out", type=Path, default=Path("build/averaging"), help="where everything is written")
    arguments = parser.parse_args()
    run, held_out = arguments.run, arguments.held_out
    every = saved_every(run)
    means = [
        Mean(apart * every, steps, *measured(run, steps, held_out, arguments.out))
        for apart, steps in choices(last_in_a_row(run, every))
    ]
    (arguments.out / "results.json").write_text(json.dumps([asdict(each) for each in means], indent=1) + "\n", "utf-8")
    print("\n" + table(means))
    if importlib.util.find_spec("matplotlib"):
        draw(means, arguments.out / "losses.png")


def saved_every(run: Path) -> int:
    """Updates from one checkpoint of the run to the next, as its recipe says."""
    try:
        about = json.loads((run / "run.json").read_text("utf-8"))
        return about["settings"]["run"]["save_every"]
    except (OSError, KeyError):
        sys.exit(f"{run}: is no run of `elm-mlx pretrain`")


def last_in_a_row(run: Path, every: int) -> list[int]:
    """The steps of the run's last checkpoints: every so many updates, and the end.

    A run keeps its best checkpoint too, which may lie further back, or in between.
    """
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    row = steps[-1:]
    for step in steps[-2::-1]:
        if step % every == 0 and row[0] - step <= every:
            row.insert(0, step)
    if len(row) < 2:
        sys.exit(f"{run}: needs two checkpoints in a row, and has {len(row)}")
    return row


def choices(row: list[int]) -> list[tuple[int, list[int]]]:
    """The last one; the last two to five; the same leaving out every other one; all, if there are more.

    Each with how far apart they are in the row.
    """
    chosen = [(1, row[-1:])]
    for apart in (1, 2):
        some = row[::-1][::apart]
        chosen += [(apart, some[:count][::-1]) for count in range(2, min(MOST, len(some)) + 1)]
    return chosen + ([(1, row)] if len(row) > MOST else [])


def measured(run: Path, steps: list[int], held_out: Path, out: Path) -> list[dict[str, tuple[float, float]]]:
    """Make a mean of checkpoints, a model directory in `out`; its losses on beginnings, and on whole books."""
    directory = out / f"{len(steps)}-from-{steps[0]}"
    checkpoints = [run / "checkpoints" / f"step-{step:08}" for step in steps]
    elm("average", *checkpoints, "--out", directory, "--overwrite")
    model, tokenizer = elm_mlx.load(directory, compute_dtype="float32")
    assert tokenizer is not None
    return [
        {book["title"]: held_out_loss(model, tokenizer, book["text"], windows) for book in texts.read(held_out)}
        for windows in (16, None)
    ]


def table(means: list[Mean]) -> str:
    """Markdown: nats a token of each book's beginning and of all of it, and how much less than the last one's."""
    last, titles = means[0], list(means[0].start)
    heads = [f"{title}, {part}" for part in ("beginning", "all") for title in titles]
    lines = ["| mean of | updates apart | " + " | ".join(heads) + " | all, less than the last |"]
    lines.append("| --- |" + " ---: |" * (len(heads) + 2))
    for each in means:
        losses = [measured[title][0] for measured in (each.start, each.whole) for title in titles]
        less = sum(last.whole[title][0] - each.whole[title][0] for title in titles) / len(titles)
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
            points = [(1, last.whole[title][0])]
            points += [(len(each.steps), each.whole[title][0]) for each in means if each.every == every]
            panel.plot(*zip(*points, strict=True), color=colour, marker="o", label=f"{every} updates apart")
        panel.set(xlabel="checkpoints in the mean", ylabel="nats a token", title=title)
        panel.legend()
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
