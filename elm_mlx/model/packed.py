"""Keys and values in 8 or 4 bits: packed as they come, unpacked or multiplied as they are for attention.

Each group of 64 values of a head (32 where 64 do not divide it) is `code * scale + bias`, as MLX quantizes weights. Of
4 bits a group's halves are interleaved first, so that the low halves of its bytes are the first one, and unpacking
joins two runs of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from elm_mlx import device
from elm_mlx.errors import InputError

BITS = (8, 4)
_GROUPS = (64, 32)
_LOW = 0x0F0F0F0F
FEW = 8  # queries that a GPU multiplies with codes as they are: for more, unpacking once is cheaper


def group_size(head_dim: int) -> int:
    """Returns how many values of a head share a scale. Raises InputError where neither 64 nor 32 divide it."""
    found = next((size for size in _GROUPS if head_dim % size == 0), None)
    if found is None:
        raise InputError(f"--kv-bits: heads of {head_dim} values cannot be quantized: groups of 64 or 32 do not fit")
    return found


@dataclass(frozen=True)
class Packed:
    """Quantized keys or values of several positions.

    Attributes:
        codes: `(batch, kv_heads, positions, head_dim * bits / 32)`, in words of 32 bits.
        scales, biases: `(batch, kv_heads, positions, groups)`, in the type that is computed in.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Returns `(batch, kv_heads, positions, head_dim)`, of the values that the codes stand for."""
        batch, kv_heads, positions, words = self.codes.shape
        return batch, kv_heads, positions, words * 32 // self.bits

    @property
    def dtype(self) -> mx.Dtype:
        return self.scales.dtype

    @property
    def head_dim(self) -> int:
        return self.shape[3]

    @property
    def group(self) -> int:
        """Returns how many values share a scale."""
        return self.head_dim // self.scales.shape[-1]

    def unpacked(self) -> mx.array:
        """Returns the values that the codes stand for, `(batch, kv_heads, positions, head_dim)`.

        Each pass is an operation of its own: what `mx.compile` would make of several on a CPU takes twice as long.
        """
        if device.on_gpu():
            return self._apart(mx.dequantize(self.codes, self.scales, self.biases, self.group, self.bits))
        codes = self.codes.reshape(*self.scales.shape, -1)
        if self.bits == 4:  # four bytes at a time
            low, high = self._pass(codes & _LOW), self._pass(self._pass(codes >> 4) & _LOW)
            codes = mx.concatenate([low, high], axis=-1)
        values = self._pass(codes.view(mx.uint8).astype(self.scales.dtype))
        scales, biases = (self._pass(mx.broadcast_to(x[..., None], values.shape)) for x in (self.scales, self.biases))
        return (self._pass(values * scales) + biases).reshape(self.shape)

    def scores(self, queries: mx.array) -> mx.array:
        """Returns products of queries `(batch, kv_heads, n, head_dim)` with each key."""
        return self._product(self._together(queries), True)

    def mixed(self, weights: mx.array) -> mx.array:
        """Returns the sum of all values by weights `(batch, kv_heads, n, positions)`."""
        return self._apart(self._product(weights, False))

    def _pass(self, x: mx.array) -> mx.array:
        """Returns `x`, in a way that `mx.compile` fuses nothing over."""
        return mx.depends([x], [self.codes])[0]

    def _product(self, x: mx.array, transpose: bool) -> mx.array:
        return mx.quantized_matmul(x, self.codes, self.scales, self.biases, transpose, self.group, self.bits)

    def _together(self, x: mx.array) -> mx.array:
        return interleaved(x, self.group) if self.bits == 4 else x

    def _apart(self, x: mx.array) -> mx.array:
        if self.bits == 8:
            return x
        return x.reshape(*x.shape[:-1], -1, self.group // 2, 2).swapaxes(-1, -2).reshape(x.shape)


def interleaved(x: mx.array, group: int) -> mx.array:
    """Returns `(..., head_dim)` with the halves of each group interleaved, as codes of 4 bits are packed."""
    return x.reshape(*x.shape[:-1], -1, 2, group // 2).swapaxes(-1, -2).reshape(x.shape)


def pack(x: mx.array, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """Quantizes `(batch, kv_heads, length, head_dim)`: codes, scales and biases as of `Packed`."""
    group = group_size(x.shape[-1])
    return tuple(mx.quantize(interleaved(x, group) if bits == 4 else x, group, bits))


def attention(queries: mx.array, keys: Packed, values: Packed, scale: float, mask: mx.array | None) -> mx.array:
    """Softmax attention of `(batch, heads, length, head_dim)` by products with codes, as a GPU has them.

    `mask` is boolean, `(…, length, positions)`.
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads, positions = keys.codes.shape[1:3]
    grouped = (queries * scale).reshape(batch, kv_heads, -1, head_dim)
    scores = keys.scores(grouped).reshape(batch, heads, length, positions)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(batch, kv_heads, -1, positions)
    return values.mixed(weights).reshape(batch, heads, length, head_dim)


def whole(x: mx.array | Packed) -> mx.array:
    """Returns keys or values, unpacked where they are quantized."""
    return x.unpacked() if isinstance(x, Packed) else x


def scales_and_biases(x: mx.array | Packed) -> tuple[mx.array, ...]:
    """Returns those of quantized keys or values; none of others."""
    return (x.scales, x.biases) if isinstance(x, Packed) else ()
