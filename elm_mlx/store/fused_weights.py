"""The weights of a fused model, one by one: dense or quantized, changed by the adapter or not.

Knows which of a directory's tensors an adapter changes, and in which parts and types each is stored. What a merged
weight is, is `lora`'s; how it goes back into integers, `requantize`'s. Writes nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial

import mlx.core as mx

from elm_mlx.model import lora_layers
from elm_mlx.model.families import Config
from elm_mlx.safetensors_file import Pending
from elm_mlx.store.adapters import EMBEDDING, Adapter
from elm_mlx.store.loading import Packing, pending, stored_type
from elm_mlx.store.requantize import NEAREST, requantize


class Merge:
    """The tensors of a fused directory, each made when it is asked for, once: `weights` is emptied on the way.

    An array that MLX reads from a file stays in memory as long as anyone holds it.

    Args:
        weights, packing: as `store.read_weights` has them.
        values: the adapter's arrays by their names in the model.
        dequantize: write what is quantized in a type of floats.
        dtype: that of all that is not quantized; None for what it is, and of what was quantized the model's.
        way: how what is quantized takes up the change, one of `requantize`'s.
    """

    def __init__(
        self,
        config: Config,
        weights: dict[str, mx.array],
        packing: Mapping[str, Packing],
        values: Mapping[str, mx.array],
        adapter: Adapter,
        dequantize: bool,
        dtype: mx.Dtype | None,
        way: str = NEAREST,
    ):
        self._weights, self._packing, self._values = weights, packing, values
        self._adapter, self._dequantize = adapter, dequantize
        self._given, self._way = dtype, way
        self._dtype = dtype or stored_type(config, weights, packing)
        self._counts: list[tuple[int, int]] = []

    @property
    def moved(self) -> float | None:
        """Of the weights that were quantized anew, the share with another value than before; None without any."""
        moved, of = (sum(counts) for counts in zip(*self._counts, strict=True)) if self._counts else (0, 0)
        return moved / of if of else None

    def tensors(self, name: str, shape: tuple[int, ...]) -> list[Pending]:
        """The weight `name` of that shape in the model, in the parts that it is stored in."""
        changes = self._changes(name)
        if name in self._packing and not self._dequantize:
            parts = [name, *(self._part(name, kind) for kind in ("scales", "biases"))]
            parts = [part for part in parts if part in self._weights]
            if not changes:
                return [self._copied(part) for part in parts]
            quantized: dict[str, mx.array] = {}
            return [
                pending(
                    part, self._weights[part].dtype, self._weights[part].shape,
                    partial(self._quantized_part, name, part, quantized),
                )
                for part in parts
            ]  # fmt: skip
        dtype = self._dtype if name in self._packing else self._given or self._weights[name].dtype
        if not changes and name not in self._packing and dtype == self._weights[name].dtype:
            return [self._copied(name)]
        return [pending(name, dtype, shape, partial(self._dense, name, dtype, changes))]

    def _changes(self, name: str) -> bool:
        return name in self._values or name.removesuffix(".weight") in self._adapter.ranks

    def _copied(self, name: str) -> Pending:
        stored = self._weights[name]
        return pending(name, stored.dtype, stored.shape, partial(self._weights.pop, name))

    def _dense(self, name: str, dtype: mx.Dtype, changes: bool) -> mx.array:
        weight = self._merged(name) if changes else self._wide(name)
        return weight.astype(dtype)

    def _quantized_part(self, name: str, part: str, quantized: dict[str, mx.array]) -> mx.array:
        """One of weight, scales and biases; the first call makes all, each is handed out once."""
        if not quantized:
            parts = (name, self._part(name, "scales"), self._part(name, "biases"))
            before = [self._weights[part] for part in parts if part in self._weights]
            seed = zlib.crc32(name.encode())
            made, moved = _quantized(self._merged(name), before, self._packing[name], self._dtype, self._way, seed)
            self._counts.append((moved, made[0].size * 32 // self._packing[name]["bits"]))
            quantized |= dict(zip(parts, made, strict=False))
        return quantized.pop(part)

    def _merged(self, name: str) -> mx.array:
        if name in self._values:  # of a full fine-tuning
            return self._values[name].astype(mx.float32)
        module = name.removesuffix(".weight")
        product = self._values[f"{module}.lora_a"] @ self._values[f"{module}.lora_b"]
        delta = self._adapter.scale * (product if module == EMBEDDING else product.T)
        return lora_layers.merge(self._wide(name), delta, self._values.get(f"{module}.m"))

    def _wide(self, name: str) -> mx.array:
        if name not in self._packing:
            return self._weights.pop(name).astype(mx.float32)
        scales = self._weights.pop(self._part(name, "scales"))
        biases = self._weights.pop(self._part(name, "biases"), None)
        return lora_layers.dequantize(self._weights.pop(name), scales, biases, **self._packing[name])

    @staticmethod
    def _part(name: str, kind: str) -> str:
        return name.removesuffix("weight") + kind


def _quantized(
    weight: mx.array, before: Sequence[mx.array], how: Packing, dtype: mx.Dtype, way: str, seed: int
) -> tuple[Sequence[mx.array], int]:
    """A merged weight in the parts, and by the way, that it had `before`; and how many of its values are others."""
    if how["mode"] == "affine":
        *made, moved = requantize(weight, *before, group_size=how["group_size"], bits=how["bits"], way=way, seed=seed)
        return made, moved
    made = mx.quantize(weight.astype(dtype), **how)
    old, new = (lora_layers.dequantize(integers, scales, None, **how) for integers, scales in (before, made))
    return made, int((old != new).sum().item())
