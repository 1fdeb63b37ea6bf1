"""The command line: one file a command; parse, call one function, print. No logic.

A command's file is imported when the command is asked for, and what it needs of MLX when it runs, so that `--help`
and errors come at once, and no command's start waits for the options of the others.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from elm_mlx.cli import screen
from elm_mlx.cli.screen import note, silence
from elm_mlx.errors import ElmError, InputError
from elm_mlx.reading import expanded
from elm_mlx.version import __version__

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

# In each command's file is a function of that name, and where it has many options `PANELS`: names under headings.
_GROUPS = {
    "Models": ("convert", "export", "info", "quantize", "fuse", "adapter", "models"),
    "Talk": ("generate", "chat", "serve", "index"),
    "Train": (
        "data", "lora", "dpo", "grpo", "synthesize", "pretrain", "lr-sweep", "kvp", "report", "average",
        "train-tokenizer",
    ),
    "Measure": ("eval", "bench"),
}  # fmt: skip
# Arguments that an option gives too, for it does so in other commands.
_BY_NAME = {"MODEL": "--model", "ADAPTER": "--adapter", "CONFIG": "--config"}
_REVISION = "--revision"  # of MODEL, where it is a repository's name: as MODEL@REVISION
_COMMANDS = tuple(name for names in _GROUPS.values() for name in names)


class Command(typer.core.TyperCommand):
    """Takes the arguments in `_BY_NAME` by an option too, and `~` in every path."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.context_settings = {**HELP, **(self.context_settings or {})}
        placed: list[Any] = [each for each in self.params if each.param_type_name == "argument"]
        words = [(each.metavar or "").strip("[]…") for each in placed]
        self._by_name = {_BY_NAME[word]: place for place, word in enumerate(words) if word in _BY_NAME}
        self._several = {option for option, place in self._by_name.items() if placed[place].nargs == -1}
        for option, place in self._by_name.items():
            named = typer.core.TyperOption(
                param_decls=[option, f"{option[2:]}_by_name"], type=str, metavar=words[place], expose_value=False,
                help=f"{words[place]}, by name. (default: the {('first', 'second')[place]} argument)",
            )  # fmt: skip
            self.params.append(named)
        if "--model" in self._by_name and not self._several:
            self.params.append(
                typer.core.TyperOption(
                    param_decls=[_REVISION, "revision_of_model"], type=str, expose_value=False,
                    help="Branch, tag or commit of a MODEL on the hub. (default: main)",
                )
            )  # fmt: skip
        for parameter in self.params:
            each: Any = parameter
            if each.type.name == "path":
                _expand(each.type)
            if (
                not getattr(each, "is_flag", True)
                and not each.required
                and each.default is None
                and "default" not in each.help
            ):
                each.help += " (default: none)"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._in_place(args) if self._by_name else args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, _legible(formatter))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments, options, and the options of each panel under its heading."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            row, each = parameter.get_help_record(ctx), parameter
            if row is not None:
                term, text = row[0].replace(" range>", ">"), re.sub(r" \[([^\[\]]+)\]$", r" (\1)", row[1])
                text = re.sub(r"(\d+)<=x<=(\d+)", r"from \1 to \2", text).replace("x>=", "at least ")
                usual = "Arguments" if each.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(each, "rich_help_panel", None) or usual, []).append((term, text))
        _write_sections(formatter, sections)

    def _in_place(self, args: list[str]) -> list[str]:
        """Returns the words of a command line with what options of `_BY_NAME` say where the arguments stand."""
        valued = {name for each in self.params if not getattr(each, "is_flag", True) for name in each.opts}
        by_name = {*self._by_name, *(_REVISION for each in self.params if each.name == "revision_of_model")}
        named: dict[str, list[str]] = {}
        options: list[str] = []
        placed: list[str] = []
        words = iter(args)
        for word in words:
            name, equals, value = word.partition("=")
            if name in by_name:
                value = value if equals else next(words, "")
                twice = name in named and name not in self._several
                if twice or not value:
                    needs = "a revision" if name == _REVISION else "a path"
                    raise InputError(f"{name} is given twice" if twice else f"{name} needs {needs}")
                named.setdefault(name, []).append(value)
            elif word == "--":
                placed += words
            elif word.startswith("-") and word != "-":
                options += [word, *islice(words, word in valued)]
            else:
                placed.append(word)
        for name, place in self._by_name.items():
            if name in named and place <= len(placed):  # else one before it is missing, which is said
                placed[place:place] = named[name]
        for revision in named.get(_REVISION, ()):
            self._revise(placed, revision)
        return [*options, "--", *placed] if "--" in args else [*placed, *options]

    def _revise(self, placed: list[str], revision: str) -> None:
        """Puts the revision behind the MODEL among the arguments."""
        place = self._by_name["--model"]
        if len(placed) <= place:
            raise InputError(f"{_REVISION} {revision}: MODEL is missing; in a file, it is OWNER/NAME@REVISION")
        if expanded(placed[place]).exists():
            raise InputError(f"{_REVISION} {revision} is for a repository on the hub, but {placed[place]} is a path")
        if "@" in placed[place]:
            raise InputError(f"{_REVISION} {revision}: {placed[place]} names a revision already; give one of them")
        name, colon, file = placed[place].partition(":")
        placed[place] = f"{name}@{revision}{colon}{file}"


