"""Train the model of this folder again, and compare the log with the one that is published: `run.py [--steps N]`.

Every step but cutting books (../books.py) and comparing is a command of elm-mlx's, which is printed before it runs. Run
again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
from command import elm  # noqa: E402

PUBLISHED = HERE / "run"
WARMUP = 25  # updates, as in recipe.toml
WINDOW = 600 * 2_048  # tokens that are shuffled with one another: all, which a shorter run would have fewer of


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the published model again, and compare the logs.")
    parser.add_argument("--out", type=Path, default=Path("build/published"), help="where everything is written")
    parser.add_argument("--steps", type=int, help=f"updates, for a shorter run; {WARMUP} or more")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < WARMUP:
        parser.error(f"--steps: the first {WARMUP} updates are the same in runs of any length, and fewer are not")
    data, run = arguments.out / "data", arguments.out / "run"
    texts.write_documents(HERE.parent / "classics" / "extract.jsonl.gz", data)
    fields = {
        "tokenizer": HERE / "tokenizer.model",
        "data.validation": data / "watched.jsonl",
        "data.sources": f'[{{path = "{data / "train.jsonl"}"}}]',
    }
    if arguments.steps is not None:
        fields |= {"optimizer.steps": arguments.steps, "data.window": WINDOW}
    sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    resume = ["--resume"] if (run / "checkpoints").exists() else []
    elm("pretrain", HERE / "recipe.toml", "--out", run, *sets, *resume)
    published, again = losses(PUBLISHED), losses(run)
    apart = {step: abs(loss - published[step]) for step, loss in again.items() if step in published}
    worst = max(apart, key=apart.__getitem__)
    print(f"\n{len(apart)} updates compared: losses differ by {apart[worst]:.2g} nats at most, in update {worst}")


def losses(run: Path) -> dict[int, float]:
    """The training loss in nats a token, by update."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


if __name__ == "__main__":
    main()
