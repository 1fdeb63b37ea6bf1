"""`elm-mlx lora MODEL --data PATH --out DIR`: fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from elm_mlx.cli import configured, options
from elm_mlx.cli.configured import Configured
from elm_mlx.cli.show import bad_records_named, name_bad, size
from elm_mlx.errors import InputError

if TYPE_CHECKING:
    from elm_mlx.adapters import Rank
    from elm_mlx.train.finetune import Finetuning
    from elm_mlx.train.loop import Result
    from elm_mlx.train.settings import Settings

_MOST_WARMUP = 100  # updates


class LoraCommand(Configured):
    """`openelm` is CoreNet's projects/openelm/peft_configs, but for the steps, which the data decide."""

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
    data: Annotated[
        Path | None, typer.Option(help="A data file, or a directory with train and valid.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The directory of the run and its adapter.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="A YAML file with options, named as here.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, to the same losses.")] = False,
    recipe: Annotated[str | None, typer.Option(help="openelm: Apple's choices, where none are given here.")] = None,
    rank: Annotated[
        str, typer.Option(help="Of the adapters: 8, one a layer (4,4,8), or by module (qkv_proj=8,ffn.*=4).")
    ] = "8",
    alpha: Annotated[
        float | None, typer.Option(help="Strength: adapters are scaled by alpha / rank. (default: twice the rank)")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Of the adapters' inputs.")] = 0.0,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A module to adapt, by name or pattern; can be repeated. (default: all linears of layers)"),
    ] = None,
    num_layers: Annotated[int, typer.Option(help="Adapt so many of the last layers; -1: all.")] = -1,
    dora: Annotated[bool, typer.Option("--dora", help="DoRA: learn the lengths of weights' rows too.")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all the model's weights, and no adapter.")] = False,
    iters: Annotated[int | None, typer.Option(help="Updates. (default: what --epochs take)")] = None,
    epochs: Annotated[float, typer.Option(help="Times that all examples are seen.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 4,
    grad_accumulation_steps: Annotated[int, typer.Option(help="Batches to an update.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest. (default: 2e-4; with --full 2e-5)", show_default=False)
    ] = None,
    lr_schedule: Annotated[str, typer.Option(help="After warm-up: cosine or linear to a tenth, or constant.")] = (
        "cosine"
    ),
    warmup: Annotated[
        float | None,
        typer.Option(help="Updates of rising learning rate; below 1 their share. (default: a tenth, at most 100)"),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, or adafactor, which needs less memory.")] = "adamw",
    weight_decay: Annotated[float, typer.Option(help="Of matrices; never of norms.")] = 0.0,
    clip: Annotated[float, typer.Option(help="The limit on the gradients' norm; 0 for none.")] = 1.0,
    grad_checkpoint: Annotated[
        bool, typer.Option("--grad-checkpoint", help="Compute layers again on the way back: less memory, slower.")
    ] = False,
    compute_dtype: options.ComputeDtype = None,
    format: Annotated[str | None, typer.Option(help="As of `elm-mlx data`, and so the next five.")] = None,
    template: Annotated[str | None, typer.Option(help="Of conversations. (default: the model's own)")] = None,
    max_seq_length: Annotated[
        int | None, typer.Option(help="Tokens of an example, at most. (default: the model's context)")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut off what is longer.")] = False,
    train_on_prompt: Annotated[
        bool, typer.Option("--train-on-prompt", help="Count the loss of every token, not of answers alone.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad records out; they are still named.")] = False,
    pack: Annotated[bool, typer.Option(help="Several examples to a row, kept apart; or else one.")] = True,
    val_batches: Annotated[int, typer.Option(help="Batches of a validation; -1 for all there are.")] = -1,
    steps_per_eval: Annotated[int, typer.Option(help="Updates between validations.")] = 200,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100,
    keep: Annotated[int, typer.Option(help="Checkpoints that are kept, beside the best.")] = 2,
    on_nan: Annotated[str, typer.Option(help="At a loss that is no number, or a spike: stop, or skip.")] = "stop",
    seed: Annotated[int, typer.Option(help="Of the adapters, the order and dropout.")] = 0,
) -> None:
    """Fine-tune a model with LoRA or DoRA, or all of it: an adapter that generate, chat and fuse take."""
    if model is None or data is None or out is None:
        missing = next(n for n, value in (("MODEL", model), ("--data", data), ("--out", out)) if value is None)
        raise InputError(f"{missing} is missing: on the command line, or in a file given by --config")
    from elm_mlx import device
    from elm_mlx.cli import progress
    from elm_mlx.train import memory
    from elm_mlx.train.finetune import Data, Finetuning, Method
    from elm_mlx.train.optimizer import Schedule
    from elm_mlx.train.settings import Settings

    method = Method(
        full, parse_rank(rank), alpha, tuple(target) if target else Method.targets, num_layers, dropout, dora, rslora
    )
    what = Data(
        data, format, template, max_seq_length, truncate, train_on_prompt, skip_bad, batch_size, pack, val_batches
    )
    with bad_records_named(data):
        run = Finetuning(model, what, method, out, seed=seed, compute_dtype=compute_dtype, resume=resume)
    steps = run.steps(epochs, grad_accumulation_steps) if iters is None else iters
    settings = Settings(
        Schedule(
            (2e-5 if full else 2e-4) if learning_rate is None else learning_rate,
            steps,
            min(_MOST_WARMUP, steps // 10) if warmup is None else round(warmup if warmup >= 1 else warmup * steps),
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
    memory.check(run.load(settings), device.available_memory())
    name_bad(reason for split in run.splits.values() for reason in split.bad)
    shown = progress.Progress(steps, quiet=not run.leads)
    shown.lines(_plan(run, settings))
    used = configured.settings(ctx) | {"model": str(model.resolve()), "data": str(data.resolve())}
    with shown:
        result = run.train(
            settings, used, resume=resume, on_ready=shown.ready, on_report=shown.report, on_stop=shown.stopping
        )
    shown.lines(_outcome(run, result))
    if result.interrupted:
        raise typer.Exit(130)


def parse_rank(text: str) -> Rank:
    """`8`, `4,4,8` or `qkv_proj=8,ffn.*=4`. Raises InputError."""
    items = [item.strip() for item in text.split(",")]
    try:
        if "=" in text:
            pairs = (item.rsplit("=", 1) for item in items)
            return {name.strip(): int(number) for name, number in pairs}
        numbers = [int(item) for item in items]
    except ValueError:
        raise InputError(f"--rank {text}: needs a number, numbers like 4,4,8, or qkv_proj=8,ffn.*=4") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _plan(run: Finetuning, settings: Settings) -> list[tuple[str, str]]:
    """What is about to happen."""
    config, batches, steps = run.config, run.batches, settings.schedule.steps
    dtype = str(run.computation.dtype).removeprefix("mlx.core.")
    train = run.splits["train"]
    lines = [("bad", f"{len(split.bad):,} records left out") for split in run.splits.values() if split.bad]
    for name, split in run.splits.items():
        lines += [("length", f"{name}: {warning}") for warning in split.warnings()]
    valid = f", {len(run.splits['valid'].examples):,} to validate" if "valid" in run.splits else ", none to validate"
    processes = f" in each of {run.world} processes" if run.world > 1 else ""
    updates = batches.steps() / settings.accumulate
    tokens = round((train.tokens - len(train.examples)) * steps / updates)
    return [
        *lines,
        ("model", f"{run.path}: {config.parameters:,} parameters, computed in {dtype}"),
        ("trained", f"{run.adapter.describe()}: {run.trainable:,} parameters, {run.trainable / config.parameters:.2%}"),
        ("data", f"{len(train.examples):,} examples, {train.tokens:,} tokens, {train.trained_tokens:,} of them trained"
                 f"{valid}"),
        ("batches", f"{run.batch_size} rows of {run.row_length:,} tokens{processes}, {batches.fill():.0%} full, "
                    f"{settings.accumulate} to an update"),
        ("memory", _memory(run, settings)),
        ("updates", f"{steps:,}, {steps / updates:.3g} epochs, {tokens:,} tokens"),
    ]  # fmt: skip


def _memory(run: Finetuning, settings: Settings) -> str:
    from elm_mlx import device
    from elm_mlx.train import memory

    needed, free = memory.estimate(run.load(settings)).total, device.available_memory()
    return f"about {size(needed)} at most" + ("" if free is None else f", of {size(free)} that are free")


def _outcome(run: Finetuning, result: Result) -> list[tuple[str, str]]:
    from elm_mlx.cli.progress import duration

    done = result.progress
    lines = [("done", f"{done.step:,} updates, {done.tokens:,} tokens, {duration(done.seconds)} and validations")]
    if result.interrupted:
        lines = [("stopped", f"after {done.step:,} updates; --resume goes on from {result.last}")]
    if done.skipped:
        lines.append(("skipped", f"{done.skipped:,} updates"))
    if done.best_step is not None:
        lines.append(("best", f"validation loss {done.best_loss:.4f}, after {done.best_step:,} updates"))
    lines.append(("wrote", f"{run.out}; try: elm-mlx generate {run.path} --adapter {run.out} --prompt …"))
    return lines
