"""Process start to first token, `elm-mlx generate` against `mlx_lm.generate`; and what all benchmarks here share.

`elm-mlx bench` measures models that are loaded; this is what a user waits for. Every comparison is made in pairs, one
side right after the other, and the median of the pairs' ratios is what counts: a machine that others use too is now
faster, now slower, but rarely between the two of a pair.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import elm_mlx  # noqa: F401  (before MLX, for its BLAS)
from elm_mlx.bench import machine as machines
from elm_mlx.bench import measured_models, sides
from elm_mlx.model.config import ModelConfig

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENT = sides.environment("ours")
HEADER = "| what | elm-mlx | mlx-lm | ratio, median of pairs | spread |\n| --- | ---: | ---: | ---: | ---: |"


def seeded_model(config: ModelConfig, directory: Path) -> Path:
    """A model directory with random bfloat16 weights, the same ones each time."""
    return measured_models.write_seeded(config, directory)


def embedded_model(directory: Path) -> Path:
    """The checkpoint that the project carries, converted."""
    source = ROOT / "examples/classics"
    command = [BIN / "elm-mlx", "convert", source / "checkpoint_average.pt", directory, "--overwrite"]
    subprocess.run([*command, "--tokenizer", source / "tokenizer.model"], check=True, capture_output=True)
    return directory


def first_token(model: Path, pairs: int) -> str:
    """Seconds from the start of the process until it has printed one token and ended."""
    prompt = ["--prompt", "Once upon a time", "--max-tokens", "1"]
    ours = [BIN / "elm-mlx", "generate", model, *prompt]
    theirs = [BIN / "mlx_lm.generate", "--model", model, *prompt, "--ignore-chat-template"]

    def seconds(command: list[str | Path]) -> float:
        start = time.perf_counter()
        subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True)
        return time.perf_counter() - start

    seconds(ours), seconds(theirs)  # warm the disk's cache
    results = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    mine, other = ([pair[side] for pair in results] for side in (0, 1))
    return row("process start to first token, s", mine, other, [b / a for a, b in results])


def row(title: str, mine: list[float], theirs: list[float], ratios: list[float]) -> str:
    """Returns a row of the table under HEADER: both medians, that of the ratios, and their range."""
    middle = statistics.median
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"| {title} | {middle(mine):.4g} | {middle(theirs):.4g} | {middle(ratios):.2f} | {spread} |"


def machine() -> str:
    """The machine in a line."""
    return ", ".join(f"{label} {text}" for label, text in machines.describe().items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10, help="pairs of runs")
    pairs = parser.parse_args().pairs
    print(f"{machine()}\n\n{HEADER}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        print(first_token(embedded_model(Path(directory) / "model"), pairs), flush=True)


if __name__ == "__main__":
    main()
