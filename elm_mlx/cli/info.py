"""`elm-mlx info`: what a model directory holds, and what this machine computes with."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elm_mlx import blas
from elm_mlx.cli import options
from elm_mlx.cli.screen import bar, byte_size, counted, line, say_all, table, terminal_width
from elm_mlx.errors import InputError
from elm_mlx.reading import expanded

if TYPE_CHECKING:
    from elm_mlx.store.describe import AdapterDescription, Description, Layer

_BAR = 16  # characters of the longest bar: all columns fit 80
_WITH_BARS = 74  # columns of a terminal, at least
_MOST_LAYERS = 200  # of a table; the deepest models have some 130


def info(
    model: options.OptionalModelPath = None,
    adapter: options.AdapterPath = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    system: Annotated[bool, typer.Option("--system", help="Show MLX's device, BLAS and memory here.")] = False,
) -> None:
    """Show a model's size, its memory and its layers, and what an adapter changes in it."""
    if model is None and not system:
        raise InputError("give MODEL, or --system")
    if adapter is not None and model is None:
        raise InputError("--adapter needs MODEL, which it is for")
    asked, model = str(model), model and options.directory_of(model)
    result: dict[str, object] = {}
    if system:
        result |= {"system": _system()}
    if model is not None:
        from elm_mlx.store.describe import describe, describe_adapter

        description = describe(model)
        result |= description.to_dict()
        about = None if adapter is None else describe_adapter(adapter, model)
        if about is not None:
            result |= {"adapter": asdict(about)}
    if as_json:
        print(json.dumps(result, indent=2))
        return
    if system:
        say_all(((f"{name}:", value) for name, value in _system().items()), 14)
    if model is not None:
        _print(description, asked)
        if about is not None:
            _print_adapter(about)


def _system() -> dict[str, str]:
    import mlx.core as mx

    from elm_mlx import device

    found = blas.status()
    served = f"{found.name} ({found.note})" if found.note else found.name
    memory = device.available_memory()
    return {
        "mlx": mx.__version__,
        "device": str(mx.default_device()),
        "processor": str(mx.device_info().get("device_name", platform.processor())),
        "computes in": "the stored type" if device.on_gpu() else "float32 where memory allows",
        "blas": served + (f", {_short(found.path)}" if found.path else ""),
        "free memory": f"{memory / 1e9:.1f} GB" if memory is not None else "not known",
    }


def _short(path: str) -> str:
    """`path`, from `~` on where it lies in the user's home."""
    try:
        return f"~/{Path(path).relative_to(Path.home())}"
    except (ValueError, RuntimeError):  # elsewhere; no home
        return path


def _print(about: Description, asked: str) -> None:
    """Prints a model's figures. A repository is called by the name that was asked for."""
    by_path = expanded(asked).exists()
    embedding = f"({about.embedding_parameters:,} in the embedding)"
    line(f"{about.path if by_path else asked}: {about.family}, {about.parameters:,} parameters {embedding}")
    shape = [counted(about.num_layers, "layer"), f"width {about.model_dim}"]
    if about.layers:
        ffn, norm = "SwiGLU" if about.glu else "plain FFN", "QK norm" if about.qk_norm else "no QK norm"
        shape += [f"heads of {about.head_dim}", ffn, norm]
    shape += ["tied head" if about.tied_head else "untied head"]
    caches = [f"{count:,} bytes a token in {name}" for name, count in about.kv_bytes_per_token.items()]
    state = about.keeps == "a state"
    lines = {
        "shape": ", ".join(shape) + ("" if about.layers else "; the network is mlx-lm's"),
        "linears": "" if about.layers else ", ".join(name.rpartition(".")[2] for name in about.linears),
        "vocabulary": f"{about.vocab_size:,} tokens" + ("" if about.tokenizer else ", no tokenizer in the directory"),
        "context": "no limit of its own" if state else f"{about.context:,} tokens",
        "stored": f"{about.dtype}, {byte_size(about.file_bytes)}",
        "memory": ", ".join(f"{byte_size(count)} in {name}" for name, count in about.memory.items()),
        "cache" if state else "KV cache": "a state of constant size, which cannot be rewound"
        if state
        else ", ".join(caches),
        "directory": "" if by_path else about.path,
    }
    say_all(lines.items(), 14, indent=2)
    if about.layers:
        _print_layers(about.layers)


def _print_layers(layers: Sequence[Layer]) -> None:
    bars = (3, 5) if terminal_width() >= _WITH_BARS else ()
    rows = [[" layer", "heads", "KV", "query heads", "FFN", "FFN width", "parameters"]]
    heads, widths = max(layer.query_heads for layer in layers), max(layer.ffn_dim for layer in layers)
    for i, layer in enumerate(layers[:_MOST_LAYERS]):
        rows.append([
            str(i), str(layer.query_heads), str(layer.kv_heads), bar(layer.query_heads / heads, _BAR),
            f"{layer.ffn_dim:,}", bar(layer.ffn_dim / widths, _BAR), f"{layer.parameters:,}",
        ])  # fmt: skip
    if not bars:
        rows = [[*row[:3], row[4], row[6]] for row in rows]
    table(rows[0], rows[1:], left=bars)
    if len(layers) > _MOST_LAYERS:
        line(f"  and {len(layers) - _MOST_LAYERS:,} more layers; --json shows them")


def _print_adapter(about: AdapterDescription) -> None:
    line(f"{about.path}: {about.summary}")
    lines = {
        "parameters": f"{about.parameters:,}, {about.share:.2%} of the model's; {byte_size(about.file_bytes)}",
        "head": about.head,
        "made for": about.made_for,
    }
    say_all(lines.items(), 14, indent=2)
    say_all(((module, f"rank {ranks}") for module, ranks in about.modules.items()), 27, indent=2)
