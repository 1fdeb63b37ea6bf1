"""The commands that train: their options and where these come from, what is said before a run and after it.

An option is taken from the command line, or else from the file of `--config`, from what a resumed run was started with,
from a recipe, or from its default, in this order.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from elm_mlx import reading
from elm_mlx.cli import mlx_lm_settings
from elm_mlx.cli.options import directory_of
from elm_mlx.cli.screen import bad_records_named, byte_size, counted, duration, name_bad
from elm_mlx.cli.training_display import TrainingDisplay, shown_measures
from elm_mlx.errors import InputError
from elm_mlx.reading import quoted
from elm_mlx.train import sections
from elm_mlx.train.setting_fields import Setting, made
from elm_mlx.train.settings import DpoSettings, GrpoSettings, LoraSettings

if TYPE_CHECKING:
    from elm_mlx.data.draws import Draws
    from elm_mlx.data.examples import Prepared
    from elm_mlx.train.finetuning import Finetuning
    from elm_mlx.train.memory import Load
    from elm_mlx.train.pretraining_recipe import TextRecipe
    from elm_mlx.train.reinforcement import Reinforcement
    from elm_mlx.train.run import Result
    from elm_mlx.train.text_training import TextTraining

Recipes = Mapping[str, Mapping[str, Any]]  # of each its settings, by name

_STEPS = "learning rate's steps"
# Options by a checkpoint's names for what they decide, where these are others.
_DECIDED_BY = {
    "method": "method (--full, --dora)", "scale": "scale (--alpha, --rslora)", "packing": "packing (--pack)",
    "row length": "row length (--max-seq-length)", "accumulate": "--grad-accumulation-steps",
    "number of adapted modules": "adapted modules (--target, --num-layers)",
    "adapted modules": "adapted modules (--target, --num-layers)",
    "weights of the data": "--weight", "learning rate's peak": "--learning-rate", "learning rate's warmup": "--warmup",
    "learning rate's shape": "--lr-schedule", "batches of validation": "--val-batches",
    "problems of a validation": "--eval-problems",
}  # fmt: skip

# A recipe's keys by a checkpoint's names for what they decide; the model's are not among them.
RECIPE_KEYS = {
    **{f"learning rate's {name}": f"optimizer.{name}" for name in ("steps", "warmup", "shape", "end")},
    "learning rate's peak": "optimizer.lr", "learning rate's start": "optimizer.warmup_from",
    "optimizer": "optimizer.name",
    **{name: f"optimizer.{name}" for name in ("betas", "eps", "weight_decay", "clip", "z_loss")},
    "batch size": "run.batch_size", "compute dtype": "run.compute_dtype",
    "rows of validation": "data.validation_rows",
    **{name: f"run.{name}" for name in ("accumulate", "seed", "grad_checkpoint", "on_nan")},
}  # fmt: skip

Config = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="A YAML file with options, named as here.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, to the same losses.")]
Init = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a recipe to start from, and do not train. (default: train)"),
]
InitData = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="For --init: the text to train on, as own.txt or data/*.jsonl. (default: a name to replace)",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Start even if the run cannot fit into memory.")]


def command(
    kind: type[LoraSettings], about: str, recipes: Recipes = MappingProxyType({}), about_recipes: str = ""
) -> Callable[..., None]:
    """Returns the function of a command whose options are the settings of `kind`; `about` is its help."""

    def run(ctx: typer.Context, **given: Any) -> None:
        carry_out(_complete(kind, chosen(kind, recipes, ctx, given)), given["resume"], given["force"])

    recipe: Any = Literal[tuple(recipes)] if recipes else None
    parameters = [
        _parameter("ctx", typer.Context, inspect.Parameter.empty),
        *(_option(kind, each) for each in kind.options().values()),
        _parameter("config", Config, None), _parameter("resume", Resume, False),
        *([_parameter("recipe", Annotated[recipe | None, typer.Option(help=about_recipes)], None)] if recipes else []),
        _parameter("force", Force, False),
    ]  # fmt: skip
    run.__doc__ = about
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


def _option(kind: type[LoraSettings], setting: Setting) -> inspect.Parameter:
    """The parameter of a command's function that stands for a setting."""
    help_ = setting.about[:1].upper() + setting.about[1:]
    if setting.name == "model":
        argument = typer.Argument(metavar="[MODEL]", help=help_)
        return _parameter("model", Annotated[Path | None, argument], None)
    names = [f"--{setting.name.replace('_', '-')}"]
    if setting.name == "learning_rate":
        names.append("--lr")
        adapter, full = (f"{rate:.0e}".replace("e-0", "e-") for rate in kind.rates)
        help_ += f" (default: {adapter}; with --full {full})"
    if setting.name == "from_adapter":
        names.append("--from")
    if setting.kind is bool and setting.default:
        names = []  # typer's own, which has a --no- too
    default = None if setting.default in (MISSING, ()) else setting.default
    value, metavar = setting.kind, "DIR" if setting.name in ("out", "from_adapter") else None
    if get_origin(value) is tuple:  # typer takes lists, and none of a Literal, which the settings check
        item = get_args(value)[0]
        metavar = f"<{'|'.join(get_args(item))}>" if get_args(item) else None
        value = list[str if metavar else item]  # type: ignore[misc]
    option = typer.Option(*names, help=help_, metavar=metavar, rich_help_panel=setting.section)
    return _parameter(setting.name, Annotated[value | None if default is None else value, option], default)


