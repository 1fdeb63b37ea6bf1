"""Make the table and the curves of this folder's page from its checkpoints and its log: `python page.py`.

Models are made of checkpoints by commands of elm-mlx's, which are printed before they run, and measured (../measure.py)
on books that were not trained on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
from command import elm  # noqa: E402
from measure import HeldOut, held_out_loss  # noqa: E402
from pages import fill  # noqa: E402

import elm_mlx  # noqa: E402

RUN, HELD_OUT, LENGTH, LAST = HERE / "run", HERE.parent / "classics" / "held-out.jsonl.gz", 256, 5


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found = measured(Path(scratch))
        picture = ["--png", HERE / "curves.png"] if importlib.util.find_spec("matplotlib") else []
        elm("report", RUN, "--out", Path(scratch) / "report.html", *picture)
    fill(HERE / "README.md", table(found))


def measured(scratch: Path) -> dict[str, dict[str, HeldOut]]:
    """The losses of each checkpoint and of the mean of the last, by title of the book."""
    steps = {path.name.removeprefix("step-").lstrip("0"): path for path in sorted((RUN / "checkpoints").iterdir())}
    models = {f"after {step} updates": [path] for step, path in steps.items()}
    models[f"mean of the last {LAST}"] = list(steps.values())[-LAST:]
    found = {}
    for number, (name, checkpoints) in enumerate(models.items()):
        elm("average", *checkpoints, "--out", scratch / str(number))
        model, tokenizer = elm_mlx.load(scratch / str(number), compute_dtype="float32")
        assert tokenizer is not None
        found[name] = {
            book["title"]: held_out_loss(model, tokenizer, book["text"], windows=32, length=LENGTH)
            for book in texts.read(HELD_OUT)
        }
    return found


def table(found: dict[str, dict[str, HeldOut]]) -> str:
    """A row for each model: nats a token and bits a byte of each book, and what the log says of training then."""
    lines = map(json.loads, (RUN / "metrics.jsonl").read_text("utf-8").splitlines())
    trained = {f"after {line['step']} updates": line["loss"] for line in lines if "loss" in line}
    titles = list(next(iter(found.values())))
    rows = [f"| | loss of that update | {' | '.join(titles)} |", f"| --- | ---: |{' ---: |' * len(titles)}"]
    for name, losses in found.items():
        cells = " | ".join(f"{nats:.4f}, {bits:.4f}" for nats, bits in losses.values())
        loss = f"{trained[name]:.4f}" if name in trained else ""
        rows.append(f"| {name} | {loss} | {cells} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
