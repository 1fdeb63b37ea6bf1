"""A command as its options and arguments are read: what goes for all of them.

Knows the command line's grammar: `-h`, and `--model MODEL` wherever MODEL is the first argument, for that is what
fingers type who know other programs. Knows nothing of what options mean.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import islice
from typing import Any

import typer.core

from elm_mlx import reading
from elm_mlx.errors import InputError

HELP = {"help_option_names": ["-h", "--help"]}


class Command(typer.core.TyperCommand):
    """Takes `--model MODEL` in place of its first argument, and `~` in every path."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.context_settings = {**HELP, **(self.context_settings or {})}
        first: Any = next((each for each in self.params if each.param_type_name == "argument"), None)
        self._takes_model = first is not None and "MODEL" in (first.metavar or "")
        if self._takes_model:
            named = typer.core.TyperOption(
                param_decls=["--model", "model_by_name"], type=str, metavar="MODEL", expose_value=False,
                help="MODEL, by name in place of the first argument. (default: that)",
            )  # fmt: skip
            self.params.append(named)
        for parameter in self.params:
            each: Any = parameter
            if each.type.name == "path":
                _expand(each.type)
            if not getattr(each, "is_flag", True) and each.default is None and "default" not in each.help:
                each.help += " (default: none)"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._model_first(args) if self._takes_model else args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, legible(formatter))

    def _model_first(self, args: list[str]) -> list[str]:
        """The words of a command line, with the value of `--model` in front of them."""
        valued = {name for each in self.params if not getattr(each, "is_flag", True) for name in each.opts}
        named: list[str] = []
        rest: list[str] = []
        words = iter(args)
        for word in words:
            name, equals, value = word.partition("=")
            if name == "--model" and not equals:
                value = next(words, "")
            if name == "--model":
                named.append(value)
                continue
            rest.append(word)
            if word in valued:
                rest += islice(words, 1)
            elif word == "--":
                rest += words
        if len(named) > 1 or "" in named:
            raise InputError("--model is given twice" if len(named) > 1 else "--model needs a directory")
        return [*named, *rest]


def legible(formatter: Any) -> Any:
    """Has help, of typer's formatter, break between words alone: never within `mlx-lm` or `--max-tokens`."""

    def wrapped(text: str, column: int) -> list[str]:
        width = formatter.width - column
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def write_text(text: str) -> None:
        for line in wrapped(text, formatter.current_indent):
            formatter.write(" " * formatter.current_indent + line + "\n")

    def write_dl(rows: Sequence[tuple[str, str]]) -> None:
        most = min(30, formatter.width // 3)
        column = formatter.current_indent + 2 + max(min(len(term), most) for term, _ in rows)
        for term, text in rows:
            first, *rest = wrapped(text, column) or [""]
            start = " " * formatter.current_indent + term
            formatter.write(f"{start:<{column}}" if len(start) + 2 <= column else f"{start}\n{'':<{column}}")
            formatter.write(f"\n{'':<{column}}".join([first, *rest]) + "\n")

    formatter.write_text, formatter.write_dl = write_text, write_dl
    return formatter


def _expand(kind: Any) -> None:
    """Let a parameter's type of a path take `~`, which the shell leaves alone within quotes, after `=` and in files."""
    convert = kind.convert
    kind.convert = lambda value, parameter, context: convert(str(reading.expanded(value)), parameter, context)
