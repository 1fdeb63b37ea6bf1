"""A command whose options can also come from a file, under the same names.

Knows which of several sources an option is taken from: the command line, then `--config`, then what a resumed run
was started with, then a recipe, then the default. Knows nothing of what options mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import typer

from elm_mlx import reading
from elm_mlx.cli import mlx_lm_settings
from elm_mlx.cli.command import Command
from elm_mlx.errors import InputError
from elm_mlx.train import toml_tables

_KINDS = {"boolean": bool, "bool": bool, "integer": int, "int": int, "float": float}  # by the names of types' parsers
_NEVER = {"config", "resume", "force", "recipe", "help"}  # of no sense in a file


class Configured(Command):
    """Fills in what the command line leaves open. What stands here is set by the command's module.

    Attributes:
        recipes: options by name, of each recipe.
        decides: an option on the command line, and one that would overrule it, which is then taken from nowhere else.
    """

    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    decides: ClassVar[Mapping[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        left: list[str] = super().parse_args(ctx, args)
        open_ = {each.name: each for each in self.params if each.name and not _given(ctx, each.name)}
        for name, other in self.decides.items():
            if name not in open_:
                open_.pop(other, None)
        config = ctx.params.get("config")
        scale = None
        if config is not None:
            values = _read(Path(config), self._names(), self._short())
            scale = values.pop(mlx_lm_settings.SCALE, None) if "alpha" in open_ else None
            if scale is not None:
                del open_["alpha"]
            self._fill(ctx, open_, values, str(config))
        if ctx.params.get("resume") and ctx.params.get("out") is not None:
            from elm_mlx.train.metrics import ABOUT

            path = Path(ctx.params["out"]) / ABOUT
            self._fill(ctx, open_, _settings(path, self._names()), str(path))
        recipe = ctx.params.get("recipe")
        if recipe is not None:
            if recipe not in self.recipes:
                raise InputError(f"--recipe {recipe}: there is no such; there are {', '.join(self.recipes)}")
            self._fill(ctx, open_, self.recipes[recipe], f"recipe {recipe}")
        if scale is not None:  # of the rank, which may stand anywhere
            ctx.params["alpha"] = mlx_lm_settings.alpha(scale, ctx.params["rank"], ctx.params["rslora"])
        return left

    def _names(self) -> list[str]:
        return [each.name for each in self.params if each.expose_value and each.name and each.name not in _NEVER]

    def _short(self) -> dict[str, str]:
        """Other names of options, as `lr`."""
        spelt = {opt.lstrip("-").replace("-", "_"): each.name for each in self.params for opt in each.opts}
        return {spelling: name for spelling, name in spelt.items() if name in self._names() and spelling != name}

    def _fill(self, ctx: Any, open_: dict[str, Any], values: Mapping[str, Any], where: str) -> None:
        """Take from `values` what is still open."""
        for name, value in values.items():
            if value is None or name not in open_:
                continue
            parameter = open_.pop(name)
            try:
                ctx.params[name] = parameter.type_cast_value(ctx, _written(parameter, value))
            except typer.BadParameter as error:
                raise InputError(f"{where}: {name}: {error.message}") from None
            except ValueError as error:
                raise InputError(f"{where}: {name} {error}") from None


def settings(ctx: typer.Context) -> dict[str, Any]:
    """The options that the command runs with, as JSON's types; a file for `--config` may hold them."""
    return {name: value for name, value in ctx.params.items() if name not in _NEVER and value is not None}


def _given(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _read(path: Path, names: list[str], short: Mapping[str, str]) -> dict[str, Any]:
    """The options in a YAML or JSON file, by parameter, and mlx-lm's scale. Raises InputError."""
    values: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        name = str(key).replace("-", "_")
        name = short.get(name, name)
        if name in values:
            raise InputError(f"{path}: {key} stands twice, in two spellings")
        values[name] = value
    try:
        found = mlx_lm_settings.translated(values)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    for name, value in found.items():
        if value == []:
            raise InputError(f"{path}: {name} is an empty list: leave it out, or write what is meant")
        if name not in (*names, mlx_lm_settings.SCALE):
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; the nearest is {near[0]}" if near else f"; there are {', '.join(sorted(names))}"
            raise InputError(f"{path}: {name} is no option{hint}")
    return found


def _mapping(path: Path) -> dict[Any, Any]:
    """YAML takes JSON, but for tabs. Raises InputError."""
    if path.suffix.lower() != ".json":
        return reading.yaml_mapping(path)
    try:
        values = reading.load_json(reading.text(path, reading.TABLES_BYTES), reading.JSON_RECORDS)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object")
    return values


def _settings(path: Path, names: list[str]) -> dict[str, Any]:
    """What the run in whose directory `path` is was started with; nothing where it doesn't say."""
    values = reading.json_object(path).get("settings") if path.exists() else {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: does not say what the run was started with")
    return {name: value for name, value in values.items() if name in names}


def _written(parameter: Any, value: Any) -> Any:
    """A value as the command line would have it: a table of numbers as `a=1,b=2`, a list of them as `1,2`.

    Raises:
        ValueError: it is of another kind than the option's; the text goes on after its name.
    """
    if parameter.multiple:
        return [toml_tables.scalar(str, each) for each in (value if isinstance(value, list) else [value])]
    kind = _KINDS.get(parameter.type.name, str)
    if parameter.name == "rank" and isinstance(value, (Mapping, list)):
        return _ranks(value)
    if kind is str and type(value) in (int, float):  # a name may be a number: rank 8, a directory 2026
        return str(int(value) if value == value // 1 else value)
    return toml_tables.scalar(kind, value)


def _ranks(value: Mapping[Any, Any] | list[Any]) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name}={toml_tables.scalar(int, number)}" for name, number in value.items())
    return ",".join(str(toml_tables.scalar(int, number)) for number in value)
