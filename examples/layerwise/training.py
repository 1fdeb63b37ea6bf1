"""Trains one model of the study and measures it, which run.py starts a process for: a record of numbers comes out.

Ctrl-C ends it after an update, with exit code 130, or at once where it does not train; started again, it goes on where
it was.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from an import; training has a handler of its own

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
from measure import held_out_loss  # noqa: E402
from study import FAN_IN, Record, Training  # noqa: E402

import elm_mlx  # noqa: E402
from elm_mlx import device, files  # noqa: E402
from elm_mlx.directories import checkpoints_of  # noqa: E402
from elm_mlx.errors import ElmError  # noqa: E402
from elm_mlx.model.config import ModelConfig  # noqa: E402
from elm_mlx.model.network import Model, initialize  # noqa: E402
from elm_mlx.model.roofline import Cost, causal  # noqa: E402
from elm_mlx.train import metrics, sections  # noqa: E402
from elm_mlx.train.pretraining import Pretraining  # noqa: E402
from elm_mlx.train.pretraining_recipe import Recipe  # noqa: E402
from elm_mlx.version import __version__  # noqa: E402

RECIPE = HERE / "recipe.toml"
RECORD = "record.json"
INTERRUPTED = 130


def main() -> None:
    """Takes as JSON the `training`, the recipe's fields that all runs share, the directory, and what to measure on."""
    asked = json.loads(sys.argv[1])
    training = Training(**asked["training"])
    out = Path(asked["out"])
    recipe = sections.read(RECIPE, Recipe, [*training.fields(), *asked["fields"]])
    try:
        finished = trained(training, recipe, out)
        record = measured(training, out, asked["held_out"] if finished else None, asked["windows"])
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except ElmError as error:
        sys.exit(f"{training.name}: {error}")
    files.write_json(out / RECORD, record)


def trained(training: Training, recipe: Recipe, out: Path) -> bool:
    """Trains the model in `out`, or goes on with it. Returns False where its rate was too high for it."""
    draw = by_fan_in if training.initial == FAN_IN else initialize
    with Pretraining(recipe, out, resume=bool(checkpoints_of(out)), draw=draw) as run:
        try:
            result = run.train()
        except ElmError as error:
            if "learning rate" not in str(error):  # the loss was no number, or jumped
                raise
            return False
    if result.interrupted:
        raise KeyboardInterrupt
    return True


def by_fan_in(model: Model, seed: int) -> None:
    """Draws weights as CoreNet does, but for the projections that are added to the residual stream.

    CoreNet gives those the deviation 1/sqrt(2 * layers * model_dim) whatever their inputs, so that a wide layer adds
    more than a narrow one. Here it is 1/sqrt(2 * layers * inputs), and all layers add alike.
    """
    initialize(model, seed)
    width = model.config.model_dim
    for layer in model.layers:
        for projection in (layer.attn.out_proj, layer.ffn.proj_2):
            projection.weight = projection.weight * (width / projection.weight.shape[1]) ** 0.5


def measured(training: Training, out: Path, held_out: str | None, windows: int | None) -> Record:
    """Returns the numbers of a run.

    `validation` are pairs of updates made and nats a token, the last one None where training broke off; `held_out` are
    nats a token and bits a byte by book; `flops` a token's, in a forward pass.
    """
    about, lines = json.loads((out / "run.json").read_text("utf-8")), metrics.lines_of(out, 0, 1 << 53)
    steps, length = about["settings"]["optimizer"]["steps"], about["settings"]["data"]["sequence_length"]
    validation = [[line["step"], round(line["valid_loss"], 5)] for line in lines if "valid_loss" in line]
    if validation[-1][0] != steps:
        validation.append([steps, None])
    config, losses = ModelConfig.load(out / "config.json"), {}
    if held_out is not None:
        model, tokenizer = elm_mlx.load(out, compute_dtype="float32")
        assert tokenizer is not None
        for book in texts.read(Path(held_out)):
            found = held_out_loss(model, tokenizer, book["text"], windows, length)
            losses[book["title"]] = [round(loss, 5) for loss in found]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {
        **asdict(training),
        "parameters": about["parameters"],
        "flops": Cost.of(config).forward(length, causal(length), length) // length,
        "validation": validation,
        "held_out": losses,
        "tokens_per_second": round(statistics.median(speeds)),
        "machine": device.machine(),
        "version": __version__,
    }


if __name__ == "__main__":
    main()
