"""What the commands that train share: options, how a run is announced, and what is said at its end.

Knows options by name and help, and runs as `elm_mlx.train.finetuning` makes them. Each command has defaults of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elm_mlx.cli.progress import Progress, duration
from elm_mlx.cli.show import byte_size, counted, name_bad
from elm_mlx.errors import InputError

if TYPE_CHECKING:
    from elm_mlx.store.adapters import Rank as Ranks
    from elm_mlx.train.finetuning import Finetuning
    from elm_mlx.train.memory import Load
    from elm_mlx.train.run import Result
    from elm_mlx.train.settings import Settings

_MOST_WARMUP = 100  # updates
_STEPS = "learning rate's steps"
# Of what must not change in a run the options that decide it, by a run's own names.
_OPTIONS = {
    **{name: f"--{name.replace('_', '-').replace(' ', '-')}" for name in (
        "rank", "dropout", "batch size", "compute dtype", "loss", "beta", "optimizer", "weight_decay", "clip", "seed",
        "grad_checkpoint", "on_nan",
    )},
    "method": "method (--full, --dora)", "scale": "scale (--alpha, --rslora)", "packing": "packing (--pack)",
    "row length": "row length (--max-seq-length)", "accumulate": "--grad-accumulation-steps",
    "number of adapted modules": "adapted modules (--target, --num-layers)",
    "adapted modules": "adapted modules (--target, --num-layers)",
    "learning rate's peak": "--learning-rate", "learning rate's warmup": "--warmup",
    "learning rate's shape": "--lr-schedule",
}  # fmt: skip

Out = Annotated[Path | None, typer.Option(metavar="DIR", help="The directory of the run and its adapter. (no default)")]
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="A YAML file with options, named as here."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, to the same losses.")]
Rank = Annotated[str, typer.Option(help="Of the adapters: 8, one a layer (4,4,8), or by module (qkv_proj=8,ffn.*=4).")]
Alpha = Annotated[
    float | None, typer.Option(help="Strength: adapters are scaled by alpha / rank. (default: twice the rank)")
]
Target = Annotated[
    list[str] | None,
    typer.Option(help="A module to adapt, by name or pattern; can be repeated. (default: all linears of layers)"),
]
NumLayers = Annotated[int, typer.Option(help="Adapt so many of the last layers; -1: all.")]
Dora = Annotated[bool, typer.Option("--dora", help="DoRA: learn the lengths of weights' rows too.")]
Rslora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")]
Full = Annotated[bool, typer.Option("--full", help="Train all the model's weights, and no adapter.")]
Iters = Annotated[int | None, typer.Option(help="Updates. (default: what --epochs take)")]
BatchSize = Annotated[int, typer.Option(help="Rows of a batch.")]
GradAccumulationSteps = Annotated[int, typer.Option(help="Batches to an update.")]
LrSchedule = Annotated[str, typer.Option(help="After warm-up: cosine or linear to a tenth, or constant.")]
Warmup = Annotated[
    float | None,
    typer.Option(help="Updates of rising learning rate; below 1 their share. (default: a tenth, at most 100)"),
]
Optimizer = Annotated[str, typer.Option(help="adamw, or adafactor, which needs less memory.")]
WeightDecay = Annotated[float, typer.Option(help="Of matrices; never of norms.")]
Clip = Annotated[float, typer.Option(help="The limit on the gradients' norm; 0 for none.")]
GradCheckpoint = Annotated[
    bool, typer.Option("--grad-checkpoint", help="Compute layers again on the way back: less memory, slower.")
]
Template = Annotated[str | None, typer.Option(help="Of conversations. (default: the model's own)")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut off what is longer.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad records out; they are still named.")]
Pack = Annotated[bool, typer.Option(help="Several examples to a row, kept apart; or else one.")]
ValBatches = Annotated[int, typer.Option(help="Batches of a validation; -1 for all there are.")]
StepsPerEval = Annotated[int, typer.Option(help="Updates between validations.")]
SaveEvery = Annotated[int, typer.Option(help="Updates between checkpoints.")]
Keep = Annotated[int, typer.Option(help="Checkpoints that are kept, beside the best.")]
OnNan = Annotated[str, typer.Option(help="At a loss that is no number, or a spike: stop, or skip.")]
Force = Annotated[bool, typer.Option("--force", help="Try what is sure not to fit into this machine's memory.")]
Seed = Annotated[int, typer.Option(help="Of the adapters, the order and dropout.")]
Data = Annotated[
    Path | None, typer.Option(help="A data file, or a directory with train and valid. (no default)", show_default=False)
]
Epochs = Annotated[float, typer.Option(help="Times that all examples are seen.")]
MaxSeqLength = Annotated[
    int | None,
    typer.Option(help="Tokens of an example, at most. (default: the model's context, of other families at most 2048)"),
]


def given(model: Path | None, data: Path | None, out: Path | None) -> tuple[Path, Path, Path]:
    """The three that have no default. Raises InputError where one is missing."""
    if model is None or data is None or out is None:
        missing = next(n for n, value in (("MODEL", model), ("--data", data), ("--out", out)) if value is None)
        raise InputError(f"{missing} is missing: on the command line, or in a file given by --config")
    return model, data, out


def warmup_steps(warmup: float | None, steps: int) -> int:
    """Updates of rising learning rate, of so many."""
    if warmup is None:
        return min(_MOST_WARMUP, steps // 10)
    if not 0 <= warmup < math.inf:
        raise InputError(f"--warmup {warmup:g}: updates, or below 1 their share, are needed")
    return round(warmup if warmup >= 1 else warmup * steps)


def parse_rank(text: str) -> Ranks:
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


def carry_out(
    run: Finetuning, settings: Settings, shown: Progress, used: dict[str, Any], resume: bool, force: bool
) -> None:
    """Say what is about to happen, train, and say how it ended; `used` are the options, which the run keeps."""
    from elm_mlx import device
    from elm_mlx.train import memory

    load = run.load(settings)
    tight = memory.check(load, device.available_memory(), device.total_memory(), force=force)
    name_bad(reason for split in run.splits.values() for reason in split.bad)
    shown.lines(_plan(run, settings))
    if tight:
        shown.warn(tight)
    used = used | {name: str(Path(used[name]).resolve()) for name in ("model", "data")}
    length = "--iters" if "iters" in used else "updates (--epochs)"
    onwards = f"; to train on, begin a run on what `elm-mlx fuse {run.path} {run.out} DIR` makes"
    with shown, changes_named({**_OPTIONS, _STEPS: length}, onwards):
        result = run.train(settings, used, resume=resume, callback=shown)
    shown.lines(ended(result, shown.validates))
    if result.harm is None:
        shown.lines([("wrote", f"{run.out}; try: {_trial(run.path, run.out, used.get('template'))}")])
    else:
        shown.lines([("wrote", f"{run.out}: what the last update left, worse than the model without it")])
        shown.warn(harmed(result, "--learning-rate"))
    if result.interrupted:
        raise typer.Exit(130)


@contextmanager
def changes_named(names: Mapping[str, str], onwards: str = "") -> Iterator[None]:
    """Call what a run cannot be resumed with by the `names` that its user knows, and say how to train for longer."""
    from elm_mlx.train.checkpoint import Changed

    try:
        yield
    except Changed as error:
        name = names.get(error.name, error.name)
        why = ", for the learning rate is spread over all updates" if error.name == _STEPS else ""
        raise InputError(
            f"{error.path}: was trained with {name} = {error.before}, not {error.after}; leave it as it was{why}, "
            f"or start anew with another --out{onwards if why else ''}"
        ) from None


def _trial(model: Path, adapter: Path, template: str | None) -> str:
    """The command that shows what was learnt; the template that it was learnt by is with the adapter."""
    from elm_mlx.text.chat_template import source_of

    converses = source_of(model, template)[0] is not None
    command, ending = ("chat", "") if converses else ("generate", " --prompt …")
    return f"elm-mlx {command} {model} --adapter {adapter}{ending}"


def _plan(run: Finetuning, settings: Settings) -> list[tuple[str, str]]:
    """What is about to happen, to be shown."""
    config, batches, steps = run.config, run.batches, settings.schedule.steps
    dtype = str(run.computation.dtype).removeprefix("mlx.core.")
    train = run.splits["train"]
    lines = [("bad", f"{counted(len(split.bad), 'record')} left out") for split in run.splits.values() if split.bad]
    for name, split in run.splits.items():
        lines += [(label, f"{name}: {remark}") for label, remark in split.remarks()]
    valid = f", {run.count('valid'):,} to validate" if "valid" in run.splits else ", none to validate"
    processes = f" in each of {run.world} processes" if run.world > 1 else ""
    updates = batches.steps() / settings.accumulate
    epochs = f"{steps / updates:.3g}"
    tokens = round((train.tokens - len(train.examples)) * steps / updates)
    return [
        *lines,
        ("model", f"{run.path}: {config.parameters:,} parameters, computed in {dtype}"),
        ("trained", f"{run.adapter.describe()}: {run.trainable:,} parameters, {run.trainable / config.parameters:.2%}"),
        ("data", f"{counted(run.count(), run.unit)}, {train.tokens:,} tokens, {train.trained_tokens:,} of them "
                 f"trained{valid}"),
        ("batches", f"{counted(run.batch_size, 'row')} of {run.row_length:,} tokens{processes}, {batches.fill():.0%} "
                    f"full, {settings.accumulate} to an update"),
        *(("rows", note) for note in run.notes),
        ("memory", needed(run.load(settings))),
        ("updates", f"{steps:,}, {epochs} {'epoch' if epochs == '1' else 'epochs'}, {tokens:,} tokens"),
    ]  # fmt: skip


def needed(load: Load) -> str:
    """How much memory a run takes, and how much there is."""
    from elm_mlx import device
    from elm_mlx.train import memory

    free = device.available_memory()
    return f"about {byte_size(memory.estimate(load).total)}" + (
        "" if free is None else f", of {byte_size(free)} that are free"
    )


def harmed(result: Result, rate: str) -> str:
    """What is said where training made the loss worse; `rate` is the learning rate's option."""
    assert result.harm is not None
    now, before = result.harm
    helps = f"a lower {rate} or other data may help"
    if result.progress.valid_loss is None:
        return f"the training loss rose from {before:.4f}, of the first update, to {now:.4f}: do not use it; {helps}"
    return (
        f"no validation loss was below the {before:.4f} before training, the last is {now:.4f}: do not use it; {helps}"
    )


def ended(result: Result, validated: bool) -> list[tuple[str, str]]:
    """How a run ended, to be shown."""
    done = result.progress
    took = duration(done.seconds) + (" and validations" if validated else "")
    lines = [("done", f"{counted(done.step, 'update')}, {counted(done.tokens, 'token')}, {took}")]
    if result.interrupted:
        lines = [("stopped", f"after {counted(done.step, 'update')}; --resume goes on from {result.last}")]
    if done.skipped:
        lines.append(("skipped", counted(done.skipped, "update")))
    if done.best_step:
        best = f"validation loss {done.best_loss:.4f}, after {counted(done.best_step, 'update')}"
        lines.append(("best", best))
    return lines