def chosen(kind: type[LoraSettings], recipes: Recipes, ctx: typer.Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a source has, by name; `given` are the parameters of the command line.

    Raises:
        InputError: names the file and the key that cannot be taken.
    """
    options = kind.options()
    values = {name: given[name] for name in options if _on_command_line(ctx, name)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    if "epochs" in values:
        values.setdefault("iters", None)  # of a file, it would overrule the epochs

    def fill(found: Mapping[str, Any], where: str) -> None:
        for name, value in found.items():
            if name in options and value is not None and value != [] and name not in values:
                values[name] = _read_as(options[name], value, where)

    scale = None
    if given["config"] is not None:
        path = Path(given["config"])
        found = _read(path, options)
        scale = found.pop(mlx_lm_settings.SCALE, None) if "alpha" not in values else None
        if scale is not None:
            values["alpha"] = None  # until the rank is known, which may stand anywhere
        fill(found, str(path))
    if given["resume"] and "out" in values:
        from elm_mlx.directories import RUN_RECORD

        path = Path(values["out"]) / RUN_RECORD
        record = reading.json_object(path) if path.exists() else {"settings": {}}
        before, made_by = record.get("settings"), record.get("command")
        if isinstance(made_by, str) and made_by != ctx.command.name:
            raise InputError(f"{path.parent}: holds a run of `elm-mlx {made_by}`; resume it by that command")
        if not isinstance(before, dict):
            raise InputError(f"{path}: holds no settings of the run")
        added = values.pop("extend", ())
        fill(before, str(path))
        if added:  # to what the last checkpoint has: the settings' may be of a start that saved nothing
            from elm_mlx.train import checkpoint

            values["extend"] = (*checkpoint.extended_by(path.parent), *added)
    if given.get("recipe") is not None:
        fill(recipes[given["recipe"]], f"recipe {given['recipe']}")
    if scale is not None:
        rank = values.get("rank", options["rank"].default)
        values["alpha"] = mlx_lm_settings.alpha(scale, rank, values.get("rslora", False))
    return {name: value for name, value in values.items() if value is not None}


def settings_in(path: Path, kind: type[LoraSettings]) -> dict[str, Any]:
    """Returns the settings of a run that a file as `--config` takes has, by name. Raises InputError."""
    options = kind.options()
    found = _read(path, options)
    scale = found.pop(mlx_lm_settings.SCALE, None)
    values = {name: _read_as(options[name], value, str(path)) for name, value in found.items() if value is not None}
    if scale is not None and "alpha" not in values:
        rank = values.get("rank", options["rank"].default)
        values["alpha"] = mlx_lm_settings.alpha(scale, rank, values.get("rslora", False))
    return values


def _complete(kind: type[LoraSettings], values: Mapping[str, Any]) -> LoraSettings:
    """Returns the settings of a run. Raises InputError where one is missing."""
    for name in kind.needed:
        if name not in values:
            shown = "MODEL" if name == "model" else f"--{name}"
            out = values.get("out")
            begun = out is not None and (reading.expanded(out) / "run.json").exists()
            hint = f"; --resume goes on with the run in {out}" if begun else ""
            raise InputError(f"{shown} is missing: give it on the command line, or in the file of --config{hint}")
    return made(kind, values)


def _on_command_line(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _read(path: Path, options: Mapping[str, Setting]) -> dict[str, Any]:
    """Returns the settings in a YAML or JSON file, and mlx-lm's scale. Raises InputError."""
    values: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        name = str(key).replace("-", "_")
        name = "learning_rate" if name == "lr" else name
        if name in values:
            raise InputError(f"{path}: {key} is given twice, in two spellings")
        values[name] = value
    try:
        values |= _tables(values)
        found = mlx_lm_settings.translated(values)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    for name, value in found.items():
        if value == []:
            raise InputError(f"{path}: {name} is an empty list: leave it out, or write what is meant")
        if name not in options and name != mlx_lm_settings.SCALE:
            near = difflib.get_close_matches(name, options, 1)
            hint = f"; the nearest is {near[0]}" if near else f"; there are {', '.join(sorted(options))}"
            raise InputError(f"{path}: {name} is not an option{hint}")
    return found


def _tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `data` and `weight` of a list of sources as a recipe of `pretrain` has them. Raises ValueError."""
    data = values.get("data")
    sources = data if isinstance(data, list) else [data]
    if not any(isinstance(each, Mapping) for each in sources):
        return {}
    if values.get("weight") is not None:
        raise ValueError("weight stands beside data, and sources in it have their own: keep one")
    found = [each if isinstance(each, Mapping) else {"path": each} for each in sources]
    for each in found:
        if "path" not in each or not {*each} <= {"path", "weight"}:
            raise ValueError(
                f"a source of data has {', '.join(map(str, each)) or 'nothing'}: path and weight are its keys"
            )
    weights = [each.get("weight") for each in found]
    named = {"data": [each["path"] for each in found]}
    return named if not any(weights) else named | {"weight": [1 if weight is None else weight for weight in weights]}


def _mapping(path: Path) -> dict[Any, Any]:
    """Reads YAML or JSON, which is YAML but for tabs. Raises InputError."""
    if path.suffix.lower() != ".json":
        return reading.yaml_mapping(path)
    try:
        values = reading.load_json(reading.text(path, reading.TABLES_BYTES), reading.JSON_RECORDS)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object")
    return values


def _read_as(setting: Setting, value: Any, where: str) -> Any:
    """Returns a file's value as the setting has it; ranks may be a list or a table, and a name may be a number."""
    if setting.name == "rank" and isinstance(value, (Mapping, list)):
        rows = value.items() if isinstance(value, Mapping) else (("", each) for each in value)
        numbers = [(name, sections.value_of(int, each, "rank", where)) for name, each in rows]
        return ",".join(f"{name}={number}" if isinstance(value, Mapping) else str(number) for name, number in numbers)
    if setting.name == "columns" and isinstance(value, Mapping):
        return tuple(f"{key}={column}" for key, column in value.items())
    if setting.kind in (str, Path) and type(value) in (int, float):
        value = str(int(value) if value == value // 1 else value)
    return sections.value_of(setting.kind, value, setting.name, where)


def carry_out(asked: LoraSettings, resume: bool, force: bool) -> None:
    """Opens a run, prints what is about to happen, trains, and prints how it ended."""
    from elm_mlx.train import memory
    from elm_mlx.train.finetuning import Finetuning

    directory_of(asked.model)  # with a bar: the run finds it there
    with bad_records_named(", ".join(asked.data)):
        if isinstance(asked, DpoSettings):
            from elm_mlx.train.alignment import Alignment

            run: Finetuning = Alignment(asked, resume=resume)
        elif isinstance(asked, GrpoSettings):
            from elm_mlx.train.reinforcement import Reinforcement

            run = Reinforcement(asked, resume=resume)
        else:
            run = Finetuning(asked, resume=resume)
    with run:
        schedule = run.settings.schedule
        shown = TrainingDisplay(schedule.total, run.validates, every=asked.reports.steps_per_report)
        shown.asks = isinstance(asked, GrpoSettings)
        name_bad([reason for split in run.splits.values() for reason in split.bad])
        options = {name: f"--{name.replace('_', '-')}" for name in asked.options()}
        names = {name.replace("_", " "): option for name, option in options.items()} | options | _DECIDED_BY
        names[_STEPS] = "updates (--epochs)" if asked.optimizer.iters is None else "--iters"
        onwards = "; to train on when it has ended, --extend N adds N updates"
        result = train(run, shown, _plan(run), names, force, memory.OPTIONS, onwards)
        shown.lines(ended(result, shown.validates, shown.asks))
        if result.harm is None:
            trial = _trial(asked.model, run.path, run.out)
            shown.lines([("wrote", f"{run.out}; try: {trial}")])
        else:
            shown.lines([("wrote", f"{run.out}: what the last update left, no better than the model without it")])
            shown.warn(harmed(result, "--learning-rate", shown.asks))
    if result.interrupted:
        raise typer.Exit(130)


def train(
    run: Finetuning | TextTraining[Any], shown: TrainingDisplay, plan: list[tuple[str, str]], names: Mapping[str, str],
    force: bool, advice: Mapping[str, str], onwards: str = "",
) -> Result:  # fmt: skip
    """Prints the plan of a run and trains.

    Args:
        names: options by a checkpoint's names for what they decide.
        advice: options by what needs less memory, as `memory.OPTIONS`.
        onwards: how to train for longer than a run that has ended.

    Raises:
        InputError: the run does not fit into memory, or cannot be resumed with other settings, which are named.
    """
    from elm_mlx import device
    from elm_mlx.train import memory
    from elm_mlx.train.checkpoint import Changed

    tight = memory.check(run.load(), device.available_memory(), device.total_memory(), advice, force)
    shown.quiet = not run.leads
    shown.lines(plan)
    if tight:
        shown.warn(tight)
    try:
        with shown:
            return run.train(shown)
    except Changed as error:
        name = names.get(error.name, error.name)
        why = ", for the learning rate is spread over all updates" if error.name == _STEPS else ""
        raise InputError(
            f"{error.path}: was trained with {name} = {error.before}, not {error.after}; leave it as it was{why}, "
            f"or start anew with another --out{onwards if why else ''}"
        ) from None


def _trial(model: Path, directory: Path, adapter: Path) -> str:
    """Returns the command that shows what was learnt; the template that it was learnt by is with the adapter."""
    from elm_mlx.text.chat_template import source_of

    converses = source_of(directory, adapter=adapter)[0] is not None
    command, ending = ("chat", "") if converses else ("generate", " --prompt …")
    return f"elm-mlx {command} {quoted(model)} --adapter {quoted(adapter)}{ending}"


def _plan(run: Finetuning) -> list[tuple[str, str]]:
    """Returns what is about to happen, as labels and texts."""
    from elm_mlx import device
    from elm_mlx.train.reinforcement import Reinforcement

    config, dtype = run.config, str(run.computation.dtype).removeprefix("mlx.core.")
    if dtype != "float32" and not device.on_gpu():
        dtype += ", which is slow on a CPU: leave out --compute-dtype there"
    examples, updates = _answers(run) if isinstance(run, Reinforcement) else _examples(run)
    lines = [("bad", f"{counted(len(split.bad), 'record')} left out") for split in run.splits.values() if split.bad]
    for name, split in run.splits.items():
        lines += [(label, f"{name}: {remark}") for label, remark in split.remarks()]
        lines += mixed(split, run.batches.draws) if name == "train" else []
    return [
        *lines,
        ("model", f"{run.path}: {config.parameters:,} parameters, computed in {dtype}"),
        ("trained", f"{run.adapter.describe()}: {run.trainable:,} parameters, {run.trainable / config.parameters:.2%}"),
        *examples,
        *(("rows", note) for note in run.notes),
        ("memory", needed(run.load())),
        ("updates", updates),
    ]


def _examples(run: Finetuning) -> tuple[list[tuple[str, str]], str]:
    """Returns what is trained on, as labels and texts, and how many updates and epochs."""
    batches, settings, train = run.batches, run.settings, run.splits["train"]
    steps = settings.schedule.total
    valid = f", {run.count('valid'):,} to validate" if "valid" in run.splits else ", none to validate"
    processes = f" in each of {run.world} processes" if run.world > 1 else ""
    updates = batches.steps() / settings.accumulate
    epochs = f"{steps / updates:.3g}"
    tokens = round(batches.tokens() * steps / updates)
    return [
        ("data", f"{counted(run.count(), run.unit)}, {train.tokens:,} tokens, {train.trained_tokens:,} of them "
                 f"trained{valid}"),
        ("batches", f"{counted(run.batch_size, 'row')} of {run.row_length:,} tokens{processes}, {batches.fill():.0%} "
                    f"full, {settings.accumulate} to an update"),
    ], f"{steps:,}, {epochs} {'epoch' if epochs == '1' else 'epochs'}, {tokens:,} tokens"  # fmt: skip


def _answers(run: Reinforcement) -> tuple[list[tuple[str, str]], str]:
    """Returns what answers are trained on, as labels and texts, and how many updates."""
    asked, levels = run.asked.examples, run.difficulties
    of = f"difficulty {levels[0]}" if len(levels) == 1 else f"difficulties {levels[0]} to {levels[-1]}"
    most = f"{counted(asked.answers, 'answer')} to each, of {counted(asked.max_tokens, 'token')} at most"
    repeats = f", {asked.updates_per_batch} by the same answers" if asked.updates_per_batch > 1 else ""
    return [
        ("task", f"{run.task.name}, {of}; {counted(len(run.held_out), 'held-out problem')} to validate"),
        ("answers", f"{counted(asked.problems, 'problem')} at a time, {most}; {run.batch_size} in a batch"),
    ], f"{run.settings.schedule.total:,}{repeats}"


def mixed(split: Prepared, draws: Draws | None) -> list[tuple[str, str]]:
    """Returns what an epoch has of each source, as labels and texts, where weights say it."""
    if draws is None:
        return []
    sums = zip(split.parts, draws.totals, draws.wanted, strict=True)
    return [
        ("mixture", f"{name}: {total:,} tokens, {wanted / sum(draws.wanted):.1%} of an epoch, "
                    f"which has them {'once' if (times := f'{wanted / total:.3g}') == '1' else f'{times} times'}")
        for (name, _), total, wanted in sums
    ]  # fmt: skip


def needed(load: Load) -> str:
    """Returns how much memory a run takes, and how much there is."""
    from elm_mlx import device
    from elm_mlx.train import memory

    free = device.available_memory()
    return f"about {byte_size(memory.estimate(load).total)}" + (
        "" if free is None else f", of {byte_size(free)} that are free"
    )


def harmed(result: Result, rate: str, asked: bool = False) -> str:
    """Returns a warning where training made the model worse, with the learning rate's option; `asked` as in `ended`."""
    assert result.harm is not None
    now, before = result.harm
    helps = f"a lower {rate} or other data may help"
    if asked:
        return (
            f"no validation had more right answers than the {1 - before:.1%} before training, and the last one had "
            f"{1 - now:.1%}: do not use it; a lower {rate}, more updates or other difficulties may help"
        )
    if result.progress.valid_loss is None:
        return f"the training loss rose from {before:.4f}, of the first update, to {now:.4f}: do not use it; {helps}"
    return (
        f"no validation loss was below the {before:.4f} before training, the last is {now:.4f}: do not use it; {helps}"
    )


def ended(result: Result, validated: bool, asked: bool = False) -> list[tuple[str, str]]:
    """Returns how a run ended, as labels and texts; `asked` where validations ask the model, and losses are errors."""
    done = result.progress
    took = duration(done.seconds) + (" and validations" if validated else "")
    lines = [("done", f"{counted(done.step, 'update')}, {counted(done.tokens, 'token')}, {took}")]
    if result.interrupted:
        lines = [("stopped", f"after {counted(done.step, 'update')}; --resume goes on from {result.last}")]
    if result.early:
        better = "more right answers" if asked else "a lower loss"
        reason = f"{counted(done.worse, 'validation')} in a row without {better}"
        lines = [("ended", f"early, after {counted(done.step, 'update')}: {reason}; more --patience goes on")]
    if done.skipped:
        lines.append(("skipped", counted(done.skipped, "update")))
    if done.best_step and done.best_loss is not None:
        best = f"validation loss {done.best_loss:.4f}"
        if asked:
            best = f"{1 - done.best_loss:.1%} of the answers to held-out problems right"
        lines.append(("best", f"{best}, after {counted(done.best_step, 'update')}"))
    if result.test is not None:
        loss, measures = result.test.test_loss, result.test.measures
        assert loss is not None
        more = shown_measures(measures) if measures else [f"perplexity {math.exp(min(loss, 700)):.4g}"]
        lines.append(("test", ", ".join([f"loss {loss:.4f}", *more])))
    return lines


def texts_planned(run: TextTraining[Any], recipe: TextRecipe, tokenizer: str) -> list[tuple[str, str]]:
    """Returns what a run on raw text is about to do, as labels and texts."""
    steps, tokens, optimizer = run.settings.schedule.total, run.tokens_per_update, recipe.optimizer
    processes = f" in each of {run.world} processes" if run.world > 1 else ""
    sources = ", ".join(source.name for source in recipe.data.sources)
    asked, rising = optimizer.warmup, optimizer.warmup_steps()
    unfit = "" if asked in (None, rising) else f": the recipe's {asked:,} do not fit into {steps:,}"
    return [
        ("data", f"{sources}; tokenized by {tokenizer}"),
        ("batches", f"{counted(recipe.run.batch_size, 'row')} of {recipe.data.sequence_length:,} tokens{processes}, "
                    f"{recipe.run.accumulate} to an update"),
        ("updates", f"{steps:,} of {tokens:,} tokens, {steps * tokens:,} in all, "
                    f"{steps * tokens / run.trainable:.1f} a parameter"),
        ("warm-up", f"{counted(rising, 'update')} of rising learning rate{unfit}"),
        ("memory", needed(run.load())),
    ]  # fmt: skip


def texts_read(run: TextTraining[Any], result: Result) -> list[tuple[str, str]]:
    """Returns what a run on raw text has read of its sources, as labels and texts."""
    if not run.batches.under_way:
        return []
    lines = []
    for source, counts in zip(run.sources, run.batches.counts(), strict=True):
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in counts.dropped.items() if number)
        kept = f"{counts.kept:,} of {counted(counts.read, 'document')} kept"
        kept += f", {counts.tokens:,} tokens, epoch {counts.epoch + 1}"
        lines.append(("read", f"{source.name}: {kept}" + (f"; dropped {dropped}" if dropped else "")))
    return [*lines, ("trained", f"on {result.progress.tokens // run.world:,} of these tokens")]