def _legible(formatter: Any) -> Any:
    """Makes typer's formatter break lines between words alone: never within `mlx-lm` or `--max-tokens`."""

    def write_text(text: str) -> None:
        for line in _wrapped(text, formatter.width - formatter.current_indent):
            formatter.write(" " * formatter.current_indent + line + "\n")

    formatter.write_text = write_text
    return formatter


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def _write_sections(formatter: Any, sections: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Writes rows of a term and a text under headings; all texts begin in one column."""
    terms = [term for rows in sections.values() for term, _ in rows]
    column = 4 + max(min(len(term), 30, formatter.width // 3) for term in terms)
    for heading, rows in sections.items():
        if not rows:
            continue
        formatter.write(f"\n{heading}:\n")
        for term, text in rows:
            lines = _wrapped(term.replace("|", "| "), formatter.width - 4)  # many choices take several lines
            start = "\n    ".join(line.replace("| ", "|") for line in lines)
            start = f"{start:<{column - 2}}" if len(start) + 4 <= column else f"{start}\n{'':<{column}}"
            formatter.write(f"  {start}" + f"\n{'':<{column}}".join(_wrapped(text, formatter.width - column)) + "\n")


def _expand(kind: Any) -> None:
    """Makes a path's type take `~`, which the shell leaves alone within quotes, after `=` and in files."""
    convert = kind.convert
    kind.convert = lambda value, parameter, context: convert(str(expanded(value)), parameter, context)


class _Commands(Mapping[str, Any]):
    """The commands by name, each made when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        if name not in _COMMANDS:
            raise KeyError(name)
        file = name.replace("-", "_")
        module = import_module(f"elm_mlx.cli.{file}")
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name, cls=Command)(getattr(module, file))
        command = typer.main.get_command(alone)
        panels = {each: panel for panel, names in getattr(module, "PANELS", {}).items() for each in names}
        for each in command.params:
            if each.name in panels:
                each.rich_help_panel = panels[each.name]  # type: ignore[attr-defined]
        order = list(panels)
        command.params.sort(key=lambda each: order.index(each.name) + 1 if each.name in panels else 0)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


class _Group(typer.core.TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()  # type: ignore[assignment]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, _legible(formatter))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the options, and each group of commands under its heading."""
        options = [row for each in self.get_params(ctx) if (row := each.get_help_record(ctx)) is not None]
        groups = {group: [(name, self.commands[name].help or "") for name in names] for group, names in _GROUPS.items()}
        _write_sections(formatter, {"Options": options, **groups})


app = typer.Typer(
    name="elm-mlx",
    cls=_Group,
    help="Own a small language model: convert, talk to, fine-tune and measure Apple's OpenELM with MLX.",
    invoke_without_command=True,
    context_settings=HELP,
    rich_markup_mode=None,  # its boxes cut options off where a terminal is narrow
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"elm-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    global _debug
    _debug = debug
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)


_debug = False
_DEBUG = "elm-mlx --debug … shows where"
_ClickError: Any = typer.BadParameter.__mro__[2]  # which has no name of its own in all of typer's versions


def main() -> None:
    """Runs the command line. An error is one line on stderr; 2 is the exit code of bad input, 1 of any other.

    Until then and afterwards `elm_mlx` lets Ctrl-C end the command's process without a word: not in a traceback of
    threads that are waited for.
    """
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        _prepare_streams()
        code = _run()
    except (KeyboardInterrupt, typer.Abort):
        silence(sys.stdout)
        code = 130
    except Exception as error:
        if _debug:
            raise
        code = 1
        with suppress(OSError):  # stderr is gone too
            code = _report(error)
    finally:
        signal.signal(signal.SIGINT, before)
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; while an extension is imported, which may abort at one, the process ends instead."""
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "ExtensionFileLoader":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        frame = frame.f_back
    raise KeyboardInterrupt


def _run() -> int:
    try:
        code = app(prog_name="elm-mlx", standalone_mode=False)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # of which typer makes an error
            raise end.__context__ from None
        code = end.code
    sys.stdout.flush()  # here, where an error of it is reported
    if screen.reader_left and not code:
        raise BrokenPipeError
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    """Prints an error as a line on stderr. Returns the exit code."""
    if isinstance(error, OSError):  # of a stream, or a file that nobody thought of
        silence(sys.stdout)  # or the exit would flush to it again
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        note(f"{error.filename or 'reading or writing'}: {error.strerror or error}")
    elif isinstance(error, ElmError):
        note(error)
    elif isinstance(error, _ClickError):
        note(_usage(error))
    elif isinstance(error, MemoryError):  # MLX's std::bad_alloc too, which says no more
        note(f"out of memory; a smaller model, batch or context needs less ({_DEBUG})")
    elif _is_of_mlx(error):
        note(f"MLX failed: {error} ({_DEBUG})")
    else:
        note(f"a bug in elm-mlx: {type(error).__name__}: {error} ({_DEBUG})")
    return getattr(error, "exit_code", 1)


def _is_of_mlx(error: Exception) -> bool:
    """Returns whether MLX raised it: RuntimeError, or ValueError with a function's name in front, as "[matmul] …"."""
    if isinstance(error, ValueError):
        return re.match(r"\[\w+(::\w+)*\]", str(error)) is not None
    return isinstance(error, RuntimeError) and not isinstance(error, RecursionError)


def _usage(error: Any) -> str:
    """Returns what is wrong with a command line, and the command that shows what is right."""
    context = getattr(error, "ctx", None)
    help_ = f"{context.command_path if context else 'elm-mlx'} -h shows what there is"
    if context is not None and hasattr(error, "possibilities"):  # no such option
        known = [name for each in context.command.params for name in (*each.opts, *each.secondary_opts)]
        near = difflib.get_close_matches(error.option_name, [name for name in known if name.startswith("--")], 1)
        return f"no such option: {error.option_name}" + (f"; did you mean {near[0]}?" if near else "") + f"; {help_}"
    choices = getattr(getattr(getattr(error, "param", None), "type", None), "choices", None)
    if choices:
        value = error.message.partition("' is not ")[0].removeprefix("'")
        return f"{error.param.opts[0]} {value}: is not one of {', '.join(choices)}; {help_}"
    text = " ".join(error.format_message().split()).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; {help_}"


def _prepare_streams() -> None:
    """Opens closed streams on nothing, or the next file would get their numbers; stdout shows `?` for what it lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
