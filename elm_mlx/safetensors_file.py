"""Safetensors files: their headers read, every number checked against the file, and tensors written one at a time.

A file is 8 bytes of length, a JSON object, and data without gaps. MLX and others believe a header as it stands, so
whoever opens a file reads it here first. Imports no numpy and no MLX: a tensor is a name of a type, a shape and bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.files import write_json
from elm_mlx.reading import short

# The format's names of types: what NumPy and MLX call them, and the bytes of a value.
_TYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "C64": ("complex64", 8), "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "BOOL": ("bool", 1), "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
}  # fmt: skip
TYPES = {own: name for own, (name, _) in _TYPES.items()}
SIZES = {own: size for own, (_, size) in _TYPES.items()}
_FORMAT_NAMES = {name: own for own, name in TYPES.items()}

SHARD_BYTES = 5 << 30  # mlx-lm's limit
INDEX = "model.safetensors.index.json"

# A model of 100,000 tensors in one file has a header of some 12 MB; the reference implementation allows 100 MB, which
# take gigabytes once they are read as JSON.
_MAX_HEADER_BYTES = 16 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its type by the format's name, its shape, and where it lies, in bytes from the beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is written.

    Attributes:
        dtype: its type as NumPy and MLX call it, such as "bfloat16".
        blocks: gives its bytes, little-endian and in row-major order, a piece at a time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[_FORMAT_NAMES[self.dtype]]


def weight_files(directory: Path) -> list[Path]:
    """Returns a model directory's files of weights: those that its index names, or without one all `model*`.

    Raises:
        InputError: there is none, or one is missing.
    """
    found = sorted(directory.glob("model*.safetensors"))
    index = directory / INDEX
    if index.exists():
        weight_map = reading.json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: holds no weight_map of names of files")
        named = set(weight_map.values())
        missing = sorted(named - {file.name for file in found})
        if missing:
            raise InputError(f"{directory}: {missing[0]} is missing, which {INDEX} names")
        found = [file for file in found if file.name in named]
    if not found:
        average = f"`elm-mlx average {directory} --last 1 --out DIR` makes a model of its newest checkpoint"
        hint = f" yet, as a training run that is not done; {average}" if (directory / "checkpoints").is_dir() else ""
        raise InputError(f"{directory}: holds no model.safetensors{hint}")
    return found


def read_header(path: Path) -> list[Entry]:
    """Returns the tensors of a safetensors file, in the order of their data.

    Raises:
        InputError: it cannot be opened, or is no well-formed safetensors file: says what is wrong.
    """
    return read_file(path)[0]


def read_file(path: Path) -> tuple[list[Entry], dict[str, Any]]:
    """Returns the tensors of a file as `read_header` does, and its `__metadata__`, as it stands there."""
    with reading.opened(path) as file:
        size = file.seek(0, 2)

        def read_at(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return _parse(path, size, read_at)


def parse_header(path: Path, size: int, read_at: Callable[[int, int], bytes]) -> list[Entry]:
    """Reads the header of a file of `size` bytes that is open already; `read_at` takes an offset and a length."""
    return _parse(path, size, read_at)[0]


def _parse(path: Path, size: int, read_at: Callable[[int, int], bytes]) -> tuple[list[Entry], dict[str, Any]]:
    length = int.from_bytes(read_at(0, 8), "little") if size >= 8 else 0
    if _MAX_HEADER_BYTES < length <= size - 8:
        raise InputError(f"{path}: its safetensors header has {length >> 20} MB, and at most 16 MB are read")
    if length > size - 8:
        raise InputError(f"{path}: not a safetensors file, or a truncated one: its header would not fit into it")
    described = _object(path, read_at(8, length))
    metadata = described.pop("__metadata__", None)
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
    placed = [Entry(e.name, e.dtype, e.shape, start + e.begin, start + e.end) for e in entries]
    return placed, metadata if isinstance(metadata, dict) else {}


def fingerprint(directory: Path, known: str | None = None) -> str:
    """Returns a SHA-256 that tells a model's weights from others', in milliseconds whatever its size.

    It is of the tensors' names, types and shapes, and of 4 KB from the middle of each.

    Args:
        known: one that was kept; it is returned where an earlier version made it of these weights, whose pieces lay
            behind the middle by the header's length.

    Raises:
        InputError: a file is missing or damaged.
    """
    paths = weight_files(directory)
    now = hash_of_pieces(paths)
    return known if known not in (None, now) and known == hash_of_pieces(paths, behind_middle=True) else now


def hash_of_pieces(paths: Sequence[Path], *, behind_middle: bool = False) -> str:
    """Returns the SHA-256 of `fingerprint`, of files of one's choice. Raises InputError as it does."""
    digest = hashlib.sha256()
    for path in paths:
        entries = read_header(path)
        with reading.opened(path) as file:
            for entry in entries:
                middle = max(entry.begin, (entry.begin + entry.end) // 2 - 2048)
                file.seek(middle + (entries[0].begin if behind_middle else 0))
                digest.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
                digest.update(file.read(min(4096, entry.end - entry.begin)))
    return digest.hexdigest()


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
        raise InputError(f"{path}: its safetensors header is not a JSON object")
    return entries


def _entry(path: Path, name: str, entry: Any) -> Entry:
    """Checks every number of an entry. Returns it with its offsets still counted from the end of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: {name!r} needs exactly dtype, shape and data_offsets in the header")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise InputError(f"{path}: {name!r} has the {what} {short(numbers)}: a list of sizes is needed")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise InputError(f"{path}: {name!r} has the type {short(dtype)}; supported are {', '.join(SIZES)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{path}: {name!r} has the data_offsets {short(offsets)}: a begin and an end are needed")
    needed = math.prod(shape) * SIZES[dtype]
    if needed != offsets[1] - offsets[0]:
        raise InputError(
            f"{path}: {name!r} of shape {short(shape)} in {dtype} needs {needed} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]}"
        )
    return Entry(name, dtype, tuple(shape), *offsets)


def write_shards(
    directory: Path,
    tensors: Sequence[Pending],
    shard_bytes: int = SHARD_BYTES,
    *,
    parameters: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes `tensors` as `model.safetensors`, or as shards of at most `shard_bytes` and their index.

    Args:
        parameters: how many the model has, for the index.
        progress: called with the number of bytes written since the last call.

    Raises:
        OSError: they cannot be written.
    """
    shards: list[list[Pending]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards or [[]], strict=True):
        with (directory / name).open("wb") as file:
            write_tensors(file, shard, progress=progress)
            file.flush()
            os.fsync(file)  # while the caller still has other work, such as the hash of a source
    if count > 1:
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        metadata |= {"total_parameters": parameters} if parameters is not None else {}
        placed = sorted((tensor.name, name) for name, shard in zip(names, shards, strict=True) for tensor in shard)
        index = {"metadata": metadata, "weight_map": dict(placed)}
        write_json(directory / INDEX, index)


def write_tensors(
    file: BinaryIO,
    tensors: Sequence[Pending],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes one file of tensors, each made when it is written. Raises OSError."""
    _write_header(file, [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], metadata)
    for tensor in tensors:
        written = 0
        for block in tensor.blocks():
            file.write(block)
            written += block.nbytes
            progress(block.nbytes)
        assert written == tensor.nbytes, tensor.name


def write_arrays(file: BinaryIO, arrays: Mapping[str, Any]) -> None:
    """Writes arrays of NumPy or MLX as one file. MLX's own writer would not say why it failed. Raises OSError."""
    types = {name: str(array.dtype).rpartition(".")[2] for name, array in arrays.items()}
    _write_header(file, [(name, types[name], array.shape) for name, array in arrays.items()])
    for array in arrays.values():
        data = memoryview(array)
        file.write(data if data.c_contiguous else data.tobytes())


def _write_header(
    file: BinaryIO, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes what stands before the data of tensors, each a name, a type as in `Pending`, and a shape."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
    offset = 0
    for name, dtype, shape in tensors:
        own = _FORMAT_NAMES[dtype]
        end = offset + math.prod(shape) * SIZES[own]
        header[name] = {"dtype": own, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    file.write(len(text).to_bytes(8, "little") + text)
