"""The tensors of a safetensors file, still on disk: one costs no memory until its rows are asked for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from elm_mlx.errors import InputError
from elm_mlx.safetensors_file import TYPES, parse_header
from elm_mlx_convert.tensors import ITEM_SIZES, File, LazyTensor, numpy_dtype

_DTYPES = {own: name for own, name in TYPES.items() if name in ITEM_SIZES}


def read(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, in the order of their data.

    Raises:
        InputError: it cannot be opened, or is no well-formed safetensors file: says what is wrong.
    """
    file = File(path)
    tensors = {}
    for entry in parse_header(path, file.size, file.read):
        if entry.dtype not in _DTYPES:
            raise InputError(f"{path}: {entry.name!r} has the type {entry.dtype}; known are {', '.join(_DTYPES)}")
        tensors[entry.name] = _lazy(file, entry.name, entry.shape, _DTYPES[entry.dtype], entry.begin)
    return tensors


def _lazy(file: File, name: str, shape: tuple[int, ...], dtype: str, offset: int) -> LazyTensor:
    row_shape = shape[1:]
    row_bytes = math.prod(row_shape) * ITEM_SIZES[dtype]

    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, *row_shape), numpy_dtype(dtype))
        file.read_into(offset + start * row_bytes, rows.reshape(-1).view(np.uint8).data)
        return rows

    return LazyTensor(name, shape, dtype, read_rows)
