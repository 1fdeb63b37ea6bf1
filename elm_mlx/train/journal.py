"""A run as it is told: a report of each update and validation, and its line in `metrics.jsonl`.

Knows what is told, and how it is written; `metrics` reads it. Knows nothing of how any of it came about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elm_mlx import device, files
from elm_mlx.train.metrics import ABOUT, METRICS
from elm_mlx.version import __version__


@dataclass(frozen=True)
class Report:
    """One line of `metrics.jsonl`: an update, or a validation after it.

    Attributes:
        step: updates made, this one included.
        loss: mean over its trained tokens, in nats, or over its pairs; None in a line of a validation.
        valid_loss: the validation's; None in a line of an update.
        grad_norm: before clipping.
        tokens_per_second: of this update, trained or not, padding excepted.
        matmul_share: what must be computed for them, as a share of this machine's own matmul speed: see `meter`.
        memory: bytes at most in use so far.
        skipped: whether the update was left out.
        best: True where the validation's loss is the least so far; of step 0, the model's before training.
        measures: means of what the objective measures, an update's or a validation's, by name. In the file each of
            them is a value of its own, a validation's as `valid_NAME`.
    """

    step: int
    loss: float | None = None
    valid_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    matmul_share: float | None = None
    memory: int | None = None
    skipped: bool | None = None
    best: bool | None = None
    measures: Mapping[str, float] = field(default_factory=dict)


def describe(out: Path, about: Mapping[str, Any]) -> None:
    """What a run was asked for, and on what machine, beside its metrics. Raises ElmError."""
    values = {**about, "machine": device.machine(), "version": __version__}
    files.write_text(out / ABOUT, json.dumps(values, indent=1) + "\n")


def append(out: Path, report: Report) -> None:
    """A line at the end of the run's metrics; what says nothing is left out."""
    values = {name: value for name, value in asdict(report).items() if value is not None}
    prefix = "" if report.valid_loss is None else "valid_"
    values |= {prefix + name: value for name, value in values.pop("measures").items()}
    with (out / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
