"""The weights of a fused model, one by one: dense or quantized, changed by the adapter or not.

What was quantized lies on a grid: MLX's affine format has groups of a row, each with a scale and a bias, and the
integers one after another in words of 32 bits. A changed weight goes back into it in three ways, none always best:

- NEAREST: the integer that comes nearest, on the grid that was there, or on a new one where that comes nearer for the
  group. Adds the least error to each weight, but a change of less than half a step is lost, of a small adapter all.
- LOT: on the grid that was there, one of the two integers around the new value, drawn so that its mean is that value
  (stochastic rounding; Croci et al., 2022, section 2). What is lost of one weight another has too much of: a change of
  low rank, which speaks in the sum over thousands of weights, comes through.
- ANEW: a new grid for every group. Moves it under every weight, however small the change.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from elm_mlx.model import lora_layers
from elm_mlx.model.config import AFFINE, Config
from elm_mlx.safetensors_file import Pending
from elm_mlx.store.adapters import EMBEDDING, Adapter
from elm_mlx.store.loading import Packing, part_of, pending, stored_type

WAYS = LOT, NEAREST, ANEW = "lot", "nearest", "anew"
_SAME = 1e-5  # of a step: what float32 makes of a value that lies on its grid
_ROWS = 1024  # at once: a few float32 copies of so many are in memory together


@dataclass
class Merge:
    """The tensors of a fused directory, each made once, when it is written: `weights` is emptied on the way.

    An array that MLX reads from a file stays in memory as long as anyone holds it.

    Args:
        weights, packing: as `read_weights` has them.
        values: the adapter's arrays by their names in the model.
        dequantize: write what is quantized in a type of floats.
        dtype: that of all that is not quantized; None for what it is, and of what was quantized the model's.
        way: how what is quantized takes up the change, one of WAYS.
    """

    config: Config
    weights: dict[str, mx.array]
    packing: Mapping[str, Packing]
    values: Mapping[str, mx.array]
    adapter: Adapter
    dequantize: bool
    dtype: mx.Dtype | None
    way: str = NEAREST

    def __post_init__(self) -> None:
        self._dense_type = self.dtype or stored_type(self.config, self.weights, self.packing)
        self._counts: list[tuple[int, int]] = []

    @property
    def moved(self) -> float | None:
        """The share of the weights that were quantized anew that have another value than before; None without any."""
        moved, of = (sum(counts) for counts in zip(*self._counts, strict=True)) if self._counts else (0, 0)
        return moved / of if of else None

    def tensors(self, name: str, shape: tuple[int, ...]) -> list[Pending]:
        """Returns the weight `name` of that shape in the model, in the parts that it is stored in."""
        changes = self._changes(name)
        if name in self.packing and not self.dequantize:
            parts = [name, *(part_of(name, kind) for kind in ("scales", "biases"))]
            parts = [part for part in parts if part in self.weights]
            if not changes:
                return [self._copied(part) for part in parts]
            quantized: dict[str, mx.array] = {}
            return [
                pending(
                    part, self.weights[part].dtype, self.weights[part].shape,
                    partial(self._quantized_part, name, part, quantized),
                )
                for part in parts
            ]  # fmt: skip
        dtype = self._dense_type if name in self.packing else self.dtype or self.weights[name].dtype
        if not changes and name not in self.packing and dtype == self.weights[name].dtype:
            return [self._copied(name)]
        return [pending(name, dtype, shape, partial(self._dense, name, dtype, changes))]

    def _changes(self, name: str) -> bool:
        return name in self.values or name.removesuffix(".weight") in self.adapter.ranks

    def _copied(self, name: str) -> Pending:
        stored = self.weights[name]
        return pending(name, stored.dtype, stored.shape, partial(self.weights.pop, name))

    def _dense(self, name: str, dtype: mx.Dtype, changes: bool) -> mx.array:
        weight = self._merged(name) if changes else self._wide(name)
        return weight.astype(dtype)

    def _quantized_part(self, name: str, part: str, quantized: dict[str, mx.array]) -> mx.array:
        """Returns one of weight, scales and biases; the first call makes all, each is handed out once."""
        if not quantized:
            parts = (name, part_of(name, "scales"), part_of(name, "biases"))
            before = [self.weights[part] for part in parts if part in self.weights]
            seed = zlib.crc32(name.encode())
            made, moved = _quantized(self._merged(name), before, self.packing[name], self._dense_type, self.way, seed)
            self._counts.append((moved, made[0].size * 32 // self.packing[name]["bits"]))
            quantized |= dict(zip(parts, made, strict=False))
        return quantized.pop(part)

    def _merged(self, name: str) -> mx.array:
        if name in self.values:  # of a full fine-tuning
            return self.values[name].astype(mx.float32)
        module = name.removesuffix(".weight")
        product = self.values[f"{module}.lora_a"] @ self.values[f"{module}.lora_b"]
        delta = self.adapter.scale * (product if module == EMBEDDING else product.T)
        return lora_layers.merge(self._wide(name), delta, self.values.get(f"{module}.m"))

    def _wide(self, name: str) -> mx.array:
        if name not in self.packing:
            return self.weights.pop(name).astype(mx.float32)
        scales = self.weights.pop(part_of(name, "scales"))
        biases = self.weights.pop(part_of(name, "biases"), None)
        return lora_layers.dequantize(self.weights.pop(name), scales, biases, **self.packing[name])


def _quantized(
    weight: mx.array, before: Sequence[mx.array], how: Packing, dtype: mx.Dtype, way: str, seed: int
) -> tuple[Sequence[mx.array], int]:
    """Packs a merged weight in the parts that it had `before`. Returns them, and how many of its values are others."""
    if how["mode"] == AFFINE:
        *made, moved = requantize(weight, *before, group_size=how["group_size"], bits=how["bits"], way=way, seed=seed)
        return made, moved
    made = mx.quantize(weight.astype(dtype), **how)
    old, new = (lora_layers.dequantize(integers, scales, None, **how) for integers, scales in (before, made))
    return made, int((old != new).sum().item())


def requantize(
    weight: mx.array,
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group_size: int,
    bits: int,
    way: str = NEAREST,
    seed: int = 0,
) -> tuple[mx.array, mx.array, mx.array, int]:
    """Quantizes a changed weight in the format of what it was.

    Args:
        way: one of the three.
        seed: draws the lots: equal ones, equal bytes.
        weight: `(rows, columns)`, float32.
        packed, scales, biases: of what it was, `(rows, columns * bits / 32)` and `(rows, columns / group_size)`.

    Returns:
        The same three of `weight`, and how many of its values are other ones than before.
    """
    made: list[tuple[mx.array, ...]] = []
    moved = 0
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        before = (packed[rows], scales[rows], biases[rows])
        if way == LOT:
            key = mx.random.key((seed + start) % 2**32)
            *parts, changed = _by_lot(weight[rows], *before, group_size, bits, key)
        else:
            *parts, changed = _rows(weight[rows], *before, group_size, bits, anew=way == ANEW)
        mx.eval(parts, changed)
        made.append(tuple(parts))
        moved += int(changed.item())
        mx.clear_cache()
    words, new_scales, new_biases = (mx.concatenate(parts) for parts in zip(*made, strict=True))
    return words, new_scales, new_biases, moved


def pack_integers(codes: mx.array, bits: int) -> mx.array:
    """Packs integers `(rows, columns)` below 2 ** bits into words, `(rows, columns * bits / 32)`, the first lowest."""
    runs = codes.astype(mx.uint32).reshape(codes.shape[0], -1, 32)  # of so many integers as many words as bits
    words = [mx.zeros(runs.shape[:2], mx.uint32)] * bits
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (runs[..., i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (runs[..., i] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(codes.shape[0], -1)


def _rows(
    weight: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, *, anew: bool
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    groups = weight.reshape(weight.shape[0], -1, group_size)
    kept, kept_values = _nearest(groups, scales, biases, bits)
    fit = mx.quantize(weight, group_size=group_size, bits=bits)[1:]
    new_scales, new_biases = (value.astype(scales.dtype) for value in fit)
    fitted, fitted_values = _nearest(groups, new_scales, new_biases, bits)
    moves = mx.ones(scales.shape, mx.bool_) if anew else _error(fitted_values, groups) < _error(kept_values, groups)
    before = _codes(packed, groups.shape, bits)
    values = mx.where(moves[..., None], fitted_values, kept_values)
    return (
        pack_integers(mx.where(moves[..., None], fitted, kept).reshape(weight.shape), bits),
        mx.where(moves, new_scales, scales),
        mx.where(moves, new_biases, biases),
        (values != _values(before, scales, biases)).sum(),
    )


def _by_lot(
    weight: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, key: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    groups = weight.reshape(weight.shape[0], -1, group_size)
    before = _codes(packed, groups.shape, bits)
    steps = mx.abs(scales.astype(mx.float32)[..., None])
    change = (groups - _values(before, scales, biases)) / mx.where(steps == 0, mx.inf, steps)
    change = mx.where(mx.abs(change) < _SAME, 0, change) * mx.where(scales < 0, -1, 1)[..., None]
    codes = mx.clip(before + mx.floor(change + mx.random.uniform(shape=groups.shape, key=key)), 0, 2**bits - 1)
    return pack_integers(codes.reshape(weight.shape), bits), scales, biases, (codes != before).sum()


def _codes(packed: mx.array, shape: tuple[int, ...], bits: int) -> mx.array:
    """Returns the integers in `packed`, as float32 in groups: `(rows, groups, group_size)`."""
    ones, zeros = mx.ones(shape[:2]), mx.zeros(shape[:2])
    return mx.dequantize(packed, ones, zeros, group_size=shape[2], bits=bits).reshape(shape)


def _nearest(groups: mx.array, scales: mx.array, biases: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """Returns the integers whose values are nearest to `groups`, `(rows, groups, group_size)`, and those values."""
    scale, bias = scales.astype(mx.float32)[..., None], biases.astype(mx.float32)[..., None]
    step = mx.where(scale == 0, 1, scale)  # of a group whose weights are all alike, the bias
    codes = mx.clip(mx.round((groups - bias) / step), 0, 2**bits - 1)
    return codes, _values(codes, scales, biases)


def _values(codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    return codes * scales.astype(mx.float32)[..., None] + biases.astype(mx.float32)[..., None]


def _error(values: mx.array, groups: mx.array) -> mx.array:
    return mx.square(values - groups).sum(axis=-1)
