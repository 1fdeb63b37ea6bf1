"""`elm-mlx lora MODEL --data PATH --out DIR`: fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import typer

from elm_mlx.cli import configured, options, training
from elm_mlx.cli.configured import Configured
from elm_mlx.cli.progress import Progress
from elm_mlx.cli.show import bad_records_named


class Command(Configured):
    """`openelm` is CoreNet's projects/openelm/peft_configs, but for the steps, which the data decide."""

    decides: ClassVar[Mapping[str, str]] = {"epochs": "iters"}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "openelm": {
            "rank": "32", "alpha": 32.0, "dropout": 0.1,
            "target": ["qkv_proj", "out_proj", "proj_1", "proj_2", "token_embeddings"],
            "learning_rate": 3e-4, "lr_schedule": "cosine", "clip": 1.0, "weight_decay": 0.0, "epochs": 3.0,
            "batch_size": 8, "grad_accumulation_steps": 2, "warmup": 1000 / 4375,
        },
    }  # fmt: skip


def lora(
    ctx: typer.Context,
    model: options.OptionalModelPath = None,
    data: training.Data = None,
    out: training.Out = None,
    config: training.Config = None,
    resume: training.Resume = False,
    recipe: Annotated[str | None, typer.Option(help="openelm: Apple's choices, where none are given here.")] = None,
    rank: training.Rank = "8",
    alpha: training.Alpha = None,
    dropout: Annotated[float, typer.Option(help="Of the adapters' inputs.")] = 0.0,
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
            "--learning-rate", "--lr", help="The highest. (default: 2e-4; with --full 2e-5)", show_default=False
        ),
    ] = None,
    lr_schedule: training.LrSchedule = "cosine",
    warmup: training.Warmup = None,
    optimizer: training.Optimizer = "adamw",
    weight_decay: training.WeightDecay = 0.0,
    clip: training.Clip = 1.0,
    grad_checkpoint: training.GradCheckpoint = False,
    compute_dtype: options.ComputeDtype = None,
    format: Annotated[
        str | None, typer.Option(help="As of `elm-mlx data`, and so the next five. (default: each record's keys tell)")
    ] = None,
    template: training.Template = None,
    max_seq_length: training.MaxSeqLength = None,
    truncate: training.Truncate = False,
    train_on_prompt: Annotated[
        bool, typer.Option("--train-on-prompt", help="Count the loss of every token, not of answers alone.")
    ] = False,
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
    """Fine-tune a model with LoRA or DoRA, or all of it: an adapter that generate, chat and fuse take."""
    model, data, out = training.given(model, data, out)
    from elm_mlx.train.finetuning import Data, Finetuning, Method
    from elm_mlx.train.optimizer import Schedule
    from elm_mlx.train.settings import Settings

    method = Method(
        full,
        training.parse_rank(rank),
        alpha,
        tuple(target) if target else Method.targets,
        num_layers,
        dropout,
        dora,
        rslora,
    )
    what = Data(
        data, format, template, max_seq_length, truncate, train_on_prompt, skip_bad, batch_size, pack, val_batches
    )
    with bad_records_named(data):
        run = Finetuning(model, what, method, out, seed=seed, compute_dtype=compute_dtype, resume=resume)
    with run:
        steps = run.steps(epochs, grad_accumulation_steps) if iters is None else iters
        settings = Settings(
            Schedule(
                (2e-5 if full else 2e-4) if learning_rate is None else learning_rate,
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
            on_nan=on_nan,
            eval_every=steps_per_eval,
            save_every=save_every,
            keep=keep,
        )
        shown = Progress(steps, validates="valid" in run.splits, quiet=not run.leads)
        training.carry_out(run, settings, shown, configured.settings(ctx), resume, force)
