"""The memory that a training run is said to take, against what it takes: `python benchmarks/memory.py`.

Each case is a process of its own that makes three updates; its peak is that of its resident set. Ends with exit code 1
where a case is off by more than a fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import elm_mlx  # noqa: F401  before MLX, for its BLAS

sys.path.insert(0, str(Path(__file__).parent))
from speed import ENVIRONMENT, embedded_model, machine, seeded_model

SMALL: list[dict[str, Any]] = [
    {"rows": 4, "length": 512},
    {"rows": 1, "length": 512},
    {"rows": 8, "length": 256, "trained_share": 0.2},
    {"rows": 4, "length": 512, "grad_checkpoint": True},
    {"rows": 8, "length": 256, "full": True},
    {"rows": 8, "length": 256, "full": True, "optimizer": "adafactor"},
]
LARGE: list[dict[str, Any]] = [
    {"rows": 1, "length": 512},
    {"rows": 2, "length": 512},
    {"rows": 2, "length": 512, "grad_checkpoint": True},
    {"rows": 1, "length": 256, "full": True},
]


def measure(
    model: str,
    rows: int,
    length: int,
    full: bool = False,
    optimizer: str = "adamw",
    grad_checkpoint: bool = False,
    trained_share: float = 1.0,
) -> tuple[int, int]:
    """Bytes estimated and bytes at most in use, of three updates."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    from elm_mlx import device
    from elm_mlx.data.batches import Batches
    from elm_mlx.data.encoding import Example
    from elm_mlx.model.families import FamilyConfig
    from elm_mlx.store import adapters
    from elm_mlx.store.adapters import plan
    from elm_mlx.store.loading import open_model
    from elm_mlx.train import memory
    from elm_mlx.train.loop_settings import Schedule, Settings
    from elm_mlx.train.step import Step, global_norm

    network = open_model(model, "float32", widen=True).model
    if full:
        network.unfreeze()
    else:
        adapters.attach(network, plan(network.config))
    trained = sum(value.size for _, value in tree_flatten(network.trainable_parameters()))
    step = Step(network, Settings(Schedule(1e-4, 3), optimizer=optimizer, grad_checkpoint=grad_checkpoint))
    draw = np.random.default_rng(0)
    marks = (False, *(bool(i >= length * (1 - trained_share)) for i in range(length)))
    ids = draw.integers(3, network.config.vocab_size, (4 * rows, length + 1)).tolist()
    apart = isinstance(network.config, FamilyConfig) and not network.config.family.positions
    batches = Batches([Example(tuple(row), marks) for row in ids], rows, length, packed=not apart)
    for _ in range(3):
        loss, gradients, count = step.gradients(next(batches))
        norm = global_norm(gradients) / count
        mx.eval(loss, norm, gradients)
        step.apply(gradients, norm, count, 1e-4)
        del gradients
        mx.eval(step.state())
    parts = device.most_parts(4 * trained)
    load = memory.Load(network.config, 4, 4, trained, full, rows, length, optimizer, grad_checkpoint, parts=parts)
    return memory.estimate(load).total, device.peak_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the embedded model alone")
    parser.add_argument("--model", type=Path, help="this model directory alone, of any family")
    given = parser.parse_args()
    from elm_mlx.model.config import ModelConfig

    print(
        machine(),
        "\n\n| model | case | estimated | measured | off by |\n| --- | --- | ---: | ---: | ---: |",
        flush=True,
    )
    wrong = False
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        if given.model:
            models = [(given.model.resolve().name, given.model, LARGE)]
        else:
            models = [("embedded 3.6M", embedded_model(Path(small)), SMALL)]
            if not given.small:
                models.append(("270M", seeded_model(ModelConfig.preset("OpenELM-270M"), Path(large)), LARGE))
        for name, path, cases in models:
            for case in cases:
                command = [sys.executable, __file__, json.dumps(case | {"model": str(path)})]
                done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
                said, taken = json.loads(done.stdout)
                off = said / taken - 1
                wrong |= abs(off) > 0.2
                what = ", ".join(f"{key} {value}" for key, value in case.items())
                print(f"| {name} | {what} | {said / 1e6:,.0f} MB | {taken / 1e6:,.0f} MB | {off:+.0%} |", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(**json.loads(sys.argv[1]))))
        os._exit(0)
    main()
