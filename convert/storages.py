"""Views of a file's storages: tensors that are checked against the bytes that are there, and read row by row.

Knows PyTorch's way to describe a tensor (a flat storage, an offset, a shape, strides), not how a file
spells it. Strides and sharing survive: what is read is what the view shows, in C order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from elm_mlx_convert.archive import File
from elm_mlx_convert.tensors import LazyTensor, numpy_dtype

MAX_DIMENSIONS = 32  # what every numpy can address
_MAX_EMPTY = 1 << 31  # bounds the shape of a tensor without elements, which no storage bounds
_MAX_INDEX = 1 << 62
_SMALL_READ = 1 << 16


@dataclass
class Record:
    """A storage's bytes. `start` may be filled in later, as long as nothing is read before."""

    nbytes: int
    numel: int  # in the type that the file first mentions it with
    start: int = -1


@dataclass(frozen=True)
class Storage:
    """A record's values number `first` to `first + numel`, counted in `dtype`."""

    record: Record
    dtype: str
    first: int
    numel: int


def view(file: File, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> LazyTensor:
    """The tensor, unnamed, that `storage` shows from its value number `offset` on; strides count values.

    Raises:
        InputError: when an element would lie outside of the storage, or two of them in one place.
    """
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise file.fail(f"it has a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if any(type(number) is not int or not 0 <= number < _MAX_INDEX for number in (offset, *shape, *strides)):
        raise file.fail("it has a tensor whose offset, shape or strides are negative, huge or no whole numbers")
    what = f"it has a tensor of shape {shape}"
    if 0 in shape:
        if offset > storage.numel or math.prod(max(1, length) for length in shape) > _MAX_EMPTY:
            raise file.fail(f"{what} that lies outside of its storage")
    else:
        end = offset + 1
        # From the innermost axis out: each must step past all that is inside of it.
        for stride, length in sorted(zip(strides, shape, strict=True)):
            if length > 1 and stride < end - offset:
                raise file.fail(f"{what} that shows values more than once; save it after .contiguous()")
            end += (length - 1) * stride
        if end > storage.numel:
            raise file.fail(f"{what} that needs {end:,} values of a storage of {storage.numel:,}")
    return LazyTensor("", shape, storage.dtype, _View(file, storage, offset, shape, strides))


@dataclass(frozen=True)
class _View:
    """Reads rows of a tensor; what LazyTensor calls `read_rows`. Offset and strides count values."""

    file: File
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, start: int, stop: int) -> np.ndarray:
        shape, strides = self.shape or (1,), self.strides or (1,)
        if not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"rows {start} to {stop} of {shape[0]}")
        dtype = "uint8" if self.storage.dtype == "bool" else self.storage.dtype
        rows = np.empty((stop - start, *shape[1:]), numpy_dtype(dtype))
        if rows.size:
            first = self.storage.first + self.offset + start * strides[0]
            byte_strides = [stride * rows.itemsize for stride in strides]
            _gather(self.file, self.storage.record.start + first * rows.itemsize, byte_strides, rows)
        # A bool of any other byte than 0 and 1 confuses numpy.
        return rows != 0 if self.storage.dtype == "bool" else rows


def _gather(file: File, start: int, strides: list[int], out: np.ndarray) -> None:
    """Fills `out` with the values that lie `strides` bytes apart from byte `start` on.

    Reads at most twice the bytes asked for at once: where they lie wider apart, it halves the longest
    axis until the halves are dense, or small.
    """
    reach = [(length - 1) * stride for length, stride in zip(out.shape, strides, strict=True)]
    span = sum(reach) + out.itemsize
    if out.flags.c_contiguous and span == out.nbytes and _in_order(out, strides):
        file.read_into(start, out.reshape(-1).view(np.uint8).data)
    elif span <= max(_SMALL_READ, 2 * out.nbytes):
        block = np.empty(span // out.itemsize, out.dtype)
        file.read_into(start, block.view(np.uint8).data)
        out[...] = np.lib.stride_tricks.as_strided(block, out.shape, strides)
    else:
        axis = reach.index(max(reach))
        half = out.shape[axis] // 2
        low, high = np.split(out, [half], axis)
        _gather(file, start, strides, low)
        _gather(file, start + half * strides[axis], strides, high)


def _in_order(out: np.ndarray, strides: list[int]) -> bool:
    """Whether the file holds the values in the order in which `out` does; an axis of length 1 has no say."""
    return all(n == 1 or a == b for n, a, b in zip(out.shape, strides, out.strides, strict=True))
