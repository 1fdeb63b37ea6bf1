"""`elm-mlx dpo MODEL --data PATH --out DIR`: training on pairs of answers, of which one is preferred."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import typer

from elm_mlx.cli import configured, options, training
from elm_mlx.cli.configured import Configured
from elm_mlx.cli.progress import Progress
from elm_mlx.cli.show import bad_records_named

_PAPER = {"beta": 0.01, "max_seq_length": 1024}


class Command(Configured):
    """OpenELM's instruction tuning, arXiv 2404.14619, by size."""

    decides: ClassVar[Mapping[str, str]] = {"epochs": "iters"}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "openelm-270M": {**_PAPER, "loss": "hinge", "learning_rate": 2e-5, "epochs": 5.0},
        "openelm-450M": {**_PAPER, "loss": "hinge", "learning_rate": 3e-5, "epochs": 8.0},
        "openelm-1_1B": {**_PAPER, "loss": "sigmoid", "learning_rate": 5e-5, "epochs": 5.0},
        "openelm-3B": {**_PAPER, "loss": "hinge", "learning_rate": 1e-4, "epochs": 10.0},
    }


def dpo(
    ctx: typer.Context,
    model: options.OptionalModelPath = None,
    data: training.Data = None,
    out: training.Out = None,
    config: training.Config = None,
    resume: training.Resume = False,
    recipe: Annotated[
        str | None,
        typer.Option(help="openelm-270M, -450M, -1_1B or -3B: the paper's, where none are given here."),
    ] = None,
    loss: Annotated[str, typer.Option(help="sigmoid (DPO), hinge, ipo, or orpo, which has no reference.")] = "sigmoid",
    beta: Annotated[float, typer.Option(help="Of the loss: how little the model may part from what it was.")] = 0.1,
    rank: training.Rank = "8",
    alpha: training.Alpha = None,
    target: training.Target = None,
    num_layers: training.NumLayers = -1,
    dora: training.Dora = False,
    rslora: training.Rslora = False,
    full: training.Full = False,
    iters: training.Iters = None,
    epochs: training.Epochs = 3.0,
    batch_size: training.BatchSize = 4,
    grad_accumulation_steps: training.GradAccumulationSteps = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", "--lr", help="The highest. (default: 5e-5; with --full 5e-6)", show_default=False
        ),
    ] = None,
    lr_schedule: training.LrSchedule = "cosine",
    warmup: training.Warmup = None,
    optimizer: training.Optimizer = "adamw",
    weight_decay: training.WeightDecay = 0.0,
    clip: training.Clip = 1.0,
    grad_checkpoint: training.GradCheckpoint = False,
    compute_dtype: options.ComputeDtype = None,
    template: training.Template = None,
    max_seq_length: training.MaxSeqLength = None,
    truncate: training.Truncate = False,
    skip_bad: training.SkipBad = False,
    pack: training.Pack = True,
    val_batches: training.ValBatches = -1,
    steps_per_eval: training.StepsPerEval = 200,
    save_every: training.SaveEvery = 100,
    keep: training.Keep = 2,
    on_nan: training.OnNan = "stop",
    seed: training.Seed = 0,
    force: training.Force = False,
) -> None:
    """Train a model to prefer one answer to another: DPO and its like, with an adapter or all weights."""
    model, data, out = training.given(model, data, out)
    from elm_mlx.train.alignment import Alignment
    from elm_mlx.train.finetuning import Data, Method
    from elm_mlx.train.optimizer import Schedule
    from elm_mlx.train.preference import Preferring
    from elm_mlx.train.settings import Settings

    method = Method(
        full, training.parse_rank(rank), alpha, tuple(target) if target else Method.targets, num_layers,
        dora=dora, rslora=rslora,
    )  # fmt: skip
    what = Data(
        data, template=template, max_length=max_seq_length, truncate=truncate, skip_bad=skip_bad,
        batch_size=batch_size, packed=pack, valid_batches=val_batches,
    )  # fmt: skip
    with bad_records_named(data):
        run = Alignment(
            model, what, method, Preferring(loss, beta), out, seed=seed, compute_dtype=compute_dtype, resume=resume
        )
    with run:
        steps = run.steps(epochs, grad_accumulation_steps) if iters is None else iters
        settings = Settings(
            Schedule(
                (5e-6 if full else 5e-5) if learning_rate is None else learning_rate,
                steps,
                training.warmup_steps(warmup, steps),
                lr_schedule,
            ),
            optimizer=optimizer,
            weight_decay=weight_decay,
            clip=clip or None,
            accumulate=grad_accumulation_steps,
            seed=seed,
            grad_checkpoint=grad_checkpoint,
            spike=None,  # of nats a token; a pair's loss has no such scale
            on_nan=on_nan,
            eval_every=steps_per_eval,
            save_every=save_every,
            keep=keep,
        )
        shown = Progress(steps, validates="valid" in run.splits, quiet=not run.leads)
        training.carry_out(run, settings, shown, configured.settings(ctx), resume, force)
