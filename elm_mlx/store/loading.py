"""A model directory loaded: its config, tokenizer and weights, every tensor checked; and arrays written to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from elm_mlx import device, reading
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model import stored_layers
from elm_mlx.model.config import AFFINE, Config, read_config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.model.network import Model
from elm_mlx.safetensors_file import Pending, read_header, weight_files
from elm_mlx.store.describe import missing, packing_name
from elm_mlx.store.model_names import directory_of
from elm_mlx.text.tokenizer import Tokenizer, read_vocabulary

# group_size, bits and mode of a quantized weight, as mx.dequantize takes them
Packing = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A model directory in memory.

    Attributes:
        model: of another family it is mlx-lm's network, which speaks `Model`'s protocol; its names are mlx-lm's.
        tokenizer: None where the directory has none.
        stored: how the weights lie on disk, such as "bfloat16" or "4-bit, group 64".
        notes: lines that a user should know of, such as what the weights are computed in.
    """

    model: Model
    tokenizer: Tokenizer | None
    stored: str
    notes: tuple[str, ...]


def load(
    path: str | Path, compute_dtype: str | None = None, adapter_path: str | Path | None = None
) -> tuple[Model, Tokenizer]:
    """Loads the model and tokenizer of a model directory, or of a repository on the hub, `OWNER/NAME[@REVISION]`.

    `compute_dtype` ("float32", "float16" or "bfloat16") decides what is computed in; by default a GPU
    computes in the type that is stored, and a CPU in float32, with weights as they are stored where there is a C
    compiler, and else widened where memory allows. `adapter_path` is a directory
    with an adapter for the model, made here or by mlx-lm.

    Raises:
        InputError: names the file, and the tensor, that is missing or does not fit. Where the tokenizer is,
            `load_model` loads the model alone.
        ElmError: the hub cannot be reached, or the disk is full.
    """
    path = directory_of(path)
    loaded = open_model(path, compute_dtype, adapter_path, read_config(path, with_tokenizer=True))
    assert loaded.tokenizer is not None
    return loaded.model, loaded.tokenizer


def load_model(path: str | Path, compute_dtype: str | None = None, adapter_path: str | Path | None = None) -> Model:
    """Loads the model of a directory, which needs no tokenizer. As `load` otherwise."""
    return open_model(directory_of(path), compute_dtype, adapter_path).model


def open_model(
    path: str | Path,
    compute_dtype: str | None = None,
    adapter_path: str | Path | None = None,
    config: Config | None = None,
    widen: bool = False,
) -> Loaded:
    """Loads a model directory, with notes for the user.

    Args:
        config: the directory's, where that is read already.
        widen: weights are held in the type that is computed in: for whoever trains them, or puts others in their place.
    """
    path = reading.expanded(path)
    config = read_config(path) if config is None else config
    vocabulary = read_vocabulary(path, config)
    if isinstance(config, FamilyConfig):
        config = replace(config, eos_token_ids=vocabulary.end_ids)
    else:
        config = replace(config, eos_token_id=vocabulary.end_ids)
    adapter = None
    if adapter_path is not None:  # imported where there is one alone: starting fast is a feature
        from elm_mlx.store import adapters

        adapter = adapters.read(adapter_path, config, path)
    weights, packing = read_weights(path, config)
    stored = stored_type(config, weights, packing)
    how = _computation(config, weights, packing, compute_dtype, widen)
    if isinstance(config, FamilyConfig):
        from elm_mlx.model import other_networks

        model = other_networks.network(config)
    else:
        model = Model(config)
    if how.unpack:
        _unpack(weights, packing)
    elif packing:
        nn.quantize(model, class_predicate=lambda module, _: packing.get(f"{module}.weight", False))
    layers = dict(stored_layers.candidates(model)) if how.as_stored else {}
    kept = {f"{layer}.{part}" for layer in layers for part in ("weight", "scales", "biases")}
    for name in list(weights):  # one by one, so that both types of all weights are never in memory together
        if mx.issubdtype(weights[name].dtype, mx.floating) and name not in kept:
            weights[name] = weights[name].astype(how.dtype)
        try:
            mx.eval(weights[name])
        except RuntimeError as error:  # a file that is cut meanwhile, memory that is not there
            raise ElmError(f"{path}: tensor {name} cannot be loaded: {error}") from None
    model.load_weights(list(weights.items()))
    weights.clear()
    for layer in layers.values():
        if not stored_layers.read_as_stored(layer, how.rounds):
            layer.set_dtype(how.dtype)
    model.eval()
    model.freeze()
    notes = [how.note]
    if adapter is not None:
        adapters.load(model, adapter)
        notes.append(f"adapter {adapter.directory}: {adapter.describe()}")
    device.wire(sum(value.nbytes for _, value in tree_flatten(model.parameters())))
    hindrance = device.compile_hindrance()
    if hindrance:
        notes.append(f"decoding uncompiled, half as fast: {hindrance}; set TMPDIR to a directory of your own")
    if isinstance(config, FamilyConfig) and config.own_head:
        notes.append("the weights hold a head of their own, which is used, though config.json says tie_word_embeddings")
    stored_as = packing_name(packing.values()) if packing else str(stored).removeprefix("mlx.core.")
    return Loaded(model, vocabulary.tokenizer, stored_as, tuple(filter(None, (*notes, *vocabulary.notes))))


