"""`elm-mlx kvp MODEL CONFIG`: a smaller model that predicts another one's keys and values of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elm_mlx.cli import options, training
from elm_mlx.cli.screen import counted, line
from elm_mlx.cli.training_display import TrainingDisplay
from elm_mlx.errors import InputError
from elm_mlx.reading import quoted

if TYPE_CHECKING:
    from elm_mlx.train.kvp_recipe import KVPRecipe
    from elm_mlx.train.kvp_training import KVPTraining

_ABOUT = "A recipe for `elm-mlx kvp`; docs/kvp.md says more. Paths are relative to where the command runs."

PANELS = {"A new recipe": ("init", "data")}


def kvp(
    ctx: typer.Context,
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="The base: a model directory, or OWNER/NAME[@REVISION] on the hub."),
    ] = None,
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A TOML file with the recipe.")] = None,
    aux: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The auxiliary: a smaller model of the same vocabulary. (default: --keep)"),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(metavar="0.75|0.5|0.25", help="Make it of this share of the base's layers. (default: --aux)"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory of the run and its prediction. (no default)")
    ] = None,
    init: training.Init = None,
    data: training.InitData = None,
    set_: options.Overrides = None,
    resume: training.Resume = False,
    force: training.Force = False,
) -> None:
    """Train a smaller model to predict a model's keys and values of a prompt: the first token comes sooner, at a price
    in quality (KV Prediction)."""
    if init is not None:
        options.refuse_others(ctx, ["init", "data"], "--init writes a recipe to be edited, and does not train")
        _init(init, data)
        return
    options.refuse_given(ctx, ["data"], "needs --init; CONFIG names its own")
    for value, name in ((model, "MODEL"), (config, "CONFIG"), (out, "--out")):
        if value is None:
            hint = "; --init FILE writes a first recipe" if name == "CONFIG" else ""
            raise InputError(f"{name} is missing: give {_NEEDED[name]}{hint}")
    assert model is not None and config is not None and out is not None
    from elm_mlx.train import memory, sections
    from elm_mlx.train.kvp_recipe import KVPRecipe
    from elm_mlx.train.kvp_training import KVPTraining

    recipe = sections.read(config, KVPRecipe, set_ or [])
    steps, every = recipe.loop().schedule.total, recipe.run.steps_per_report
    shown = TrainingDisplay(steps, recipe.data.validation is not None, every=every)
    base = options.directory_of(model)
    auxiliary = None if aux is None else options.directory_of(aux)
    with KVPTraining(base, auxiliary, keep, recipe, out, resume=resume, on_wrong=shown.say) as run:
        result = training.train(run, shown, _plan(run, recipe), training.RECIPE_KEYS, force, memory.RECIPE)
        shown.lines(training.ended(result, shown.validates) + training.texts_read(run, result))
        if result.harm is None:
            shown.lines(
                [("wrote", f"{run.out}; try: elm-mlx generate {quoted(model)} --kvp {quoted(run.out)} --prompt …")]
            )
        else:
            shown.lines([("wrote", f"{run.out}: what the last update left, worse than the maps as they were fitted")])
            shown.warn(training.harmed(result, "optimizer.lr"))
    if result.interrupted:
        raise typer.Exit(130)


_NEEDED = {
    "MODEL": "the base, whose keys and values are to be predicted", "CONFIG": "a recipe",
    "--out": "the run's directory",
}  # fmt: skip


def _init(path: Path, data: str | None) -> None:
    from elm_mlx import files
    from elm_mlx.train import kvp_recipe, sections

    if path.exists():
        raise InputError(f"{path}: exists already; choose another name")
    made = kvp_recipe.preset() if data is None else kvp_recipe.preset(data)
    files.write_text(path, sections.write(made, _ABOUT))
    line(f"wrote {path}: learns from {made.data.sources[0].path}")
    line(f"then: elm-mlx kvp MODEL {quoted(path)} --keep 0.5 --out kvp")


def _plan(run: KVPTraining, recipe: KVPRecipe) -> list[tuple[str, str]]:
    own, base = run.config, run.base
    made = "the base without the others" if run.auxiliary_path is None else str(run.auxiliary_path)
    layers = counted(own.num_layers, "layer")
    return [
        ("base", f"{run.base_path}: {base.parameters:,} parameters in {counted(base.num_layers, 'layer')}, frozen"),
        ("auxiliary", f"{made}: {own.parameters:,} parameters in {layers}, {own.parameters / base.parameters:.0%}"),
        ("maps", f"{run.trainable - own.parameters:,} parameters, from layers {' '.join(map(str, run.places))}"),
        *training.texts_planned(run, recipe, str(run.base_path)),
    ]
