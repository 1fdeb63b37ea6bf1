"""Small runs to train: a model, examples, batches. Also a program of its own, to be killed."""

from __future__ import annotations

import elm_mlx  # noqa: F401  before whatever imports MLX, for the sake of its BLAS

# isort: split
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import tiny

from elm_mlx.callbacks import Report, TrainingCallback
from elm_mlx.data.batches import Batches
from elm_mlx.data.encoding import Example
from elm_mlx.model.network import Model
from elm_mlx.train import checkpoint
from elm_mlx.train.checkpoint import Identity
from elm_mlx.train.loop_settings import Schedule, Settings
from elm_mlx.train.run import BatchSource, Result, Run, Validation

VOCAB, LENGTH = 96, 64
IDENTITY = Identity(model="a model", data="some data", config={"rank": 8})


def model(seed: int = 0) -> Model:
    made = tiny.random_model(tiny.scaled_config(VOCAB), seed)
    made.update({"transformer": {"token_embeddings": {"weight": made.transformer.token_embeddings.weight * 0.3}}})
    return made


def examples(count: int = 24, seed: int = 0) -> list[Example]:
    """Sequences that count upwards by ones, the first third a prompt: there is something to learn."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length, start = int(draw.integers(6, 40)), int(draw.integers(0, VOCAB))
        ids = tuple((start + i) % VOCAB for i in range(length))
        made.append(Example(ids, tuple(i > length // 3 for i in range(length))))
    return made


def batches(packed: bool = True, size: int = 2, data: list[Example] | None = None) -> Batches:
    return Batches(examples() if data is None else data, size, LENGTH, packed=packed)


def validation() -> Validation:
    return Validation(Batches(examples(8, seed=1), 4, LENGTH))


def settings(steps: int = 12, **options: Any) -> Settings:
    rate = options.pop("rate", 3e-3)
    return Settings(**{"schedule": Schedule(rate, steps, 2), "eval_every": 4, "save_every": 3} | options)


def train(
    trained: Model,
    source: BatchSource,
    validating: Validation | None,
    options: Settings,
    out: Path,
    identity: Identity,
    resume: bool = False,
    **more: Any,
) -> Result:
    out.mkdir(parents=True, exist_ok=True)
    resumed = checkpoint.to_resume(out, resume)
    return Run(trained, source, validating, options, out, identity, resumed, **more).train()


class Reports(TrainingCallback):
    """Calls a function with each report."""

    def __init__(self, function: Callable[[Report], None]):
        self.report = function  # type: ignore[method-assign]


def run(
    out: Path,
    options: Settings | None = None,
    trained: Model | None = None,
    on_report: Callable[[Report], None] = lambda report: None,
    **more: Any,
) -> Result:
    trained = trained or model()
    more = {"callback": Reports(on_report)} | more
    return train(trained, batches(), validation(), options or settings(), out, IDENTITY, **more)


class Dropping(nn.Module):
    """A linear behind dropout: something that uses up random numbers."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.2)

    def __call__(self, x: Any) -> Any:
        return self.inner(self.dropout(x))


def model_with_dropout() -> Model:
    made = model()
    for layer in made.layers:
        layer.ffn.proj_1 = Dropping(layer.ffn.proj_1)
    return made


def losses(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and norm of every update in the metrics, and of validations the loss twice."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("valid_loss")), line.get("grad_norm", 0.0)) for line in lines]


def main(out: Path, steps: int, resume: bool) -> None:
    def on_report(report: Report) -> None:
        time.sleep(0.01)
        print(report.step, flush=True)

    options = settings(steps, save_every=2, accumulate=2)
    run(out, options, model_with_dropout(), resume=resume, on_report=on_report)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume")
