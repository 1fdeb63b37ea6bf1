"""Tensors that are still on disk: the file, the views of its storages, and the casts between the three float types.

A view is PyTorch's: a flat storage, an offset, a shape, strides. NumPy has no bfloat16, so its values travel as uint16
bit patterns beside the name of their type.
"""

from __future__ import annotations

import math
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from elm_mlx.errors import InputError
from elm_mlx.safetensors_file import TYPES, parse_header

# How many bytes a value takes. Only floats can be a weight; uint32 is what MLX packs quantized weights into.
ITEM_SIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "uint32": 4,
}  # fmt: skip
FLOATS = ("float32", "float16", "bfloat16")
_SAFETENSORS_DTYPES = {own: name for own, name in TYPES.items() if name in ITEM_SIZES}

# Rows are read and cast this many bytes at a time: memory is bounded, and a block stays in the cache of a core.
BLOCK_BYTES = 1 << 20

# macOS refuses a single read above 2 GiB, and Linux cuts it short.
_READ_BYTES = 1 << 30

MAX_DIMENSIONS = 32  # what every numpy can address
_MAX_EMPTY = 1 << 31  # bounds the shape of a tensor without elements, which no storage bounds
_MAX_INDEX = 1 << 62
_SMALL_READ = 1 << 16
_LARGEST = {"float16": "65504", "bfloat16": "3.39e38", "float32": "3.40e38"}
_WIDER = {"float16": "bfloat16", "bfloat16": "float32"}


