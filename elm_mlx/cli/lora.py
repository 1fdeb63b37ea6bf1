"""`elm-mlx lora MODEL --data PATH --out DIR`: fine-tuning."""

from __future__ import annotations

from elm_mlx.cli import training
from elm_mlx.train.settings import LoraSettings

RECIPES: training.Recipes = {
    "openelm": {  # CoreNet's projects/openelm/peft_configs, but for the steps, which the data decide
        "rank": "32", "alpha": 32.0, "dropout": 0.1,
        "target": ["qkv_proj", "out_proj", "proj_1", "proj_2", "token_embeddings"],
        "learning_rate": 3e-4, "lr_schedule": "cosine", "clip": 1.0, "weight_decay": 0.0, "epochs": 3.0,
        "batch_size": 8, "grad_accumulation_steps": 2, "warmup": 1000 / 4375,
    },
}  # fmt: skip

lora = training.command(
    LoraSettings, "Fine-tune a model with LoRA or DoRA, or all of it: an adapter that generate, chat and fuse take.",
    RECIPES, "Apple's choices, where none are given here.",
)  # fmt: skip
