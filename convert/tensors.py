"""A tensor that is still on disk, and the casts between the three float types.

Knows nothing of file formats: a reader hands in a function that reads rows. numpy has no
bfloat16, so its values travel as uint16 bit patterns beside the name of their type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

# How many bytes a value takes. Only floats can be a weight; uint32 is what MLX packs quantized weights into.
ITEM_SIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "uint32": 4,
}  # fmt: skip
FLOATS = ("float32", "float16", "bfloat16")

# Rows are read and cast this many bytes at a time: memory is bounded, and a block stays in the cache of a core.
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's description, and how to read it.

    Args:
        name: as the file calls it, or canonical once `names` has renamed it.
        shape: may be `()`.
        dtype: a key of ITEM_SIZES.
        read_rows: `(start, stop) -> array` of `shape[1:]` rows along the first axis, C order, in the
            numpy type of `dtype` (uint16 for bfloat16). A scalar is read as one row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read_rows: Callable[[int, int], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_SIZES[self.dtype]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def renamed(self, name: str) -> LazyTensor:
        return replace(self, name=name)

    def first_rows(self, count: int) -> LazyTensor:
        """The same tensor without the rows from `count` on."""
        return replace(self, shape=(min(count, self.rows), *self.shape[1:]))

    def read(self) -> np.ndarray:
        """The whole tensor."""
        return self.read_rows(0, self.rows).reshape(self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        """Runs of rows, first to last, about BLOCK_BYTES each, in the type that the file has."""
        row_bytes = max(1, self.nbytes // max(1, self.rows))
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, self.rows, step):
            yield self.read_rows(start, min(start + step, self.rows))


def numpy_dtype(dtype: str) -> np.dtype:
    """The numpy type that carries `dtype`, little-endian as every checkpoint format is."""
    return np.dtype("<u2" if dtype == "bfloat16" else "?" if dtype == "bool" else dtype).newbyteorder("<")


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` of type `dtype` (bfloat16 as bit patterns) as float32."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """From any float type to float32, float16 or bfloat16: to the nearest value, ties to even; NaN stays NaN.

    What is too large becomes infinite, without a warning: see `all_finite`.
    """
    if source == target:
        return values
    with np.errstate(over="ignore"):
        wide = to_float32(values, source)
        if target != "bfloat16":
            return wide.astype(numpy_dtype(target), copy=False)
    bits = np.ascontiguousarray(wide).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    narrow = rounded.astype(np.uint16)
    nan = np.isnan(wide)
    if nan.any():  # rounding up may have carried a NaN's bits into another number's
        narrow[nan] = 0x7FC0
    return narrow


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether `values` of type `dtype` (bfloat16 as bit patterns) holds neither NaN nor an infinity."""
    if dtype in ("bfloat16", "float16"):  # an exponent of all ones; on bits this is four times as fast as np.isfinite
        magnitudes = values.view(np.uint16) & 0x7FFF
        return values.size == 0 or int(magnitudes.max()) < (0x7F80 if dtype == "bfloat16" else 0x7C00)
    return bool(np.isfinite(values).all())