class File:
    """A regular file, open for reads by position until the last reference to it goes.

    It is never mapped: a mapped page counts as the process's memory.

    Raises:
        InputError: when it cannot be opened; from the reads, also when it is no longer what was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Without O_NONBLOCK a pipe would be waited for.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise self.fail(error.strerror or "cannot be opened") from None
        weakref.finalize(self, os.close, self._descriptor)
        state = os.fstat(self._descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise self.fail("is a directory" if stat.S_ISDIR(state.st_mode) else "is not a regular file")
        self.size = state.st_size
        self._changed = state.st_mtime_ns

    def fail(self, problem: str) -> InputError:
        """Returns the error to raise for `problem` in this file."""
        return InputError(f"{self.path}: {problem}")

    def read(self, start: int, size: int) -> bytes:
        """Reads bytes `start` to `start + size`, all of them."""
        self._require(start, size)
        buffer = bytearray(size)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, start: int, view: memoryview) -> None:
        """Fills `view`, a view of bytes, from byte `start` on."""
        self._require(start, len(view))
        done = 0
        while done < len(view):
            try:
                count = self._read_some(start + done, view[done : done + _READ_BYTES])
            except OSError as error:
                raise self.fail(error.strerror or "cannot be read") from None
            if not count:
                raise self.fail("was cut short while it was being read")
            done += count

    def _read_some(self, start: int, view: memoryview) -> int:
        """Reads as much as comes at once. macOS does not promise `os.preadv`, which spares a copy."""
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], start)
        data = os.pread(self._descriptor, len(view), start)
        view[: len(data)] = data
        return len(data)

    def _require(self, start: int, size: int) -> None:
        if start < 0 or size < 0 or start + size > self.size:
            raise self.fail(f"is truncated: it has {self.size:,} bytes, but byte {start + size:,} is needed")
        state = os.fstat(self._descriptor)
        if (state.st_size, state.st_mtime_ns) != (self.size, self._changed):
            raise self.fail("was changed while it was being read; try again once nothing writes to it")


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
        """Returns the same tensor without the rows from `count` on."""
        return replace(self, shape=(min(count, self.rows), *self.shape[1:]))

    def read(self) -> np.ndarray:
        """Reads the whole tensor."""
        return self.read_rows(0, self.rows).reshape(self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        """Reads runs of rows, first to last, about BLOCK_BYTES each, in the type that the file has."""
        row_bytes = max(1, self.nbytes // max(1, self.rows))
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, self.rows, step):
            yield self.read_rows(start, min(start + step, self.rows))


@dataclass
class Record:
    """The place of a storage's bytes. `start` may be filled in later, as long as nothing is read before."""

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
    """Returns the tensor, unnamed, that `storage` shows from its value number `offset` on; strides count values.

    Raises:
        InputError: when an element would lie outside of the storage, or two of them in one place.
    """
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise file.fail(f"it has a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if any(type(number) is not int or not 0 <= number < _MAX_INDEX for number in (offset, *shape, *strides)):
        raise file.fail("it has a tensor whose offset, shape or strides are negative, huge or not whole numbers")
    what = f"it has a tensor of shape {shape}"
    if 0 in shape:
        if offset > storage.numel or math.prod(max(1, length) for length in shape) > _MAX_EMPTY:
            raise file.fail(f"{what} that lies outside of its storage")
    else:
        end = offset + 1
        # From the innermost axis out: each must step past all that is inside of it.
        for stride, length in sorted(zip(strides, shape, strict=True)):
            if length > 1 and stride < end - offset:
                raise file.fail(f"{what} that repeats values by its strides; save it after .contiguous()")
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
    # An axis of length 1 has no say in the order of the values.
    in_order = all(n == 1 or a == b for n, a, b in zip(out.shape, strides, out.strides, strict=True))
    if out.flags.c_contiguous and span == out.nbytes and in_order:
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


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a safetensors file, in the order of their data.

    Raises:
        InputError: it cannot be opened, or is no well-formed safetensors file: says what is wrong.
    """
    file = File(path)
    tensors = {}
    for entry in parse_header(path, file.size, file.read):
        dtype = _SAFETENSORS_DTYPES.get(entry.dtype)
        if dtype is None:
            known = ", ".join(_SAFETENSORS_DTYPES)
            raise InputError(f"{path}: {entry.name!r} has the type {entry.dtype}; supported are {known}")
        numel = math.prod(entry.shape)
        storage = Storage(Record(entry.end - entry.begin, numel, entry.begin), dtype, 0, numel)
        tensors[entry.name] = view(file, storage, 0, entry.shape, row_major(entry.shape)).renamed(entry.name)
    return tensors


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides, in values, of a tensor whose values lie one after the other."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def numpy_dtype(dtype: str) -> np.dtype:
    """Returns the numpy type that carries `dtype`, little-endian as every checkpoint format is."""
    return np.dtype("<u2" if dtype == "bfloat16" else "?" if dtype == "bool" else dtype).newbyteorder("<")


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns `values` of type `dtype` (bfloat16 as bit patterns) as float32."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Rounds floats of any type to float32, float16 or bfloat16: to the nearest, ties to even; NaN stays NaN.

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
    """Returns whether `values` of type `dtype` (bfloat16 as bit patterns) hold neither NaN nor an infinity."""
    if dtype in ("bfloat16", "float16"):  # an exponent of all ones; on bits this is four times as fast as np.isfinite
        magnitudes = values.view(np.uint16) & 0x7FFF
        return values.size == 0 or int(magnitudes.max()) < (0x7F80 if dtype == "bfloat16" else 0x7C00)
    return bool(np.isfinite(values).all())


def cast_blocks(tensor: LazyTensor, dtype: str, not_finite: list[str]) -> Iterator[memoryview]:
    """Yields a tensor's bytes in `dtype` by blocks. A tensor with NaN or infinities adds its name to `not_finite`.

    Raises:
        InputError: a value overflows `dtype`; names the tensor.
    """
    for block in tensor.blocks():
        values = cast(block, tensor.dtype, dtype)
        if not all_finite(values, dtype):
            _refuse_overflow(tensor, block, values, dtype)
            if tensor.name not in not_finite:
                not_finite.append(tensor.name)
        yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _refuse_overflow(tensor: LazyTensor, block: np.ndarray, values: np.ndarray, dtype: str) -> None:
    """Raises InputError where a finite value has become infinite."""
    wide = block if tensor.dtype == "float64" else to_float32(block, tensor.dtype)
    lost = np.isfinite(wide) & ~np.isfinite(to_float32(values, dtype))
    if lost.any():
        value = float(np.abs(wide[lost]).max())
        wider = f": use --dtype {_WIDER[dtype]}" if dtype in _WIDER else ""
        raise InputError(
            f"{tensor.name} holds values up to {value:.6g}, but {dtype} ends at {_LARGEST[dtype]}{wider}; "
            "nothing was written"
        )
