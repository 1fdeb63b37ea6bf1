"""Pretraining against a plain PyTorch loop of the same model, as ratios from one run.

    python benchmarks/pytorch.py PYTHON

PYTHON is one that has PyTorch, in an environment of its own: this project doesn't need it. The embedded model's shape
and weights, all of them trained, every position counted, the same token ids, AdamW with clipping on both sides, and
8 x 256 tokens an update. Each side is a process of its own, one run right after the other, as in `speed.py`; PyTorch
runs twice, in float32 and under bfloat16's autocast. The losses of both must agree.
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

from speed import ENVIRONMENT, embedded_model, machine, row

ROWS, LENGTH, BATCHES = 8, 256, 8
RATE, DECAY, BETAS = 1e-3, 0.1, (0.9, 0.95)
WARMUP = 3


def ours(model_path: Path, ids_path: Path, steps: int) -> dict[str, Any]:
    """Losses and seconds of each update by this project's step."""
    import time

    from elm_mlx import load_model  # isort: skip  (its BLAS must come before MLX)
    import mlx.core as mx
    import numpy as np

    from elm_mlx.data.batches import Batch
    from elm_mlx.train.loop_settings import Schedule, Settings
    from elm_mlx.train.step import Step, global_norm

    model = load_model(model_path)
    model.unfreeze()
    step = Step(model, Settings(Schedule(RATE, steps), weight_decay=DECAY, betas=BETAS, clip=1.0))
    losses, seconds = [], []
    trained = np.ones((ROWS, LENGTH), np.bool_)
    for number in range(steps):
        ids = np.load(ids_path)["ids"][number % BATCHES]
        start = time.perf_counter()
        loss, gradients, count = step.gradients(Batch(ids[:, :-1], ids[:, 1:], trained, None, ROWS * LENGTH))
        norm = global_norm(gradients) / count
        mx.eval(loss, norm)
        step.apply(gradients, norm, count, RATE)
        del gradients
        mx.eval(step.state())
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item() / count)
    return {"losses": losses, "seconds": seconds}


def write_job(model_path: Path, path: Path) -> None:
    """Initial weights, and token ids of which each has eight likely successors."""
    import mlx.core as mx
    import numpy as np

    weights = {
        name: np.array(array.astype(mx.float32)) for name, array in mx.load(f"{model_path}/model.safetensors").items()
    }
    draw = np.random.default_rng(0)
    successors = draw.integers(3, 4096, (4096, 8))
    ids = np.zeros((BATCHES, ROWS, LENGTH + 1), np.int32)
    ids[..., 0] = draw.integers(3, 4096, (BATCHES, ROWS))
    for at in range(LENGTH):
        ids[..., at + 1] = successors[ids[..., at], draw.integers(0, 8, (BATCHES, ROWS))]
    np.savez(path, ids=ids, **weights)


def write_shape(model_path: Path, path: Path) -> None:
    """Writes a model's config, with the widths of its feed-forward layers, for torch_loop.py."""
    from elm_mlx.model.config import ModelConfig

    config = ModelConfig.load(model_path / "config.json")
    path.write_text(json.dumps(config.to_dict() | {"ffn_dims": config.ffn_dims}))


def run(command: list[str | Path]) -> dict[str, Any]:
    """Runs one side. Returns its figures, with `speed` in tokens/s, updates of the warm-up left out."""
    done = subprocess.run(list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures | {"speed": ROWS * LENGTH / statistics.median(figures["seconds"][WARMUP:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="a Python that has PyTorch")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs for each comparison")
    parser.add_argument("--steps", type=int, default=12, help=f"updates of each run, {WARMUP} of them not timed")
    arguments = parser.parse_args()
    steps, python = str(arguments.steps), arguments.python
    version = [python, "-c", "import torch; print(torch.__version__, torch.get_num_threads(), 'threads')"]
    torch_version = subprocess.run(version, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout.strip()
    print(f"{machine()}; PyTorch {torch_version}\n", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        model, job, shape = embedded_model(Path(directory, "model")), Path(directory, "job.npz"), Path(directory, "c")
        write_job(model, job)
        write_shape(model, shape)
        here = Path(__file__)
        sides: dict[str, list[str | Path]] = {
            "ours": [sys.executable, here, "--ours", model, job, steps],
            **{
                dtype: [python, here.with_name("torch_loop.py"), shape, job, steps, dtype]
                for dtype in ("float32", "bfloat16")
            },
        }
        results = [{name: run(command) for name, command in sides.items()} for _ in range(arguments.pairs)]
    mine, theirs = (results[0][name]["losses"] for name in ("ours", "float32"))
    apart = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    print(f"Losses from {mine[0]:.4f} to {mine[-1]:.4f}, at most {apart:.1g} from PyTorch's.\n")
    print("| what | elm-mlx | PyTorch | ratio, median of pairs | spread |\n| --- | ---: | ---: | ---: | ---: |")
    for dtype in ("float32", "bfloat16"):
        speeds = [[result[name]["speed"] for result in results] for name in ("ours", dtype)]
        ratios = [a / b for a, b in zip(*speeds, strict=True)]
        note = "" if dtype == "float32" else " autocast"
        print(row(f"tokens/s in training, PyTorch in {dtype}{note}", *speeds, ratios))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        print(json.dumps(ours(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
