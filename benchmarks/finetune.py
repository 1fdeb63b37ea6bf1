"""LoRA fine-tuning against `mlx_lm.lora`'s trainer, as ratios from one run: `make bench`.

The same base, rank, targets, initial adapter, optimizer and data on both sides: examples of mixed length, of which the
answer alone is learnt. What counts is useful tokens a second: those of the examples, no padding; about as many go into
each update on both sides. Each side is a process of its own, whose peak resident memory is compared, and one run of
each side follows the other, as in `speed.py`. Before that, both are given the same batches: their losses must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from speed import ENVIRONMENT, HEADER, embedded_model, machine, row, seeded_model

LENGTH, ROWS = 512, 4  # of our packed batches
Figures = dict[str, Any]


def write_examples(path: Path, vocab_size: int, count: int = 400) -> float:
    """Prompts mostly longer than their answers, both with a long tail, as instructions are. Returns the mean length.

    What they say is a chain of tokens of which each has eight likely successors: there is something to learn.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    successors = draw.integers(3, vocab_size, (vocab_size, 8))
    total = 0
    with path.open("w") as file:
        for _ in range(count):
            prompt = int(np.clip(draw.lognormal(np.log(90), 0.8), 8, 380))
            answer = int(np.clip(draw.lognormal(np.log(40), 0.9), 4, LENGTH - 384))
            ids = [int(draw.integers(3, vocab_size))]
            for choice in draw.integers(0, 8, prompt + answer - 1):
                ids.append(int(successors[ids[-1], choice]))
            file.write(json.dumps({"ids": ids, "offset": prompt}) + "\n")
            total += len(ids)
    return total / count


def side(peer: str, job: dict[str, Any]) -> Figures:
    """Runs one side in a process of its own. Returns its figures."""
    command = [sys.executable, Path(__file__).with_name("trainer.py"), peer, json.dumps(job)]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Base:
    """A model, data for it, and the comparisons on it."""

    def __init__(self, title: str, model: Path, vocab_size: int, directory: Path):
        data = directory / "train.jsonl"
        mean = write_examples(data, vocab_size)
        self._title = title
        # As many of their rows as have the tokens of ours, which are full but for a few.
        self._their_rows = round(ROWS * LENGTH / mean)
        self._job = {
            "model": str(model), "data": str(data), "adapter": str(directory / "adapter.safetensors"), "same": False,
            "length": LENGTH, "packed": False, "rows": self._their_rows,
        }  # fmt: skip

    def losses(self, steps: int = 5) -> str:
        """Compares the losses of both sides on the same unpacked batches."""
        job = self._job | {"warmup": 1, "steps": steps - 1, "same": True}
        mine, theirs = (side(peer, job)["losses"] for peer in ("ours", "equal"))
        apart = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
        return (
            f"{self._title}: losses of the same {steps} batches differ by {apart:.1g} at most "
            f"({mine[0]:.4f} to {mine[-1]:.4f}; mlx-lm {theirs[0]:.4f} to {theirs[-1]:.4f})"
        )

    def compare(self, peer: str, pairs: int, warmup: int, steps: int) -> list[str]:
        """Rows of the table: useful tokens/s and peak memory, ours packed and not against `peer`."""
        results: list[dict[str, Figures]] = []
        for _ in range(pairs):
            count = {"warmup": 4, "steps": 8}
            packed = side("ours", self._job | count | {"packed": True, "rows": ROWS})
            theirs = side(peer, self._job | {"warmup": warmup, "steps": steps})
            results.append({"packed": packed, "theirs": theirs, "unpacked": side("ours", self._job | count)})
        title = f"{self._title}, mlx-lm {NAMES[peer]}"
        rows = []
        for kind in ("packed", "unpacked"):
            for what, figure in FIGURES.items():
                mine, other = ([figure(pair[name]) for pair in results] for name in (kind, "theirs"))
                ratios = [a / b for a, b in zip(mine, other, strict=True)]
                rows.append(row(f"{title}: {what}, {kind}", mine, other, ratios))
        share = statistics.median(pair["theirs"]["trained"] / pair["theirs"]["tokens"] for pair in results)
        print(f"<!-- {share:.0%} of tokens trained; {self._their_rows} rows a batch unpacked -->", file=sys.stderr)
        return rows


NAMES = {
    "stock": "as installed",
    "equal": "with the same BLAS and float32",
    "sorted": "with the same BLAS and float32, batches by length",
}
FIGURES = {
    "useful tokens/s": lambda run: run["tokens"] / run["seconds"],
    "peak memory, MB": lambda run: run["memory"] / 1e6,
    "of which training, MB": lambda run: (run["memory"] - run["before"]) / 1e6,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2, help="pairs of runs for each comparison")
    pairs = parser.parse_args().pairs
    from elm_mlx.model.config import ModelConfig

    wide = ModelConfig.scaled(vocab_size=32_000, num_layers=12, model_dim=384, head_dim=64, max_context_length=LENGTH)
    print(machine(), "\n", flush=True)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        models = [Path(directory) / "model" for directory in (first, second)]
        models[1].mkdir()
        bases = [
            Base("embedded 3.6M, 4,096 tokens", embedded_model(models[0]), 4096, Path(first)),
            Base(
                f"seeded {wide.parameters / 1e6:.0f}M, 32,000 tokens",
                seeded_model(wide, models[1]),
                32_000,
                Path(second),
            ),
        ]
        for base in bases:
            print(base.losses(), flush=True)
        print(f"\n{HEADER}")
        for base in bases:
            for peer in ("equal", "sorted"):
                print("\n".join(base.compare(peer, pairs, warmup=2, steps=5)), flush=True)
        # With its own BLAS the other base is too slow to wait for.
        print("\n".join(bases[0].compare("stock", 1, warmup=1, steps=1)), flush=True)


if __name__ == "__main__":
    main()
