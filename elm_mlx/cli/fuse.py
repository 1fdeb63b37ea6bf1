"""`elm-mlx fuse MODEL ADAPTER DST`: an adapter becomes part of its model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elm_mlx.cli import options
from elm_mlx.cli.screen import say_all

if TYPE_CHECKING:
    from elm_mlx.store.fusion import Fusion


def fuse(
    model: options.ModelPath,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter for it, from `lora`, mlx-lm or PEFT.")],
    dst: options.Destination,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Compare logits on this text. (default: the run's training data, or excerpts of books)"
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write a quantized model in 16 bits, not quantized again.")
    ] = False,
    dtype: options.WeightDType = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Merge an adapter into its model, and prove by their logits that nothing was lost."""
    from elm_mlx import reading
    from elm_mlx.store.fusion import fuse
    from elm_mlx.train.finetuning import trained_on

    shown = None if text is None else reading.text(text, reading.CORPUS_BYTES)
    model = options.directory_of(model)
    done = fuse(
        model, adapter, dst, text=shown, sample=partial(trained_on, adapter, model), dequantize=dequantize, dtype=dtype,
        overwrite=overwrite,
    )  # fmt: skip
    _print(done)


def _print(done: Fusion) -> None:
    from elm_mlx.store.fusion import WAYS, percent

    if done.tolerance is None:
        verdict = "quantized again: this is what that cost"
    else:
        verdict = f"equal but for rounding to {done.dtype}, which explains {done.tolerance:.2g}"
    kept = {way: f"{percent(share)} {WAYS[way]}" for way, share in done.kept.items()}
    first = kept.pop(done.way, "") if done.way is not None else ""
    lines = {
        "adapter": f"{done.adapter.describe()}; moves the logits by {done.of_spread(done.effect):.2g} of their spread",
        "head": "a weight of its own now: the base embedding" if done.untied else "",
        "template": "" if done.template is None else f"the adapter was trained by {done.template}: now the model's",
        "compared": f"logits at {done.tokens} positions: {done.compared}",
        "kept": "; ".join([f"{first}, of the {done.effect_nats:.2g} nats that the adapter moves it", *kept.values()])
        if first
        else "",
        "moved": f"{100 * done.moved:.2g}% of the quantized weights that the adapter changes"
        if done.moved is not None
        else "",
        "difference": f"{done.of_spread(done.rms):.2g} of the logits' spread; {verdict}",
        "": f"largest {done.largest:.3g}, mean {done.mean:.3g}, spread {done.spread:.3g}",
        "divergence": f"{done.divergence:.2g} nats; the likeliest token is the same at {done.same_top:.1%}",
        "warning": _warning(done),
        "wrote": f"{done.destination}, {done.dtype}",
    }
    say_all(lines.items())


def _warning(done: Fusion) -> str:
    if done.rms <= done.effect / 2 or done.tolerance is None:
        return ""
    advice = "" if done.dtype == "float32" else "; --dtype float32 keeps it"
    return f"that is more than half of what the adapter changes: little of it is left{advice}"
