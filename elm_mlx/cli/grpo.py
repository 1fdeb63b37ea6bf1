"""`elm-mlx grpo MODEL --task T --out DIR`: reinforcement learning on answers that a program checks (GRPO)."""

from __future__ import annotations

from elm_mlx.cli import training
from elm_mlx.train.settings import GrpoSettings

grpo = training.command(
    GrpoSettings,
    "Train a model on its own answers to problems that a program checks: GRPO, with an adapter or all weights.",
)