def computation(path: Path, config: Config, compute_dtype: str | None = None) -> device.Computation:
    """Returns what `open_model` would compute in with widened weights. Raises InputError as it does."""
    return _computation(config, *read_weights(path, config), compute_dtype, widen=True)


def _computation(
    config: Config, weights: Mapping[str, mx.array], packing: Mapping[str, Packing], requested: str | None, widen: bool
) -> device.Computation:
    stored = stored_type(config, weights, packing)
    readable = not widen and all(stored_layers.is_readable(how["mode"], how["bits"]) for how in packing.values())
    nbytes = sum(weight.nbytes for weight in weights.values()) if readable else None
    return device.computation(stored, config.parameters, bool(packing), requested, nbytes)


def stored_type(config: Config, weights: Mapping[str, mx.array], packing: Mapping[str, Packing]) -> mx.Dtype:
    """Returns the type that the model came in: its embedding's, or where that is quantized a norm's, or its scales'."""
    embedding = f"{config.embedding}.weight"
    if embedding not in packing:
        return weights[embedding].dtype
    parts = {part for name in packing for part in (name, part_of(name, "scales"), part_of(name, "biases"))}
    whole = [value.dtype for name, value in weights.items() if name not in parts]
    if whole:
        return whole[0]
    scales = weights[part_of(embedding, "scales")].dtype  # the first OLMo's norms have no weights
    return scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16


def read_weights(path: Path, config: Config) -> tuple[dict[str, mx.array], dict[str, Packing]]:
    """Returns every tensor of a model directory, not yet read from the disk, and how the quantized ones are packed.

    Raises:
        InputError: names the file, and the tensor, that is missing or does not fit `config`.
    """
    weights = _read_weights(path)
    if isinstance(config, FamilyConfig):
        from elm_mlx.model import other_networks

        weights = other_networks.sanitized(config, weights)
    packing = {name: _packing(config, name) for name in config.shapes() if part_of(name, "scales") in weights}
    _check_weights(config, packing, weights, path)
    return weights, packing


def _read_weights(path: Path) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in weight_files(path):
        tensors = load_arrays(file)
        twice = next((name for name in tensors if name in weights), None)
        if twice is not None:
            raise InputError(f"{file}: tensor {twice} is in another file of the directory too")
        weights.update(tensors)
    return weights


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Returns the arrays of a safetensors file, not yet read from the disk. Raises InputError where it is none."""
    read_header(path)  # which MLX believes
    try:
        return dict(mx.load(str(path), format="safetensors"))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: MLX cannot load it: {error}") from None


def pending(name: str, dtype: mx.Dtype, shape: tuple[int, ...], make: Callable[[], mx.array]) -> Pending:
    """Returns an array to write, which `make` makes then; it is forgotten before the next is made."""

    def blocks() -> Iterator[memoryview]:
        array = make()
        assert (array.dtype, array.shape) == (dtype, shape), name
        yield memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8))
        del array
        mx.clear_cache()

    return Pending(name, str(dtype).removeprefix("mlx.core."), shape, blocks)


def pack(weight: mx.array, how: Packing, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Quantizes a weight: `weight`, `scales` and, of affine, `biases`, the latter two in `dtype`; float modes have
    8-bit floats for scales."""
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, **how), strict=False))
    if "biases" in parts:
        parts |= {name: parts[name].astype(dtype) for name in ("scales", "biases")}
    return parts


