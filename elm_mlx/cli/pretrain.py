"""`elm-mlx pretrain CONFIG`: from raw text to a model, by a recipe in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elm_mlx.cli import options, training
from elm_mlx.cli.screen import counted, line
from elm_mlx.cli.training_display import TrainingDisplay
from elm_mlx.errors import InputError
from elm_mlx.reading import quoted

if TYPE_CHECKING:
    from elm_mlx.train.pretraining import Pretraining
    from elm_mlx.train.pretraining_recipe import Recipe
    from elm_mlx.train.run import Result

_MEAN_OF = 5  # the last checkpoints, as in the paper: fewer where fewer are kept
_ABOUT = "A recipe for `elm-mlx pretrain`; docs/pretrain.md says more. Paths are relative to where the command runs."

PANELS = {"A new recipe": ("init", "preset", "data")}


def pretrain(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A TOML file with the recipe.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory of the run and its model. (no default)")
    ] = None,
    init: training.Init = None,
    preset: Annotated[
        Literal["small", options.Preset],
        typer.Option(help="For --init: a model for small texts, or one of the paper's."),
    ] = "small",
    data: training.InitData = None,
    set_: options.Overrides = None,
    resume: training.Resume = False,
    force: training.Force = False,
) -> None:
    """Train a model from raw text: filtered and tokenized as it is read, by the paper's recipe or your own."""
    from elm_mlx.train import sections

    if init is not None:
        options.refuse_others(
            ctx, ["init", "preset", "data"], "--init writes a recipe to be edited, and does not train"
        )
        _init(init, preset, data)
        return
    options.refuse_given(ctx, ["data", "preset"], "needs --init; CONFIG names its own")
    if config is None or out is None:
        hint = "--resume takes the one that the run was begun with" if resume else "--init FILE writes a first recipe"
        raise InputError(
            f"CONFIG is missing; {hint}" if config is None else "--out is missing: give the run's directory"
        )
    from elm_mlx.train import memory
    from elm_mlx.train.pretraining import Pretraining
    from elm_mlx.train.pretraining_recipe import Recipe

    recipe = sections.read(config, Recipe, set_ or [])
    steps, every = recipe.loop().schedule.total, recipe.run.steps_per_report
    shown = TrainingDisplay(steps, recipe.data.validation is not None, every=every)
    with Pretraining(recipe, out, resume=resume, on_wrong=shown.say) as run:
        result = training.train(run, shown, _plan(run, recipe), training.RECIPE_KEYS, force, memory.RECIPE)
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
    line(f"then: elm-mlx pretrain {quoted(path)} --out run")


def _plan(run: Pretraining, recipe: Recipe) -> list[tuple[str, str]]:
    config = run.config
    layers = counted(config.num_layers, "layer")
    return [
        ("model", f"{config.parameters:,} parameters in {layers}, {config.vocab_size:,} tokens"),
        *training.texts_planned(run, recipe, recipe.tokenizer),
    ]


def _outcome(run: Pretraining, result: Result, validated: bool) -> list[tuple[str, str]]:
    from elm_mlx.directories import checkpoints_of

    lines = training.ended(result, validated) + training.texts_read(run, result)
    if result.harm is not None:
        return [*lines, ("wrote", f"{run.out}: what the last update left, worse than the weights before the first")]
    lines.append(("wrote", f"{run.out}; try: elm-mlx generate {quoted(run.out)} --prompt …"))
    last = min(_MEAN_OF, len(checkpoints_of(run.out)))
    if last > 1:
        lines.append(
            ("average", f"the last {last} checkpoints: elm-mlx average --last {last} {quoted(run.out)} --out DIR")
        )
    return lines
