"""LoRA and DoRA adapters of CoreNet, merged into the weights that they adapt.

Knows CoreNet's names for the parts (`X.base_layer.weight`, `X.lora_A.NAME.weight`, …) and the arithmetic:
`W + scale * B @ A`, for DoRA each row of it brought to the length that the magnitude vector says. Merges
rows as they are read, so a merged tensor costs no more memory than another. Knows no config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from elm_mlx.errors import InputError
from elm_mlx_convert.infer import EMBEDDING, HEAD
from elm_mlx_convert.names import to_canonical
from elm_mlx_convert.tensors import FLOATS, LazyTensor, to_float32

_PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)(?:\.weight)?"
)
_BASE = ".base_layer.weight"


@dataclass(frozen=True)
class Scaling:
    """How strongly an adapter of rank r counts: alpha / r, or with rank-stabilised LoRA alpha / sqrt(r)."""

    alpha: float
    by_root: bool = False

    def of(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.by_root else rank)


def has_adapter(names: Iterable[str]) -> bool:
    """Whether any of the names is a part of an adapter."""
    return any(_PART.fullmatch(name) or name.endswith(_BASE) for name in names)


def merge(tensors: Mapping[str, LazyTensor], scaling: Scaling, where: str) -> dict[str, LazyTensor]:
    """The weights with their adapters merged in, float32, under the names of a model without adapters.

    CoreNet's tied head reads the embedding without its adapter. So an adapter on the embedding of a tied
    model unties it: the result has an `lm_head.weight`, which is the base embedding.

    Raises:
        InputError: names the tensor that is missing, or whose shape does not fit its base.
    """
    parts: dict[str, dict[str, LazyTensor]] = {}
    merged: dict[str, LazyTensor] = {}
    adapters = set()
    for name, tensor in tensors.items():
        if match := _PART.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = tensor
            adapters.add(match[3])
        elif name.endswith(_BASE):
            parts.setdefault(name.removesuffix(_BASE), {})["base"] = tensor
        else:
            merged[name] = tensor
    if len(adapters) > 1:
        raise InputError(f"{where}: holds the adapters {', '.join(sorted(adapters))}: only one can be merged")
    head_is_tied = not any(to_canonical(name) == HEAD for name in [*tensors, *(f"{m}.weight" for m in parts)])
    for module, module_parts in parts.items():
        name = f"{module}.weight"
        merged[name] = _merge_module(name, module_parts, scaling, where)
        if to_canonical(name) == EMBEDDING and head_is_tied and len(module_parts) > 1:
            merged[HEAD] = module_parts["base"].renamed(HEAD)
    return merged


def _merge_module(name: str, parts: dict[str, LazyTensor], scaling: Scaling, where: str) -> LazyTensor:
    module = name.removesuffix(".weight")
    if "base" not in parts:
        raise InputError(f"{where}: {module}{_BASE} is missing: the file holds an adapter without its model")
    base = parts["base"]
    if len(parts) == 1:
        return base
    a, b = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
    for part in (a, b):
        if part not in parts:
            raise InputError(f"{where}: {module}.{part} is missing beside {module}{_BASE}")
    for part, tensor in parts.items():
        if tensor.dtype not in (*FLOATS, "float64"):
            raise InputError(f"{where}: {module}.{part} is {tensor.dtype}, and floats are needed")
    rank = parts[a].shape[0] if len(parts[a].shape) == 2 else 0
    _check(parts, rank, where, module, of_embedding=a == "lora_embedding_A")
    if a == "lora_embedding_A":
        return _lora_embedding(base, parts[a], parts[b], scaling.of(rank))
    return _lora_linear(base, parts[a], parts[b], parts.get("lora_magnitude_vector"), scaling.of(rank))


def _check(parts: dict[str, LazyTensor], rank: int, where: str, module: str, *, of_embedding: bool) -> None:
    shape = parts["base"].shape
    if len(shape) != 2 or rank < 1:
        raise InputError(f"{where}: {module}{_BASE} of shape {shape} is no matrix that an adapter fits")
    rows, columns = shape
    expected: dict[str, tuple[int, ...]] = {"base": shape}
    if of_embedding:
        expected |= {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)}
    else:
        expected |= {"lora_A": (rank, columns), "lora_B": (rows, rank), "lora_magnitude_vector": (rows,)}
    for part, tensor in parts.items():
        if part not in expected:
            raise InputError(f"{where}: {module} has a {part} where CoreNet has none")
        if tensor.shape != expected[part]:
            raise InputError(
                f"{where}: {module}.{part} has the shape {tensor.shape}; beside {module}{_BASE} of shape {shape} "
                f"it needs {expected[part]}"
            )


def _lora_linear(
    base: LazyTensor, a: LazyTensor, b: LazyTensor, magnitude: LazyTensor | None, scale: float
) -> LazyTensor:
    def read_rows(start: int, stop: int) -> np.ndarray:
        weight = _rows(base, start, stop) + (_rows(b, start, stop) @ _rows(a, 0, a.rows)) * np.float32(scale)
        if magnitude is None:
            return weight
        length = np.linalg.norm(weight, axis=1)  # over the inputs: one for each output (DoRA, equation 5)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros, as in CoreNet, is no number
            return weight * (_rows(magnitude, start, stop) / length)[:, None]

    return replace(base, dtype="float32", read_rows=read_rows)


def _lora_embedding(base: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    def read_rows(start: int, stop: int) -> np.ndarray:
        tokens = _rows(a, 0, a.rows)[:, start:stop].T
        return _rows(base, start, stop) + (tokens @ _rows(b, 0, b.rows).T) * np.float32(scale)

    return replace(base, dtype="float32", read_rows=read_rows)


def _rows(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    return to_float32(tensor.read_rows(start, stop), tensor.dtype)
