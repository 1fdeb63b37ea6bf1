"""Tensors into the safetensors files of a model directory, a few megabytes at a time.

Knows the layout of an MLX model directory, the limit of a shard, and that a value may not fit the type it
is cast to. Knows nothing of where tensors come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from elm_mlx import safetensors_file
from elm_mlx.errors import InputError
from elm_mlx.safetensors_file import SHARD_BYTES, Pending
from elm_mlx_convert.tensors import ITEM_SIZES, LazyTensor, all_finite, cast, to_float32

_LARGEST = {"float16": "65504", "bfloat16": "3.39e38", "float32": "3.40e38"}
_WIDER = {"float16": "bfloat16", "bfloat16": "float32"}


def written_bytes(tensors: Sequence[LazyTensor], dtype: str) -> int:
    """What the tensors take in `dtype`."""
    return sum(tensor.size for tensor in tensors) * ITEM_SIZES[dtype]


def write_weights(
    directory: Path,
    tensors: Sequence[LazyTensor],
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Writes `tensors`, cast to `dtype`, as `model.safetensors`, or as shards and their index.

    Args:
        shard_bytes: no shard is larger, unless a single tensor is.
        progress: called with the number of bytes written since the last call.

    Returns:
        The names of tensors that hold NaN or infinite values in the source.

    Raises:
        InputError: a value overflows `dtype`; names the tensor.
        OSError: the system could not write.
    """
    not_finite: list[str] = []
    pending = [Pending(t.name, dtype, t.shape, partial(_blocks, t, dtype, not_finite)) for t in tensors]
    safetensors_file.write_shards(
        directory, pending, shard_bytes, parameters=sum(t.size for t in tensors), progress=progress
    )
    return not_finite


def _blocks(tensor: LazyTensor, dtype: str, not_finite: list[str]) -> Iterator[memoryview]:
    for block in cast_blocks([tensor], dtype, not_finite):
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data


def cast_blocks(tensors: Sequence[LazyTensor], dtype: str, not_finite: list[str]) -> Iterator[np.ndarray]:
    """Every tensor's rows in `dtype`, a block at a time; names of those with NaN or infinities go to `not_finite`.

    Raises:
        InputError: a value overflows `dtype`; names the tensor.
    """
    for tensor in tensors:
        for block in tensor.blocks():
            values = cast(block, tensor.dtype, dtype)
            if not all_finite(values, dtype):
                _refuse_overflow(tensor, block, values, dtype)
                if tensor.name not in not_finite:
                    not_finite.append(tensor.name)
            yield values


def _refuse_overflow(tensor: LazyTensor, block: np.ndarray, values: np.ndarray, dtype: str) -> None:
    """Raises InputError where a finite value has become infinite."""
    wide = block if tensor.dtype == "float64" else to_float32(block, tensor.dtype)
    lost = np.isfinite(wide) & ~np.isfinite(to_float32(values, dtype))
    if lost.any():
        value = float(np.abs(wide[lost]).max())
        wider = f": use --dtype {_WIDER[dtype]}" if dtype in _WIDER else ""
        raise InputError(
            f"{tensor.name} holds values up to {value:.6g}, and {dtype} ends at {_LARGEST[dtype]}{wider}; "
            "nothing was written"
        )
