"""Fine-tune the model of examples/classics on plays, and measure what that gave: `python examples/shakespeare/run.py`.

Every step but the measuring (../measure.py) is a command of elm-mlx's, which is printed before it runs. Run again, it
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

from command import elm  # noqa: E402
from measure import held_out_loss  # noqa: E402

import elm_mlx  # noqa: E402

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
    elm("report", run, *picture, "--overwrite")
    for adapter in ([], ["--adapter", run]):
        elm("generate", base, *adapter, "--prompt", PROMPT, "--max-tokens", 120, "--temp", 0.7, "--seed", 3)

    passages = (arguments.data / "valid.jsonl").read_text("utf-8").splitlines()
    play = "\n".join(json.loads(passage)["text"] for passage in passages)
    print(f"\n| held out: {arguments.data / 'valid.jsonl'} | loss, nats a token | perplexity |\n| --- | ---: | ---: |")
    losses = {}
    for name, model, adapter_path in (("before", base, None), ("with the adapter", base, run), ("fused", fused, None)):
        loaded, tokenizer = elm_mlx.load(model, compute_dtype="float32", adapter_path=adapter_path)
        assert tokenizer is not None
        loss = held_out_loss(loaded, tokenizer, play, windows=None, length=loaded.config.max_context_length).nats
        losses[name] = round(loss, 6)
        print(f"| {name} | {loss:.4f} | {math.exp(loss):.1f} |", flush=True)
    (arguments.out / "losses.json").write_text(json.dumps(losses, indent=1) + "\n", "utf-8")


def set_aside(plays: Path, directory: Path) -> Path:
    """Every twentieth passage of `plays` to choose the best checkpoint by, so that the held-out play has no say."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = plays.read_text("utf-8").splitlines(keepends=True)
    (directory / "valid.jsonl").write_text("".join(lines[19::20]), "utf-8")
    (directory / "train.jsonl").write_text("".join(line for i, line in enumerate(lines, 1) if i % 20), "utf-8")
    return directory


if __name__ == "__main__":
    main()
