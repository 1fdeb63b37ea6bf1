"""Pretraining from a recipe: raw text in, a run's directory with checkpoints and a model in it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from elm_mlx import files
from elm_mlx.callbacks import SILENT, TrainingCallback
from elm_mlx.model.network import Model, initialize
from elm_mlx.safetensors_file import write_arrays
from elm_mlx.text.tokenizer import FILE_NAME, Tokenizer
from elm_mlx.train.pretraining_recipe import Recipe
from elm_mlx.train.run import Result
from elm_mlx.train.text_training import TextTraining, ends
from elm_mlx.train.throughput import Meter


class Pretraining(TextTraining[Recipe]):
    """A `TextTraining` of a model whose weights are drawn.

    Args:
        draw: sets a model's initial weights by a seed.
    """

    command = "pretrain"

    def __init__(
        self, recipe: Recipe, out: Path, *, resume: bool = False, on_wrong: Callable[[str], None] = lambda line: None,
        draw: Callable[[Model, int], None] = initialize,
    ) -> None:  # fmt: skip
        self._draw = draw
        super().__init__(recipe, out, resume=resume, on_wrong=on_wrong)

    def train(self, callback: TrainingCallback = SILENT) -> Result:
        """Trains, and leaves the last weights in `out`, which is a model directory then.

        Raises:
            InputError, ElmError, KeyboardInterrupt: as `Run.train`, and as the batches do.
        """
        callback.progress("drawing the weights")
        model = Model(self.config)
        self._draw(model, self._recipe.run.seed)
        result = self._run(model, callback, meter=Meter(self.config, None, self.settings.grad_checkpoint))
        if self.leads:
            with files.new_file(self.out / "model.safetensors") as file:
                write_arrays(file, dict(tree_flatten(model.parameters())))
        return result

    def _prepare(self) -> tuple[Tokenizer, int]:
        tokenizer = Tokenizer.load(Path(self._recipe.tokenizer))
        self.config = self._recipe.model.config(tokenizer.vocab_size, *ends(tokenizer))
        return tokenizer, self._recipe.model.context

    def _describe(self) -> None:
        """Makes a model directory of `out`, but for the weights."""
        files.write_json(self.out / "config.json", self.config.to_dict())
        with files.new_file(self.out / FILE_NAME) as file:
            file.write(self._tokenizer.path.read_bytes())

    def _model_identity(self) -> tuple[str, dict[str, Any]]:
        config = {f"model's {name}": value for name, value in asdict(self._recipe.model).items()}
        return hashlib.sha256(json.dumps(self.config.to_dict()).encode()).hexdigest(), config
