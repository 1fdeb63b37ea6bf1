"""`elm-mlx fuse MODEL ADAPTER DST`: an adapter becomes part of its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elm_mlx.cli import options
from elm_mlx.cli.show import say

if TYPE_CHECKING:
    from elm_mlx.fuse import Fusion


def fuse(
    model: options.ModelPath,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter for it, from `lora` or mlx-lm.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The model directory to make.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare logits on this text. (default: a fable)")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write a quantized model in 16 bits, without a new loss.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Store in float32, bfloat16 or float16. (default: as the model is)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model directory at DST.")] = False,
) -> None:
    """Merge an adapter into its model, and prove by their logits that nothing was lost."""
    from elm_mlx import reading
    from elm_mlx.fuse import fuse

    shown = None if text is None else reading.text(text, reading.CORPUS_BYTES)
    done = fuse(model, adapter, dst, text=shown, dequantize=dequantize, dtype=dtype, overwrite=overwrite)
    _print(done)


def _print(done: Fusion) -> None:
    where = "of text" if done.on_text else "made up, as there is no tokenizer"
    if done.tolerance is None:
        verdict = "quantized anew: this is what that cost"
    else:
        verdict = f"equal but for rounding to {done.dtype}, which explains {done.tolerance:.2g}"
    lines = {
        "adapter": f"{done.adapter.describe()}; moves the logits by {done.effect / done.spread:.2g} of their spread",
        "head": "a weight of its own now: the base embedding" if done.untied else "",
        "moved": _moved(done.moved),
        "template": "" if done.template is None else f"the adapter was trained by {done.template}: now the model's",
        "compared": f"logits at {done.tokens} positions {where}",
        "difference": f"{done.rms / done.spread:.2g} of the logits' spread; {verdict}",
        "": f"largest {done.largest:.3g}, mean {done.mean:.3g}, spread {done.spread:.3g}",
        "divergence": f"{done.divergence:.2g} nats; the likeliest token is the same at {done.same_top:.1%}",
        "warning": _warning(done),
        "wrote": f"{done.destination}, {done.dtype}",
    }
    for name, line in lines.items():
        if line:
            say(name, line)


def _moved(share: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.2g}% of the quantized weights that the adapter changes; the rest are nearest as they were"


def _warning(done: Fusion) -> str:
    if done.moved == 0:
        return (
            "no quantized weight takes another value, as each changes by less than half a step; --dequantize keeps it"
        )
    if done.rms <= done.effect / 2:
        return ""
    if done.tolerance is None:
        advice = "; --dequantize keeps it, and with --dtype float32 all of it"
    else:
        advice = "" if done.dtype == "float32" else "; --dtype float32 keeps it"
    return f"that is more than half of what the adapter changes: little of it is left{advice}"
