"""`elm-mlx convert SRC DST`: a checkpoint becomes an MLX model directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import ProgressBar, byte_size, counted, say, say_all

if TYPE_CHECKING:
    from elm_mlx_convert import Conversion, ConversionPlan, GgufPlan

PANELS = {
    "Model": ("config", "preset", "head_dim", "lora_alpha", "ema", "revision"),
    "Tokenizer": ("tokenizer", "chat_template"),
    "Weights": ("dtype", "quantize"),
}


def convert(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A CoreNet .pt (LoRA and DoRA are merged), a safetensors file, a Hugging Face or MLX directory, a "
            "repository such as apple/OpenELM-270M, or a GGUF file of any family.",
        ),
    ],
    dst: options.Destination,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE|DIR|REPO", help="A SentencePiece model. (default: the one beside SRC)")
    ] = None,
    dtype: Annotated[
        options.DType | None,
        typer.Option(
            help="Type of the weights. (default: SRC's if that has 16 bits, else bfloat16; float16 for quantized GGUF)"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A config.json or CoreNet YAML. (default: the one beside SRC, or what the shapes tell)"),
    ] = None,
    preset: Annotated[
        options.Preset | None, typer.Option(help="One of the paper's models. (default: see --config)")
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(help="Size of an attention head, for a model without QK norms. (default: what its config says)"),
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Alpha of the adapter in SRC. (default: what its config says)")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average (EMA) of a training checkpoint.")] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="openelm-instruct, none or a file. (default: what SRC has, or its name says)"
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository. (default: main)")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="BITS|MODE|BUDGET",
            help="Quantize too: 2 to 8 bits, mxfp4, mxfp8, nvfp4 or, with a decimal point, a budget in bits a weight. "
            "(default: not)",
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read both sides back, and compare every value.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Convert a PyTorch, Hugging Face, MLX or GGUF checkpoint into a directory that elm-mlx and mlx-lm open."""
    import elm_mlx_convert

    with _converted(src, dst, quantize, overwrite, dry_run) as target, ProgressBar("bytes") as progress:
        done = elm_mlx_convert.convert(
            src, target, tokenizer=tokenizer, dtype=dtype, config=config, preset=preset, head_dim=head_dim,
            lora_alpha=lora_alpha, ema=ema, chat_template=chat_template, revision=revision, verify=verify,
            dry_run=dry_run, overwrite=overwrite, on_plan=partial(_planned, quantize), on_progress=progress,
        )  # fmt: skip
        _print_end(done, to_be_quantized=quantize is not None)


@contextmanager
def _converted(src: str, dst: Path, quantized: str | None, overwrite: bool, dry_run: bool) -> Iterator[Path]:
    """Yields the directory to convert to: DST, or a scratch directory that is quantized to DST when the block ends."""
    if quantized is None:
        yield dst
        return
    from elm_mlx import directories, files, reading
    from elm_mlx.cli.quantize import QuantizationDisplay
    from elm_mlx.quantize.quantization import quantize
    from elm_mlx.quantize.recipe import parse

    recipe = parse(quantized)
    if dry_run:
        yield dst
        return
    directories.check_destination(dst, directories.MODEL, overwrite, (reading.expanded(src),))
    with files.scratch_directory(dst) as scratch:
        yield scratch / dst.name
        with QuantizationDisplay() as report:
            quantize(
                scratch / dst.name, dst, recipe, overwrite=overwrite,
                on_plan=report.plan, on_progress=report.progress, on_result=report.result,
            )  # fmt: skip
        say("wrote", str(dst))


def _planned(quantized: str | None, plan: ConversionPlan | GgufPlan) -> None:
    """Prints a plan. Raises InputError where its weights are to be quantized, and come so from a GGUF file."""
    from elm_mlx.errors import InputError
    from elm_mlx_convert import ConversionPlan

    if quantized and not isinstance(plan, ConversionPlan) and any(weight.grid for weight in plan.weights):
        raise InputError(
            f"{plan.source.label}: is quantized already ({plan.stored}): leave out --quantize, or convert and quantize "
            "what the file was made of"
        )
    _print_plan(plan)


def _print_plan(plan: ConversionPlan | GgufPlan) -> None:
    from elm_mlx_convert import ConversionPlan

    if not isinstance(plan, ConversionPlan):
        _print_gguf_plan(plan)
        return
    config, source = plan.config, plan.source
    heads, kv, ffn = config.num_query_heads, config.num_kv_heads, config.ffn_dims
    rows = [
        ("source", f"{source.label}: {source.kind}, {plan.source_dtype}"),
        ("commit", source.revision),
        ("config", plan.config_origin),
        ("model", f"{plan.parameters:,} parameters, {counted(config.num_layers, 'layer')} of {config.model_dim}"),
        ("", f"heads {_range(heads)} of {config.head_dim}, key/value heads {_range(kv)}, FFN {_range(ffn)}"),
        ("", _traits(config)),
        ("vocabulary", f"{config.vocab_size:,} tokens, context {config.max_context_length:,}"),
        ("tokenizer", str(plan.tokenizer or "none")),
        ("write", f"{plan.dtype}, {byte_size(plan.nbytes)}"),
        *(("note", note) for note in plan.notes),
        *(("warning", warning) for warning in plan.warnings),
    ]
    say_all(rows)


def _print_gguf_plan(plan: GgufPlan) -> None:
    config, vocabulary = plan.config, plan.vocabulary
    tokenizer = vocabulary.describe() if vocabulary else plan.tokenizer or "none"
    template = ", chat template" if vocabulary and vocabulary.templates else ""
    rows = [
        ("source", f"{plan.source.label}: {plan.source.kind}, {plan.source_dtype}"),
        ("model", f"{plan.parameters:,} parameters, {counted(config.num_layers, 'layer')} of {config.model_dim}"),
        ("vocabulary", f"{config.vocab_size:,} tokens, context {config.max_context_length:,}"),
        ("tokenizer", f"{tokenizer}{template}"),
        ("write", f"{plan.stored}, {byte_size(plan.nbytes)}"),
        *(("note", note) for note in plan.notes),
        *(("warning", warning) for warning in plan.warnings),
    ]
    say_all(rows)


def _print_end(done: Conversion, to_be_quantized: bool) -> None:
    for difference in done.differences:
        size = f"{difference.group:<9}  {difference.values:>13,} values"
        largest = f"largest difference {difference.largest:.3g} (largest value {difference.magnitude:.3g})"
        say("verified", f"{size}, {largest}")
    for warning in done.warnings[len(done.plan.warnings) :]:
        say("warning", warning)
    if done.destination is None:
        say("dry run", "nothing was written")
    elif to_be_quantized:
        say("converted", f"in {done.seconds:.1f} s")
    else:
        say("wrote", f"{done.destination} in {done.seconds:.1f} s")


def _traits(config: Any) -> str:
    ffn = "gated FFN" if config.ffn_with_glu else "FFN without a gate"
    norms = "QK norms" if config.normalize_qk_projections else "no QK norms"
    return f"{ffn}, {norms}, {'tied head' if config.share_input_output_layers else 'head of its own'}"


def _range(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"
