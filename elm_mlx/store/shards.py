"""Arrays into the safetensors files of a model directory, one at a time.

Knows the format's header, the limit of a shard and its index. An array is asked for when it is to be written and
forgotten then, so that memory is bounded by the largest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

SHARD_BYTES = 5 << 30  # mlx-lm's limit

_NAMES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint64: "U64", mx.uint32: "U32", mx.uint8: "U8",
    mx.int64: "I64", mx.int32: "I32",
}  # fmt: skip


@dataclass(frozen=True)
class Pending:
    """An array that is yet to be made."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    make: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.size)


def write(directory: Path, tensors: Sequence[Pending], shard_bytes: int = SHARD_BYTES) -> None:
    """`tensors` as `model.safetensors`, or as shards of at most `shard_bytes` and their index.

    Raises:
        OSError: they cannot be written.
    """
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            _write(file, shard)
    if count > 1:
        placed = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": dict(sorted(placed.items())),
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_arrays(file: BinaryIO, arrays: Mapping[str, mx.array]) -> None:
    """`arrays` as one file. MLX's own writer would not say why it failed. Raises OSError."""
    _write(
        file,
        [Pending(name, array.dtype, array.shape, partial(arrays.__getitem__, name)) for name, array in arrays.items()],
    )


def _write(file: BinaryIO, tensors: Sequence[Pending]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        array = tensor.make()
        assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), tensor.name
        file.write(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))
        del array
        mx.clear_cache()
