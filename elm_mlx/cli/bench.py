"""`elm-mlx bench`: how fast models run here, beside others and beside what the machine could do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elm_mlx.bench import suites
from elm_mlx.bench.suites import SIDES
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.cli import options, screen
from elm_mlx.cli.screen import folded, line, printable, say, table
from elm_mlx.errors import InputError
from elm_mlx.model.config import PRESETS

if TYPE_CHECKING:
    from elm_mlx.bench.results import Results, Row
    from elm_mlx.bench.sides import Programs
    from elm_mlx.bench.suites import Suite

PANELS = {
    "Cases": (
        "suite",
        "precision",
        "prompt_tokens",
        "new_tokens",
        "batch_size",
        "kv_bits",
        "kvp",
        "repeats",
        "compute_dtype",
    ),
    "Other programs": ("against", "python", "gguf"),
}


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL…]", help="Presets (OpenELM-270M, …), model directories, or OWNER/NAME on the hub."
        ),
    ] = None,
    suite: Annotated[Literal["quick", "m2max", "full"], typer.Option(help="The cases to measure.")] = "quick",
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory of SUITE.json, .md and .html.")] = Path(
        "bench"
    ),
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precisions of presets, with commas: bfloat16, float16, float32, 8bit, 4bit, …. (default: the suite's)"
        ),
    ] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens, with commas. (default: the suite's)")
    ] = None,
    new_tokens: Annotated[
        str | None,
        typer.Option(help="Tokens to generate, with commas; one for all, or one each. (default: the suite's)"),
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="Prompts at once, with commas. (default: the suite's)")] = None,
    kv_bits: Annotated[
        str | None, typer.Option(help="Bits of keys and values, with commas: none, 8, 4. (default: none)")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help=f"What to compare with, with commas: {', '.join([*SIDES][1:])}; or none. (default: the suite's)"
        ),
    ] = None,
    kvp: options.KvpPath = None,
    repeats: Annotated[
        int | None, typer.Option(help="Measurements of each program in each case. (default: the suite's)")
    ] = None,
    compute_dtype: options.ComputeDtype = None,
    python: Annotated[
        str | None, typer.Option(help="A Python that has PyTorch and llama-cpp-python. (default: this one)")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="The same model as GGUF, for llama.cpp. (default: written, as `export` does)")
    ] = None,
    note: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="What a reader should know of the machine, kept with the results. (default: nothing)"
        ),
    ] = "",
) -> None:
    """Measure prompt and generation speed, time to the first token and memory; Ctrl-C keeps what there is, and the same
    command goes on."""
    named = [each if each in PRESETS else str(options.directory_of(Path(each))) for each in models or []]
    chosen = suites.change(
        suites.SUITES[suite], models=named, precisions=_words(precision),
        prompts=_numbers("--prompt-tokens", prompt_tokens), new=_numbers("--new-tokens", new_tokens),
        batches=_numbers("--batch-size", batch_size),
        kv_bits=[number for word in _words(kv_bits or "none") for number in _bits(word)],
    )  # fmt: skip
    if against is not None:
        chosen = replace(chosen, against=tuple(side for side in _words(against) if side != "none"))
    if kvp is not None:
        chosen = replace(chosen, against=tuple(dict.fromkeys(("kvp", *chosen.against))))
    if repeats is not None:
        chosen = replace(chosen, repeats=repeats)
    if compute_dtype is not None:
        chosen = replace(chosen, compute_dtype=compute_dtype)
    from elm_mlx.bench.results import schema_faults
    from elm_mlx.bench.sides import Programs

    results = _measured(suites.check(chosen), out, Programs(python, gguf, kvp), note)
    if results.measured or results.complete:  # which it is too where every case was left out, with its reason
        _print(results)
    if results.measured:
        line(f"wrote {out / suite}.json, .md and .html")
        for fault in schema_faults(out / f"{suite}.json"):
            screen.note(f"{out / suite}.json does not fit the schema of results that are shared: {fault}")
    else:
        line("nothing was measured, and nothing written")
    if not results.complete:
        raise typer.Exit(130)


def _measured(suite: Suite, out: Path, programs: Programs, note: str) -> Results:
    from elm_mlx import files
    from elm_mlx.bench import runner, tables

    with _shown() as (progress, row):
        results = runner.run(
            suite,
            programs,
            out / f"{suite.name}.json",
            note=note,
            on_note=screen.note,
            on_progress=progress,
            on_row=row,
        )
    if not results.measured:
        return results
    files.write_text(out / f"{suite.name}.md", f"# {suite.name}\n\n{tables.markdown(results)}")
    files.write_text(out / f"{suite.name}.html", tables.page(results))
    return results


@contextmanager
def _shown() -> Iterator[tuple[OnProgress, Callable[[Row], None]]]:
    """Yields the callbacks that show, on a terminal, what is being measured, and each case when it is done."""
    from rich.console import Console

    console = Console(stderr=True)

    def row(row: Row) -> None:
        reason = row.skipped.get("ours")
        prompt, decode = (row.spread("ours", figure) for figure in ("prompt", "decode"))
        speeds = [f"{each.median:,.0f} {name} tokens/s" for name, each in (("prompt", prompt), ("new", decode)) if each]
        text = printable(f"{row.case}: {reason or ', '.join(speeds)}")
        text = folded(text, 2) if sys.stderr.isatty() else text
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if not sys.stderr.isatty():
        yield no_progress, row
        return
    with console.status("starting") as status:

        def show(what: str, done: int = 0, total: int = 0, /) -> None:
            status.update(printable(what).replace("[", "\\["))

        yield show, row


def _print(results: Results) -> None:
    from elm_mlx.bench import tables

    about = tables.machine(results)[1]
    for label, text in about:
        say(label, text, 2 + max(len(label) for label, _ in about))
    print()
    for row in results.rows:
        if row.figures:
            line(f"{tables.short(row.case)}, {row.case.precision}, tokens {tables.tokens(row.case)}")
            table(*tables.brief(row, results.speeds))
            line(tables.likeness(row))
            print()
    headers, norms = tables.norms(results)
    if norms:
        table(headers, norms, left=(0, 1))
        print()
    for reason in tables.left_out(results):
        line(reason)


def _words(text: str | None) -> list[str]:
    return [] if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _bits(word: str) -> Sequence[int | None]:
    return [None] if word == "none" else _numbers("--kv-bits", word)


def _numbers(flag: str, text: str | None) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise InputError(f"{flag} {text}: needs whole numbers, with commas between them") from None
