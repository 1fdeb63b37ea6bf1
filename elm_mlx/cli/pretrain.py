"""`elm-mlx pretrain CONFIG`: from raw text to a model, by a recipe in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elm_mlx.cli import options, training
from elm_mlx.cli.screen import counted, line
from elm_mlx.errors import InputError

if TYPE_CHECKING:
    from elm_mlx.train.pretraining import Pretraining
    from elm_mlx.train.pretraining_recipe import Recipe
    from elm_mlx.train.run import Result

_MEAN_OF = 5  # the last checkpoints, as in the paper: fewer where fewer are kept
# A recipe's keys by a checkpoint's names for what they decide; the model's are not among them.
_KEYS = {
    **{f"learning rate's {name}": f"optimizer.{name}" for name in ("steps", "warmup", "shape", "end")},
    "learning rate's peak": "optimizer.lr", "learning rate's start": "optimizer.warmup_from",
    "optimizer": "optimizer.name",
    **{name: f"optimizer.{name}" for name in ("betas", "eps", "weight_decay", "clip", "z_loss")},
    "batch size": "run.batch_size", "compute dtype": "run.compute_dtype",
    **{name: f"run.{name}" for name in ("accumulate", "seed", "grad_checkpoint", "on_nan")},
}  # fmt: skip
_ABOUT = "A recipe for `elm-mlx pretrain`; docs/pretrain.md says more. Paths are relative to where the command runs."

PANELS = {"A new recipe": ("init", "preset", "data")}


def pretrain(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A TOML file with the recipe.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory of the run and its model. (no default)")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a recipe to start from, and do not train. (default: train)"),
    ] = None,
    preset: Annotated[
        Literal["small", options.Preset],
        typer.Option(help="For --init: a model for small texts, or one of the paper's."),
    ] = "small",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="For --init: the text to train on, as own.txt or data/*.jsonl. (default: a name to replace)",
        ),
    ] = None,
    set_: options.Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, to the same losses.")] = False,
    force: training.Force = False,
) -> None:
    """Train a model from raw text: filtered and tokenized as it is read, by the paper's recipe or your own."""
    from elm_mlx.train import sections

    if init is not None:
        _init(init, preset, data)
        return
    if data is not None:
        raise InputError("--data needs --init; CONFIG names its own sources")
    if config is None or out is None:
        hint = "--resume takes the one that the run was begun with" if resume else "--init FILE writes a first recipe"
        raise InputError(
            f"CONFIG is missing; {hint}" if config is None else "--out is missing: give the run's directory"
        )
    from elm_mlx.cli import screen
    from elm_mlx.train import memory
    from elm_mlx.train.pretraining import Pretraining
    from elm_mlx.train.pretraining_recipe import Recipe

    recipe = sections.read(config, Recipe, set_ or [])
    steps, every = recipe.loop().schedule.total, recipe.run.steps_per_report
    shown = screen.TrainingDisplay(steps, recipe.data.validation is not None, every=every)
    with Pretraining(recipe, out, resume=resume, on_wrong=shown.say) as run:
        result = training.train(run, shown, _plan(run, recipe), _KEYS, force, memory.RECIPE)
        shown.lines(_outcome(run, result, shown.validates))
        if result.harm is not None:
            shown.warn(training.harmed(result, "optimizer.lr"))
    if result.interrupted:
        raise typer.Exit(130)


def _init(path: Path, preset: str, data: str | None) -> None:
    from elm_mlx import files
    from elm_mlx.train import pretraining_recipe, sections

    if path.exists():
        raise InputError(f"{path}: exists already; choose another name")
    made = pretraining_recipe.preset(preset) if data is None else pretraining_recipe.preset(preset, data)
    files.write_text(path, sections.write(made, _ABOUT))
    line(
        f"wrote {path}: learns from {made.data.sources[0].path}, in the tokens of {made.tokenizer}, which must be there"
    )
    line(f"then: elm-mlx pretrain {path} --out run")


def _plan(run: Pretraining, recipe: Recipe) -> list[tuple[str, str]]:
    config, steps, tokens = run.config, run.settings.schedule.total, run.tokens_per_update
    processes = f" in each of {run.world} processes" if run.world > 1 else ""
    sources = ", ".join(source.name for source in recipe.data.sources)
    asked, rising = recipe.optimizer.warmup, recipe.optimizer.warmup_steps()
    unfit = "" if asked in (None, rising) else f": the recipe's {asked:,} do not fit into {steps:,}"
    layers = counted(config.num_layers, "layer")
    return [
        ("model", f"{config.parameters:,} parameters in {layers}, {config.vocab_size:,} tokens"),
        ("data", f"{sources}; tokenized by {recipe.tokenizer}"),
        ("batches", f"{counted(recipe.run.batch_size, 'row')} of {recipe.data.sequence_length:,} tokens{processes}, "
                    f"{recipe.run.accumulate} to an update"),
        ("updates", f"{steps:,} of {tokens:,} tokens, {steps * tokens:,} in all, "
                    f"{steps * tokens / config.parameters:.1f} a parameter"),
        ("warm-up", f"{counted(rising, 'update')} of rising learning rate{unfit}"),
        ("memory", training.needed(run.load())),
    ]  # fmt: skip


def _outcome(run: Pretraining, result: Result, validated: bool) -> list[tuple[str, str]]:
    from elm_mlx.directories import checkpoints_of

    lines = training.ended(result, validated)
    for source, counts in zip(run.sources, run.batches.counts(), strict=True) if run.batches.under_way else ():
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in counts.dropped.items() if number)
        kept = f"{counts.kept:,} of {counted(counts.read, 'document')} kept"
        kept += f", {counts.tokens:,} tokens, epoch {counts.epoch + 1}"
        lines.append(("read", f"{source.name}: {kept}" + (f"; dropped {dropped}" if dropped else "")))
    if run.batches.under_way:
        lines.append(("trained", f"on {result.progress.tokens // run.world:,} of these tokens"))
    if result.harm is not None:
        return [*lines, ("wrote", f"{run.out}: what the last update left, worse than the weights before the first")]
    lines.append(("wrote", f"{run.out}; try: elm-mlx generate {run.out} --prompt …"))
    last = min(_MEAN_OF, len(checkpoints_of(run.out)))
    if last > 1:
        lines.append(("average", f"the last {last} checkpoints: elm-mlx average --last {last} {run.out} --out DIR"))
    return lines
