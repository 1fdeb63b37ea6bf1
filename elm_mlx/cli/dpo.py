"""`elm-mlx dpo MODEL --data PATH --out DIR`: preference tuning on pairs of answers (DPO, hinge, IPO, ORPO)."""

from __future__ import annotations

from elm_mlx.cli import training
from elm_mlx.train.settings import DpoSettings

_PAPER = {"beta": 0.01, "max_seq_length": 1024}
RECIPES: training.Recipes = {  # OpenELM's instruction tuning, arXiv 2404.14619, by size
    "openelm-270M": {**_PAPER, "loss": "hinge", "learning_rate": 2e-5, "epochs": 5.0},
    "openelm-450M": {**_PAPER, "loss": "hinge", "learning_rate": 3e-5, "epochs": 8.0},
    "openelm-1_1B": {**_PAPER, "loss": "sigmoid", "learning_rate": 5e-5, "epochs": 5.0},
    "openelm-3B": {**_PAPER, "loss": "hinge", "learning_rate": 1e-4, "epochs": 10.0},
}

dpo = training.command(
    DpoSettings, "Train a model to prefer one answer to another: DPO and its like, with an adapter or all weights.",
    RECIPES, "The paper's choices for that size, where none are given here.",
)  # fmt: skip