def pending_packed(
    name: str, shape: tuple[int, ...], how: Packing, dtype: mx.Dtype, make: Callable[[], mx.array]
) -> list[Pending]:
    """Returns the arrays to write for a quantized weight, which is made and packed when its first part is written."""
    *rows, columns = shape
    groups = (*rows, columns // how["group_size"])
    shapes: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {"weight": (mx.uint32, (*rows, columns * how["bits"] // 32))}
    if how["mode"] == AFFINE:
        shapes |= {"scales": (dtype, groups), "biases": (dtype, groups)}
    else:
        shapes |= {"scales": (mx.uint8, groups)}
    parts: dict[str, mx.array] = {}

    def part(kind: str) -> mx.array:
        if not parts:
            parts.update(pack(make(), how, dtype))
        return parts.pop(kind)

    stem = name.removesuffix("weight")
    return [pending(stem + kind, *shapes[kind], partial(part, kind)) for kind in shapes]


def _check_weights(config: Config, packing: Mapping[str, Packing], weights: dict[str, mx.array], path: Path) -> None:
    """Raises InputError unless there is every tensor that `config` wants, in its shape, and no other."""
    expected = dict(config.shapes())
    # Scales of the "mx" and "nv" modes are 8-bit floats, which MLX keeps as bytes.
    bytes_ = {part_of(name, "scales") for name, how in packing.items() if how["mode"] != AFFINE}
    for name, how in packing.items():
        rows, width = expected[name]
        expected[name] = (rows, width * how["bits"] // 32)
        for part in (part_of(name, "scales"), part_of(name, "biases")):
            if part in weights:
                expected[part] = (rows, width // how["group_size"])
    for name, shape in expected.items():
        if name not in weights:
            raise missing(path, name)
        if weights[name].shape != shape:
            raise InputError(f"{path}: tensor {name} is {weights[name].shape}, and config.json implies {shape}")
        if name in packing:
            _check_packed(name, packing[name], weights, path)
        elif not (mx.issubdtype(weights[name].dtype, mx.floating) or name in bytes_):
            raise InputError(f"{path}: tensor {name} is {weights[name].dtype}, which is not a type of weights")
    extra = next((name for name in weights if name not in expected), None)
    if extra is not None:
        raise InputError(f"{path}: tensor {extra} has no place in the model that config.json describes")


def _check_packed(name: str, how: Packing, weights: dict[str, mx.array], path: Path) -> None:
    try:
        mx.dequantize(
            weights[name], weights[part_of(name, "scales")], weights.get(part_of(name, "biases")), **how
        )  # not computed
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: tensor {name} cannot be dequantized as config.json says: {error}") from None


def _packing(config: Config, name: str) -> Packing:
    """Returns how the weight `name` is packed: its own entry in the config, or the config's default."""
    quantization = config.quantization
    if quantization is None:
        raise InputError(f"tensor {name} is quantized, and config.json has no `quantization` to say how")
    own = quantization.get(name.removesuffix(".weight"))
    how = own if isinstance(own, Mapping) else quantization
    return {"group_size": how["group_size"], "bits": how["bits"], "mode": how.get("mode") or AFFINE}


def part_of(name: str, kind: str) -> str:
    """Returns the name of a quantized weight's "scales" or "biases"."""
    return name.removesuffix("weight") + kind


def _unpack(weights: dict[str, mx.array], packing: Mapping[str, Packing]) -> None:
    """Replaces quantized weights by the values that they stand for."""
    from elm_mlx.model import lora_layers

    for name, how in packing.items():
        scales, biases = weights.pop(part_of(name, "scales")), weights.pop(part_of(name, "biases"), None)
        weights[name] = lora_layers.dequantize(weights[name], scales, biases, **how)
        mx.eval(weights[name])
