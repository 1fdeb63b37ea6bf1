"""The last checkpoint of a run against means of its last ones: `python examples/averaging/run.py RUN`.

Means are made by a command of elm-mlx's, which is printed before it runs, and measured (../measure.py) on books that
were not trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
from command import elm  # noqa: E402
from measure import held_out_loss  # noqa: E402
from page import Mean, table  # noqa: E402

import elm_mlx  # noqa: E402

CLASSICS = HERE.parent / "classics"
MOST = 5  # checkpoints of a mean


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
    print(f"\n{table(means)}\n\npython {HERE / 'page.py'} {arguments.out / 'results.json'} makes the page of it")


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


def measured(run: Path, steps: list[int], held_out: Path, out: Path) -> list[dict[str, float]]:
    """Make a mean of checkpoints, a model directory in `out`; its losses on beginnings, and on whole books."""
    directory = out / f"{len(steps)}-from-{steps[0]}"
    checkpoints = [run / "checkpoints" / f"step-{step:08}" for step in steps]
    elm("average", *checkpoints, "--out", directory, "--overwrite")
    model, tokenizer = elm_mlx.load(directory, compute_dtype="float32")
    assert tokenizer is not None
    return [
        {book["title"]: held_out_loss(model, tokenizer, book["text"], windows).nats for book in texts.read(held_out)}
        for windows in (16, None)
    ]


if __name__ == "__main__":
    main()
