"""`elm-mlx quantize MODEL DST`: a model in fewer bits, and what that lost."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import ProgressBar, byte_size, say

if TYPE_CHECKING:
    from elm_mlx.quantize.bit_plan import BitPlan
    from elm_mlx.quantize.quantization import Quantization

PANELS = {
    "Numbers": ("bits", "group_size", "mode", "bpw", "dtype"),
    "Method": ("method", "learning_rate", "calibration"),
    "Losses": ("text", "max_kld"),
}


def quantize(
    model: options.ModelPath,
    dst: options.Destination,
    bits: Annotated[int | None, typer.Option(help="Bits a weight: 2, 3, 4, 5, 6 or 8. (default: 4)")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128. (default: 64)")
    ] = None,
    mode: Annotated[
        Literal["affine", "mxfp4", "mxfp8", "nvfp4"],
        typer.Option(help="affine is integers with scales and biases; the others are floats."),
    ] = "affine",
    bpw: Annotated[
        float | None,
        typer.Option(help="Mix 2 to 8 bits by each weight's sensitivity, up to this mean. (default: --bits for all)"),
    ] = None,
    method: Annotated[
        Literal["awq", "dwq", "gptq"] | None, typer.Option(help="One of mlx-lm's learned methods.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of --method dwq. (default: 1e-5)")] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text for --bpw and --method. (default: excerpts of books)")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to measure losses on. (default: excerpts of other books)")
    ] = None,
    dtype: Annotated[
        options.DType | None, typer.Option(help="Type of scales and norms. (default: as in MODEL, in 16 bits)")
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option(help="Write nothing if the mean KL divergence is above this, in nats. (default: no limit)"),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Quantize a model, and measure what that lost."""
    from elm_mlx.quantize.quantization import quantize
    from elm_mlx.quantize.recipe import choose

    recipe = choose(bits, group_size, mode, bpw=bpw, method=method, rate=learning_rate, dtype=dtype)
    model = options.directory_of(model)
    with QuantizationDisplay() as report:
        quantize(
            model, dst, recipe,
            calibration=calibration, text=text, max_kld=max_kld, overwrite=overwrite,
            on_plan=report.plan, on_progress=report.progress, on_result=report.result,
        )  # fmt: skip
    say("wrote", str(dst))


class QuantizationDisplay(AbstractContextManager["QuantizationDisplay"]):
    """Plan and losses on stdout; a bar on stderr, only where someone is looking."""

    def __init__(self) -> None:
        self._bar = ProgressBar()

    def __exit__(self, *exception: object) -> None:
        self._bar.hide()

    def progress(self, what: str, done: int = 0, total: int = 0, /) -> None:
        if total:
            self._bar(what, done, total)
        else:  # mlx-lm's methods show bars of their own
            self._bar.hide()

    def plan(self, made: BitPlan) -> None:
        self._bar.hide()
        table = made.table()
        for i, (kind, text) in enumerate(table.items()):
            say("" if i else "plan", f"{kind:<{max(map(len, table))}}  {text}")
        predicted = "" if made.predicted is None else f"; by its parts {made.predicted:.2g} nats a token"
        say("", f"{made.bits_per_weight:.3f} bits a weight{predicted}")
        for note in made.notes:
            say("note", note)

    def result(self, done: Quantization) -> None:
        self._bar.hide()
        lost, before, after = done.losses, done.speed_before, done.speed_after
        where = "made-up ids, as there is no tokenizer" if done.text is None else done.text.name
        times = f"{done.bytes_before / done.bytes_after:.2f} times smaller"
        bits = f"{done.bits_before:.2f} to {done.bits_after:.2f} bits a weight"
        say("bytes", f"{byte_size(done.bytes_before)} to {byte_size(done.bytes_after)}, {times}; {bits}")
        say("compared", f"{lost.tokens:,} tokens ({where})")
        if lost.perplexity_before is not None and lost.perplexity_after is not None:
            change = lost.perplexity_after / lost.perplexity_before - 1
            say("perplexity", f"{lost.perplexity_before:.4g} to {lost.perplexity_after:.4g} ({change:+.2%})")
        tail = f"99th percentile {lost.kl_p99:.3g}, largest {lost.kl_max:.3g}"
        say("divergence", f"{lost.kl_mean:.3g} nats a token; {tail}")
        say("flipped", f"{lost.flipped:.2%} of tokens have another likeliest one")
        prompt = f"prompt {before.prompt:,.0f} to {after.prompt:,.0f}"
        decode = f"decode {before.decode:,.0f} to {after.decode:,.0f}"
        say("tokens/s", f"{prompt}, {decode}; {done.computed}")
