"""The safetensors format: tensors still on disk, and the header that a writer puts in front.

Knows 8 bytes of length, a JSON header, data without gaps. Checks every number in the header against the
file before a byte of data is used; a tensor costs no memory until its rows are asked for. Knows nothing of
models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx.errors import InputError
from elm_mlx_convert.archive import File
from elm_mlx_convert.tensors import ITEM_SIZES, LazyTensor, numpy_dtype

# The format's own names for our dtypes.
_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint32": "U32", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

# The reference implementation's limit.
_MAX_HEADER_BYTES = 100_000_000


def read(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, in the order of their data.

    Raises:
        InputError: it cannot be opened, or is no well-formed safetensors file: says what is wrong.
    """
    file = File(path)
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else _MAX_HEADER_BYTES + 1
    if length > min(_MAX_HEADER_BYTES, file.size - 8):
        raise InputError(f"{path}: no safetensors file, or a truncated one: its header would not fit into it")
    entries = _header(path, file.read(8, length))
    placed = sorted((_check(path, name, entry) for name, entry in entries.items()), key=lambda t: (t[2], t[3]))
    reached = 0
    tensors = {}
    for name, dtype, begin, end, shape in placed:
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a hole before it"
            raise InputError(f"{path}: {name!r} {what} (bytes {begin} to {end}, after {reached})")
        reached = end
        tensors[name] = _lazy(file, name, shape, dtype, 8 + length + begin)
    if 8 + length + reached != file.size:
        raise InputError(f"{path}: its tensors take {reached} bytes, but {file.size - 8 - length} follow the header")
    return tensors


def header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """What stands before the data of `(name, dtype, shape)` tensors laid out one after the other."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * ITEM_SIZES[dtype]
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def _lazy(file: File, name: str, shape: tuple[int, ...], dtype: str, offset: int) -> LazyTensor:
    row_shape = shape[1:]
    row_bytes = math.prod(row_shape) * ITEM_SIZES[dtype]

    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, *row_shape), numpy_dtype(dtype))
        file.read_into(offset + start * row_bytes, rows.reshape(-1).view(np.uint8).data)
        return rows

    return LazyTensor(name, shape, dtype, read_rows)


def _header(path: Path, text: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name is there twice")
        return values

    try:
        entries = json.loads(text.decode(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its safetensors header cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: its safetensors header is no JSON object")
    entries.pop("__metadata__", None)
    return entries


def _check(path: Path, name: str, entry: Any) -> tuple[str, str, int, int, tuple[int, ...]]:
    """`(name, dtype, begin, end, shape)` of one header entry, each number found to make sense."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: {name!r} needs exactly dtype, shape and data_offsets in the header")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise InputError(f"{path}: {name!r} has the {what} {_short(numbers)}: a list of sizes is needed")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(f"{path}: {name!r} has the type {_short(dtype)}; known are {', '.join(_DTYPES)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{path}: {name!r} has the data_offsets {_short(offsets)}: a begin and an end are needed")
    needed = math.prod(shape) * ITEM_SIZES[_DTYPES[dtype]]
    if needed != offsets[1] - offsets[0]:
        raise InputError(
            f"{path}: {name!r} of shape {_short(shape)} in {dtype} needs {needed} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]}"
        )
    return name, _DTYPES[dtype], offsets[0], offsets[1], tuple(shape)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
