"""`elm-mlx export MODEL DST`: a model becomes a GGUF file for llama.cpp, or a PyTorch checkpoint again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import ProgressBar, byte_size, say, say_all
from elm_mlx.reading import quoted

if TYPE_CHECKING:
    from elm_mlx_convert import GgufExport

PANELS = {"GGUF": ("type_", "adapter", "modelfile", "verify"), "PyTorch": ("dtype",)}


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or what `convert` reads.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A file NAME.gguf, or the directory to make.")],
    type_: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0", "as-stored"] | None,
        typer.Option(
            "--type", help="Type of the matrices. (default: as-stored, which rounds nothing that GGUF has a type for)"
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write this LoRA adapter for the model's GGUF file, and no model."),
    ] = None,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Write Ollama's Modelfile beside DST too.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read both sides back, and compare every value.")] = False,
    dtype: options.WeightDType = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file at NAME.gguf, or an export at DST.")
    ] = False,
) -> None:
    """Write a model as a GGUF file, for llama.cpp, Ollama and LM Studio; or as CoreNet's PyTorch checkpoint."""
    from elm_mlx.errors import InputError

    gguf = {"--type": type_, "--adapter": adapter, "--modelfile": modelfile, "--verify": verify}
    if dst.suffix.lower() != ".gguf":
        odd = next((name for name, value in gguf.items() if value), None)
        if odd is not None:
            raise InputError(f"{odd} is for a GGUF file, and {dst} does not end with .gguf")
        _write_checkpoint(model, dst, dtype, overwrite)
        return
    if dtype is not None:
        raise InputError("--dtype is for a PyTorch checkpoint; a GGUF file's type is --type")
    if adapter is not None:
        odd = next((name for name in ("--type", "--modelfile", "--verify") if gguf[name]), None)
        if odd is not None:
            raise InputError(f"{odd} is for a model, and --adapter writes an adapter alone, in float32")
        _write_adapter(options.directory_of(Path(model)), adapter, dst, overwrite)
        return
    import elm_mlx_convert
    from elm_mlx.store.model_names import name_of

    source = options.directory_of(Path(model))
    name = name_of(source).rpartition("/")[2] if source.is_dir() else None
    with ProgressBar("bytes") as progress:
        done = elm_mlx_convert.export_gguf(
            source, dst, kind=type_ or "as-stored", name=name, modelfile=modelfile, verify=verify, overwrite=overwrite,
            on_progress=progress,
        )  # fmt: skip
    _print_gguf(done)


def _write_checkpoint(model: str, dst: Path, dtype: str | None, overwrite: bool) -> None:
    import elm_mlx_convert

    plan = elm_mlx_convert.export(model, dst, dtype=dtype, overwrite=overwrite)
    for name, lines in (("note", plan.notes), ("warning", plan.warnings)):
        for line in lines:
            say(name, line)
    say("wrote", f"{dst}: {plan.parameters:,} parameters in {plan.dtype}, {byte_size(plan.nbytes)}")


def _write_adapter(model: Path, adapter: Path, dst: Path, overwrite: bool) -> None:
    from elm_mlx.store.adapter_conversion import export_adapter

    made = export_adapter(model, adapter, dst, overwrite=overwrite)
    say("wrote", f"{dst}: {made.describe()}, {byte_size(dst.stat().st_size)}")


def _print_gguf(done: GgufExport) -> None:
    for each in done.roundings:
        say(
            "rounded",
            f"{each.values:,} values from {each.before} to {each.after}: largest difference {each.largest:.3g}, mean "
            f"{each.total / each.values:.3g} (largest value {each.magnitude:.3g})",
        )
    say_all([("note", note) for note in done.notes])
    if done.verified is not None:
        what = "" if done.verified.largest else ", each the same"
        say("verified", f"{done.verified.values:,} values{what}")
    kinds = " and ".join(done.types)
    same = "" if done.roundings else ", nothing rounded"
    say("wrote", f"{done.path}: {done.parameters:,} parameters in {kinds}{same}, {byte_size(done.nbytes)}")
    if done.modelfile is not None:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", done.path.stem).lstrip("-.") or "model"  # as Ollama wants names
        say("wrote", f"{done.modelfile}: ollama create {name} -f {quoted(done.modelfile)}")
