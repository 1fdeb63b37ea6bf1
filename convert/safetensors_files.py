"""The safetensors format: tensors still on disk, and the header that a writer puts in front.

Knows how tensors lie in the file; `elm_mlx.store.headers` has checked every number of it by then. A tensor costs no
memory until its rows are asked for. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from elm_mlx.errors import InputError
from elm_mlx.store import headers
from elm_mlx_convert.archive import File
from elm_mlx_convert.tensors import ITEM_SIZES, LazyTensor, numpy_dtype

# The format's own names for our dtypes.
_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint32": "U32", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def read(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, in the order of their data.

    Raises:
        InputError: it cannot be opened, or is no well-formed safetensors file: says what is wrong.
    """
    file = File(path)
    tensors = {}
    for entry in headers.parse(path, file.size, file.read):
        if entry.dtype not in _DTYPES:
            raise InputError(f"{path}: {entry.name!r} has the type {entry.dtype}; known are {', '.join(_DTYPES)}")
        tensors[entry.name] = _lazy(file, entry.name, entry.shape, _DTYPES[entry.dtype], entry.begin)
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
