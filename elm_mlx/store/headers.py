"""The header of a safetensors file, every number in it checked against the file.

Knows 8 bytes of length, a JSON object, data without gaps; reads no data and imports no numpy. MLX and
others believe a header as it stands, so whoever opens a file asks here first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.errors import InputError

# Bytes of a value, by the format's names of types.
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# A model of 100,000 tensors in one file has a header of some 12 MB; the reference implementation allows 100 MB, which
# take gigabytes once they are read as JSON.
_MAX_HEADER_BYTES = 16 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor: its type by the format's name, its shape, and where in the file it lies, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read(path: Path) -> list[Entry]:
    """The tensors of a safetensors file, in the order of their data.

    Raises:
        InputError: it cannot be opened, or is no well-formed safetensors file: says what is wrong.
    """
    with reading.opened(path) as file:
        size = file.seek(0, 2)

        def read_at(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return parse(path, size, read_at)


def parse(path: Path, size: int, read_at: Callable[[int, int], bytes]) -> list[Entry]:
    """`read`, of a file of `size` bytes that is open already; `read_at` takes an offset and a length."""
    length = int.from_bytes(read_at(0, 8), "little") if size >= 8 else 0
    if _MAX_HEADER_BYTES < length <= size - 8:
        raise InputError(f"{path}: its safetensors header has {length >> 20} MB, and at most 16 MB are read")
    if length > size - 8:
        raise InputError(f"{path}: no safetensors file, or a truncated one: its header would not fit into it")
    described = _object(path, read_at(8, length))
    entries = sorted(
        (_entry(path, name, values) for name, values in described.items()), key=lambda entry: (entry.begin, entry.end)
    )
    reached = 0
    for entry in entries:
        if entry.begin != reached:
            what = "overlaps the tensor before it" if entry.begin < reached else "leaves a hole before it"
            raise InputError(f"{path}: {entry.name!r} {what} (bytes {entry.begin} to {entry.end}, after {reached})")
        reached = entry.end
    start = 8 + length
    if start + reached != size:
        raise InputError(f"{path}: its tensors take {reached} bytes, but {size - start} follow the header")
    return [Entry(e.name, e.dtype, e.shape, start + e.begin, start + e.end) for e in entries]


def _object(path: Path, text: bytes) -> dict[str, Any]:
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


def _entry(path: Path, name: str, entry: Any) -> Entry:
    """One entry, its offsets still counted from the end of the header, each number found to make sense."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: {name!r} needs exactly dtype, shape and data_offsets in the header")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise InputError(f"{path}: {name!r} has the {what} {_short(numbers)}: a list of sizes is needed")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise InputError(f"{path}: {name!r} has the type {_short(dtype)}; known are {', '.join(SIZES)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{path}: {name!r} has the data_offsets {_short(offsets)}: a begin and an end are needed")
    needed = math.prod(shape) * SIZES[dtype]
    if needed != offsets[1] - offsets[0]:
        raise InputError(
            f"{path}: {name!r} of shape {_short(shape)} in {dtype} needs {needed} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]}"
        )
    return Entry(name, dtype, tuple(shape), *offsets)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
