"""Make the tables and the curves of this folder's page from its runs' checkpoints and logs: `python page.py`.

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

HELD_OUT, TOKENS = HERE.parent / "classics" / "held-out.jsonl.gz", 8_192
LENGTHS = {"run": 256, "demo": 512}  # of a run's rows, and of the windows that it is measured by
LAST = {"run": 5}  # checkpoints, of a run that has those whose mean is the model


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tables = [page_of(run, Path(scratch, run)) for run in LENGTHS]
    fill(HERE / "README.md", *tables)


def page_of(run: str, scratch: Path) -> str:
    """Draws a run's curves, where there is matplotlib; returns its table."""
    scratch.mkdir()
    picture = ["--png", HERE / run / "curves.png"] if importlib.util.find_spec("matplotlib") else []
    elm("report", HERE / run, "--out", scratch / "report.html", *picture, "--overwrite")
    return table(run, measured(run, scratch))


def measured(run: str, scratch: Path) -> dict[str, dict[str, HeldOut]]:
    """The losses of each checkpoint and of the mean of the last, by title of the book."""
    checkpoints = sorted((HERE / run / "checkpoints").iterdir())
    models = {f"after {int(path.name.removeprefix('step-')):,} updates": [path] for path in checkpoints}
    if last := LAST.get(run):
        models[f"mean of the last {last}"] = checkpoints[-last:]
    found = {}
    for number, (name, checkpoints) in enumerate(models.items()):
        elm("average", *checkpoints, "--out", scratch / str(number))
        model, tokenizer = elm_mlx.load(scratch / str(number), compute_dtype="float32")
        assert tokenizer is not None
        found[name] = {
            book["title"]: held_out_loss(model, tokenizer, book["text"], TOKENS // LENGTHS[run], LENGTHS[run])
            for book in texts.read(HELD_OUT)
        }
    return found


def table(run: str, found: dict[str, dict[str, HeldOut]]) -> str:
    """A row for each model: nats a token and bits a byte of each book, and what the log says of training then."""
    lines = map(json.loads, (HERE / run / "metrics.jsonl").read_text("utf-8").splitlines())
    trained = {f"after {line['step']:,} updates": line["loss"] for line in lines if "loss" in line}
    titles = list(next(iter(found.values())))
    rows = [f"| | loss of that update | {' | '.join(titles)} |", f"| --- | ---: |{' ---: |' * len(titles)}"]
    for name, losses in found.items():
        cells = " | ".join(f"{nats:.4f}, {bits:.4f}" for nats, bits in losses.values())
        loss = f"{trained[name]:.4f}" if name in trained else ""
        rows.append(f"| {name} | {loss} | {cells} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
