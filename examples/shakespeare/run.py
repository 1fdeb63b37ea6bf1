"""Fine-tune the model of examples/classics on plays, and measure what that gave: `python examples/shakespeare/run.py`.

Every step but the measuring is a command of elm-mlx's, which is printed before it runs. Loss is measured here, in
the plainest way there is, and not by the code that trains. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import elm_mlx  # before MLX, for its BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn

from elm_mlx.model import Model
from elm_mlx.tokenizer import Tokenizer

HERE = Path(os.path.relpath(Path(__file__).parent))
CLASSICS = HERE.parent / "classics"
PROMPT = "Enter the King and the two murderers."


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the small model on plays, and measure what that gave.")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="a directory with train.jsonl and valid.jsonl")
    parser.add_argument("--out", type=Path, default=Path("build/shakespeare"), help="where everything is written")
    parser.add_argument("--iters", type=int, help="updates, for a shorter run")
    arguments = parser.parse_args()
    base, run, fused = (arguments.out / name for name in ("base", "run", "fused"))

    convert = [CLASSICS / "checkpoint_average.pt", base, "--tokenizer", CLASSICS / "tokenizer.model", "--overwrite"]
    elm("convert", *convert)
    data = set_aside(arguments.data / "train.jsonl", arguments.out / "data")
    shorter = [] if arguments.iters is None else ["--iters", arguments.iters]
    resume = ["--resume"] if (run / "checkpoints").exists() else []
    elm("lora", base, "--data", data, "--out", run, "--config", HERE / "lora.yaml", *shorter, *resume)
    elm("fuse", base, run, fused, "--overwrite")
    picture = ["--png", arguments.out / "curves.png"] if importlib.util.find_spec("matplotlib") else []
    elm("report", run, *picture)
    for adapter in ([], ["--adapter", run]):
        elm("generate", base, *adapter, "--prompt", PROMPT, "--max-tokens", 120, "--temp", 0.7, "--seed", 3)

    print(f"\n| held out: {arguments.data / 'valid.jsonl'} | loss, nats a token | perplexity |\n| --- | ---: | ---: |")
    for name, model, adapter_path in (("before", base, None), ("with the adapter", base, run), ("fused", fused, None)):
        loaded = elm_mlx.load(model, compute_dtype="float32", adapter_path=adapter_path)
        loss = held_out_loss(*loaded, arguments.data / "valid.jsonl")
        print(f"| {name} | {loss:.4f} | {math.exp(loss):.1f} |", flush=True)


def elm(*arguments: object) -> None:
    """Run a command of elm-mlx's; end as it does where it fails."""
    words = [str(argument) for argument in arguments]
    print("\n$ elm-mlx", shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "elm_mlx", *words]).returncode
    if code:
        sys.exit(code)


def set_aside(plays: Path, directory: Path) -> Path:
    """Every twentieth passage of `plays` to choose the best checkpoint by, so that the held-out play has no say."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = plays.read_text("utf-8").splitlines(keepends=True)
    (directory / "valid.jsonl").write_text("".join(lines[19::20]), "utf-8")
    (directory / "train.jsonl").write_text("".join(line for i, line in enumerate(lines, 1) if i % 20), "utf-8")
    return directory


def held_out_loss(model: Model, tokenizer: Tokenizer | None, play: Path) -> float:
    """Nats a token: the play as one text, cut into pieces as long as the context, every token predicted once."""
    assert tokenizer is not None
    text = "\n".join(json.loads(line)["text"] for line in play.read_text("utf-8").splitlines())
    ids, length, total = tokenizer.encode(text), model.config.max_context_length, 0.0
    for start in range(0, len(ids) - 1, length):
        piece = mx.array(ids[start : start + length + 1])[None]
        total += nn.losses.cross_entropy(model(piece[:, :-1]), piece[:, 1:], reduction="sum").item()
    return total / (len(ids) - 1)


if __name__ == "__main__":
    main()
