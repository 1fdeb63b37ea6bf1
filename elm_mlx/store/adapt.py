"""Adapters into a model, and out of it into a directory.

Knows which module of the model gets which adapter, and the arrays of `adapters.safetensors`. What an adapter
computes is `lora`'s, what its directory says `adapters`'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from elm_mlx import files
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model import lora_layers
from elm_mlx.model.families import Config
from elm_mlx.model.network import Model
from elm_mlx.safetensors_file import write_arrays
from elm_mlx.store import adapters
from elm_mlx.store.adapters import Adapter


def attach(model: Model, adapter: Adapter, seed: int = 0) -> None:
    """Puts a new adapter into `model`, which then computes what it did before; trains nothing but the adapter.

    `seed` draws it: the same one, the same adapter.
    """
    modules = dict(model.named_modules())
    keys = mx.random.split(mx.random.key(seed), max(1, len(adapter.ranks)))
    wrapped = [
        (
            name,
            lora_layers.wrap(
                modules[name], rank, adapter.scale, adapter.dropout, key,
                dora=adapter.kind == "dora", adapted_head=adapter.adapted_head,
            ),
        )
        for (name, rank), key in zip(adapter.ranks.items(), keys, strict=False)
    ]  # fmt: skip
    model.update_modules(tree_unflatten(wrapped))
    model.train(model.training)
    train_adapter(model)


def train_adapter(model: Model) -> None:
    """Freezes all of `model` but the parameters of its adapter."""
    model.freeze()
    for module in _adapted(model).values():
        module.unfreeze(recurse=False, keys=lora_layers.PARAMETERS)


def load(model: Model, adapter: Adapter) -> None:
    """Puts the adapter that `adapters.read` has read into `model`, with its values.

    Everything is frozen, and what does not change is computed; `train_adapter` and `model.train()` go on training.

    Raises:
        InputError: the file holds values that are no numbers, or is damaged.
    """
    assert adapter.directory is not None
    values = read_values(adapter, model.config)
    if adapter.kind == "full":
        _replace(model, values)
    else:
        attach(model, adapter)
        model.load_weights(list(values.items()), strict=False)
    model.eval()
    model.freeze()
    for module in _adapted(model).values():
        if hasattr(module, "settle"):
            module.settle()


def save(directory: Path, model: Model, adapter: Adapter, extra: Mapping[str, Any] | None = None) -> None:
    """`write` of the adapter that is in `model`; for "full", of what is trainable in it."""
    if adapter.kind == "full":
        write(directory, adapter, dict(tree_flatten(model.trainable_parameters())), model.config, extra)
    else:
        parameters = dict(tree_flatten(model.parameters()))
        values = {name: parameters[name] for name in adapter.shapes(model.config)}
        write(directory, adapter, values, model.config, extra)


def write(
    directory: Path,
    adapter: Adapter,
    values: Mapping[str, mx.array],
    config: Config,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes mlx-lm's directory of an adapter, which is made if need be; each of the two files atomically.

    Ranks that differ are filled up with zeros to the largest, which changes nothing and is all that mlx-lm can read.

    Args:
        values: the adapter's arrays by their names in the model.
        extra: more keys for `adapter_config.json`, such as how it was trained.

    Raises:
        ElmError: it cannot be written.
    """
    if adapter.kind != "full":
        values = {adapter.file_name(name, config): _filled(name, v, adapter.rank) for name, v in values.items()}
    text = json.dumps({**(extra or {}), **adapters.to_config(adapter, config)}, indent=2) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ElmError(f"{directory}: cannot be made: {error.strerror}") from None
    with files.new_file(directory / adapters.WEIGHTS) as file:
        write_arrays(file, values)
    files.write_text(directory / adapters.CONFIG, text)


def read_values(adapter: Adapter, config: Config) -> dict[str, mx.array]:
    """The adapter's arrays by their names in the model, at their own ranks, float32 but for "full".

    Raises:
        InputError: the file holds values that are no numbers, or is damaged.
    """
    assert adapter.directory is not None
    path = adapters.weights_file(adapter.directory)
    if path.name in adapters.PEFT_WEIGHTS:
        import elm_mlx_convert

        arrays = elm_mlx_convert.read_peft(adapter.directory, config).arrays
        values = {name: mx.array(array) for name, array in arrays.items()}
    else:
        values = _read_values(path, adapter, config)
    for name, value in values.items():
        if not mx.isfinite(value).all().item():
            raise InputError(f"{path}: tensor {name} holds values that are no numbers, or infinite")
    return values


def _read_values(path: Path, adapter: Adapter, config: Config) -> dict[str, mx.array]:
    try:
        stored = mx.load(str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: MLX cannot load it: {error}") from None
    if adapter.kind == "full":
        return dict(stored)
    return {
        name: _cut(path, name, stored[adapter.file_name(name, config)].astype(mx.float32), shape)
        for name, shape in adapter.shapes(config).items()
    }


def _replace(model: Model, values: Mapping[str, mx.array]) -> None:
    own = dict(tree_flatten(model.parameters()))
    for name, value in values.items():
        if own[name].shape != value.shape:  # packed: adapters.read knows the model's shapes, not its packing
            raise InputError(
                f"tensor {name} of the adapter is {value.shape}, and the model's, quantized, {own[name].shape}"
            )
    model.load_weights([(name, value.astype(own[name].dtype)) for name, value in values.items()], strict=False)


def _filled(name: str, value: mx.array, rank: int) -> mx.array:
    if name.endswith(".lora_a"):
        return mx.pad(value, [(0, 0), (0, rank - value.shape[1])])
    if name.endswith(".lora_b"):
        return mx.pad(value, [(0, rank - value.shape[0]), (0, 0)])
    return value


def _cut(path: Path, name: str, value: mx.array, shape: tuple[int, ...]) -> mx.array:
    """`value` without the zeros that filled it up; anything else there is an error."""
    kept = value[tuple(slice(size) for size in shape)]
    if kept.shape != value.shape and mx.abs(value).sum().item() != mx.abs(kept).sum().item():
        raise InputError(f"{path}: tensor {name} is not 0 past the rank that {adapters.CONFIG} says: {shape}")
    return kept


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if "lora_a" in module}
