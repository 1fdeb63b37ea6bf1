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

from elm_mlx import json_files, reading
from elm_mlx.cli.command import Command
from elm_mlx.errors import InputError

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
        if config is not None:
            self._fill(ctx, open_, _read(Path(config), self._names()), str(config))
        if ctx.params.get("resume") and ctx.params.get("out") is not None:
            from elm_mlx.train.metrics import ABOUT

            path = Path(ctx.params["out"]) / ABOUT
            self._fill(ctx, open_, _settings(path, self._names()), str(path))
        recipe = ctx.params.get("recipe")
        if recipe is not None:
            if recipe not in self.recipes:
                raise InputError(f"--recipe {recipe}: there is no such; there are {', '.join(self.recipes)}")
            self._fill(ctx, open_, self.recipes[recipe], f"recipe {recipe}")
        return left

    def _names(self) -> list[str]:
        return [each.name for each in self.params if each.expose_value and each.name and each.name not in _NEVER]

    def _fill(self, ctx: Any, open_: dict[str, Any], values: Mapping[str, Any], where: str) -> None:
        """Take from `values` what is still open."""
        for name, value in values.items():
            if value is None or name not in open_:
                continue
            parameter = open_.pop(name)
            try:
                ctx.params[name] = parameter.type_cast_value(ctx, _as_written(value))
            except typer.BadParameter as error:
                raise InputError(f"{where}: {name}: {error.message}") from None
            except TypeError:
                raise InputError(f"{where}: {name}: {value!r} is no value for it") from None


def settings(ctx: typer.Context) -> dict[str, Any]:
    """The options that the command runs with, as JSON's types; a file for `--config` may hold them."""
    return {name: value for name, value in ctx.params.items() if name not in _NEVER and value is not None}


def _given(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _read(path: Path, names: list[str]) -> dict[str, Any]:
    """The options in a YAML or JSON file, by parameter. Raises InputError."""
    values = reading.yaml_mapping(path)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; the nearest is {near[0]}" if near else f"; there are {', '.join(sorted(names))}"
            raise InputError(f"{path}: {key} is no option{hint}")
        found[name] = value
    return found


def _settings(path: Path, names: list[str]) -> dict[str, Any]:
    """What the run in whose directory `path` is was started with; nothing where it doesn't say."""
    values = json_files.read_object(path).get("settings") if path.exists() else {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: does not say what the run was started with")
    return {name: value for name, value in values.items() if name in names}


def _as_written(value: Any) -> Any:
    """A value as the command line would have it: a table of numbers as `a=1,b=2`, a list of them as `1,2`."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number}" for name, number in value.items())
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return ",".join(map(str, value))
    return value
