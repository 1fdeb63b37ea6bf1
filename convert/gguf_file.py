"""GGUF, llama.cpp's file format: its metadata and the places of its tensors, every number checked before its use.

A file is 4 letters, a version, two counts, metadata (keys with typed values), a name, shape, GGML type and offset for
each tensor, and from the next multiple of the alignment on the tensors' bytes. All of it is little-endian. Programs
that believed a file's sizes have read past the end of their memory; here every count, length and offset is compared
with the bytes that the file has, and what a header may take is bounded: strings in arrays, of which a vocabulary has
hundreds of thousands, stay the bytes that they are in the file until they are asked for.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from elm_mlx.errors import InputError
from elm_mlx.reading import counted, limit_size, short
from elm_mlx_convert.tensors import File

MAGIC = b"GGUF"
VERSION = 3  # 2 differs in nothing but that its files are never big-endian
ALIGNMENT = 32  # where the metadata names none

# A vocabulary of 262,144 tokens takes some 8 MB with scores and types, the merges of one some 6 MB.
_MAX_HEADER_BYTES = 64 << 20
_MAX_KEYS = 10_000  # models have some 40
_MAX_TENSORS = 100_000  # the largest mixtures of experts have some 2,000
_MAX_KEY_BYTES = 65_535
_MAX_NAME_BYTES = 256  # the format says 64, which some builds of llama.cpp raise
_MAX_TEXT_BYTES = 16 << 20
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class GgmlType:
    """A type of values: `block` of them, neighbours in a row, take `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


_TYPES = {
    0: GgmlType("F32", 1, 4), 1: GgmlType("F16", 1, 2), 2: GgmlType("Q4_0", 32, 18), 3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22), 7: GgmlType("Q5_1", 32, 24), 8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84), 11: GgmlType("Q3_K", 256, 110), 12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176), 14: GgmlType("Q6_K", 256, 210),
    16: GgmlType("IQ2_XXS", 256, 66), 17: GgmlType("IQ2_XS", 256, 74), 18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50), 20: GgmlType("IQ4_NL", 32, 18), 21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82), 23: GgmlType("IQ4_XS", 256, 136), 24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2), 26: GgmlType("I32", 1, 4), 27: GgmlType("I64", 1, 8), 28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56), 30: GgmlType("BF16", 1, 2), 34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66), 39: GgmlType("MXFP4", 32, 17), 40: GgmlType("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
}  # fmt: skip
TYPES = {kind.name: kind for kind in _TYPES.values()}
TYPE_NUMBERS = {kind.name: number for number, kind in _TYPES.items()}
# Of these llama.cpp has given up all but Q8_1 and Q8_K, which it computes with and no file stores.
_NOT_STORED = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

# Types of metadata, by number.
NUMBER_TYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9
_FLOAT32 = 6

_LENGTH = struct.Struct("<Q")


class Strings(Sequence[str]):
    """An array of strings as it stands in the file: each its length, in 8 bytes, and its UTF-8.

    Args:
        ends: where in `data` each string ends, strictly increasing.
        where: file and key, for errors. InputError is raised where a string that is asked for is not UTF-8.
    """

    def __init__(self, data: bytes, ends: np.ndarray, where: str) -> None:
        self._data = data
        self._ends = ends
        self._where = where

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        begin = int(self._ends[at - 1]) if at else 0
        return _text(self._data[begin + _LENGTH.size : int(self._ends[at])], f"{self._where}[{at}]")

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for at, end in enumerate(self._ends.tolist()):
            yield _text(self._data[begin + _LENGTH.size : end], f"{self._where}[{at}]")
            begin = end


Value = int | float | bool | str | np.ndarray | Strings
Metadatum = int | float | bool | str | np.ndarray | list[str]  # what is written


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file.

    Args:
        shape: in row-major order, as NumPy and MLX have it: the file names the axes the other way round.
        begin: the byte of the file where it begins.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size // self.type.block * self.type.nbytes

    @property
    def row_bytes(self) -> int:
        """The bytes of a row, which is what shares the last axis."""
        return self.shape[-1] // self.type.block * self.type.nbytes


@dataclass(frozen=True)
class GgufHeader:
    """Everything in a file but its tensors' bytes, which `file` reads.

    Args:
        metadata: numbers as Python has them, strings, and arrays: of numbers and flags as NumPy's, of strings as
            `Strings`.
        tensors: in the order of the file's list.
    """

    file: File
    metadata: dict[str, Value]
    tensors: dict[str, TensorEntry]


def read_header(path: Path) -> GgufHeader:
    """Reads what stands before a file's tensors, in bounded memory, and checks that they are where it says.

    Raises:
        InputError: it cannot be opened, is of version 1 or big-endian, or is damaged or hostile: says what is wrong.
    """
    file = File(path)
    cursor = _Cursor(file)
    if file.size < 24 or cursor.take(4, "its first letters") != MAGIC:
        raise file.fail("is not a GGUF file, or a truncated one")
    version = cursor.number("<I")
    if version & 0xFFFF == 0:
        raise file.fail("is a big-endian GGUF file: convert it on the machine that it is for")
    if version == 1:
        raise file.fail("is a GGUF file of version 1, which nothing writes since 2023: make it anew")
    if version not in (2, 3):
        raise file.fail(f"is a GGUF file of version {version:,}; versions 2 and 3 are read")
    tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
    if key_count > _MAX_KEYS or tensor_count > _MAX_TENSORS:
        raise file.fail(
            f"says that it has {key_count:,} keys and {tensor_count:,} tensors; at most {_MAX_KEYS:,} and "
            f"{_MAX_TENSORS:,} are read"
        )
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.text("a key of its metadata", _MAX_KEY_BYTES)
        if not key or key in metadata:
            raise file.fail(f"has the key {short(key)} twice in its metadata" if key else "has a key without a name")
        metadata[key] = cursor.value(key)
    alignment = _alignment(file, metadata)
    listed = [cursor.tensor(number) for number in range(tensor_count)]
    data = -(-cursor.at // alignment) * alignment
    return GgufHeader(file, metadata, _placed(file, listed, data, alignment))


def _alignment(file: File, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise file.fail(f"has the general.alignment {short(alignment)}: a power of two up to 2**20 is needed")
    return alignment


def _placed(file: File, listed: list[TensorEntry], data: int, alignment: int) -> dict[str, TensorEntry]:
    """Returns the tensors by name with their places in the file, which `listed` counts from `data`, each checked."""
    tensors: dict[str, TensorEntry] = {}
    for entry in listed:
        if entry.name in tensors:
            raise file.fail(f"has the tensor {short(entry.name)} twice")
        begin = data + entry.begin
        if entry.begin % alignment:
            raise file.fail(f"has {short(entry.name)} at {entry.begin:,}, which is no multiple of {alignment:,}")
        if begin + entry.nbytes > file.size:
            raise file.fail(
                f"is truncated, or wrong about {short(entry.name)}: it has {file.size:,} bytes, and the tensor ends "
                f"at {begin + entry.nbytes:,}"
            )
        tensors[entry.name] = TensorEntry(entry.name, entry.type, entry.shape, begin)
    reached, before = data, ""
    for entry in sorted(tensors.values(), key=lambda entry: entry.begin):
        if entry.begin < reached:
            raise file.fail(f"has the tensors {short(before)} and {short(entry.name)} in the same place")
        reached, before = entry.begin + entry.nbytes, entry.name
    return tensors


class _Cursor:
    """Reads a header from its beginning on. `at` counts bytes, of which the next is to be read."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._data = bytearray()  # the file up to some byte past `at`
        self.at = 0

    def _need(self, end: int, what: str) -> None:
        """Has `_data` reach `end`. Raises InputError where the file, or the limit, ends before that."""
        if end > self._file.size:
            raise self._file.fail(
                f"is truncated or damaged: it has {self._file.size:,} bytes, and {what} ends at {end:,}"
            )
        if end > _MAX_HEADER_BYTES:
            raise self._file.fail(f"has a header of more than {limit_size(_MAX_HEADER_BYTES)}, by {what}")
        have = len(self._data)
        if end > have:
            self._data += self._file.read(have, min(max(end - have, _CHUNK_BYTES), self._file.size - have))

    def take(self, count: int, what: str) -> bytes:
        self._need(self.at + count, what)
        self.at += count
        return bytes(memoryview(self._data)[self.at - count : self.at])

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), "its header"))[0]

    def text(self, what: str, most: int) -> str:
        length = self.number("<Q")
        if length > most:
            raise self._file.fail(f"is damaged: {what} has {length:,} bytes, and at most {most:,} are read")
        return _text(self.take(length, what), f"{self._file.path}: {what}")

    def value(self, key: str) -> Value:
        """Reads a value of metadata, behind its type's number."""
        what = short(key)
        kind = self.number("<I")
        if kind == STRING:
            return self.text(what, _MAX_TEXT_BYTES)
        if kind == ARRAY:
            return self._array(what)
        found = self._numbers(kind, 1, what)[0]
        # Of float32 the shortest number that is it: 1e-05, and not 9.999999747378752e-06.
        return float(str(found)) if kind == _FLOAT32 else found.item()

    def _array(self, what: str) -> Value:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == ARRAY:
            raise self._file.fail(f"has arrays within the array {what}, which no model has")
        if kind == STRING:
            return self._strings(count, what)
        return self._numbers(kind, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        dtype = NUMBER_TYPES.get(0 if kind == BOOL else kind)
        if dtype is None:
            raise self._file.fail(f"has {what} in the type number {kind:,} of metadata, which is not known")
        values = np.frombuffer(self.take(count * dtype.itemsize, f"its {what}"), dtype)
        if kind != BOOL:
            return values
        if values.size and values.max() > 1:
            raise self._file.fail(f"is damaged: {what} is neither true nor false")
        return values.astype(bool)

    def _strings(self, count: int, what: str) -> Strings:
        start = self.at
        self._need(start + count * _LENGTH.size, f"its {what}, {counted(count, 'string')},")
        ends = np.empty(count, np.uint32)  # a header is shorter than 2**32 bytes
        data, have, at, length_at = self._data, len(self._data), start, _LENGTH.unpack_from
        for number in range(count):
            if at + _LENGTH.size > have:
                self._need(at + _LENGTH.size, f"its {what}")
                have = len(data)
            at += _LENGTH.size + length_at(data, at)[0]
            if at > have:
                self._need(at, f"its {what}")
                have = len(data)
            ends[number] = at - start
        self.at = at
        return Strings(bytes(memoryview(data)[start:at]), ends, f"{self._file.path}: its {what}")

    def tensor(self, number: int) -> TensorEntry:
        """Reads an entry of the list of tensors. Its place is still counted from where the data begin."""
        name = self.text(f"the name of tensor {number:,}", _MAX_NAME_BYTES)
        if not name:
            raise self._file.fail(f"has no name for tensor {number:,}")
        what = short(name)
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._file.fail(f"has {what} of {dimensions:,} dimensions; 1 to {_MAX_DIMENSIONS} are read")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, "its list of tensors"))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        known = _TYPES.get(kind)
        if known is None:
            said = (
                f"{_NOT_STORED[kind]}, which llama.cpp reads no more" if kind in _NOT_STORED else "which is not known"
            )
            raise self._file.fail(f"has {what} in the GGML type number {kind:,}, {said}")
        if not all(0 < length < 1 << 62 for length in shape) or math.prod(shape) >= 1 << 62:
            raise self._file.fail(f"has {what} of the impossible shape {short(list(shape))}")
        if shape[-1] % known.block:
            raise self._file.fail(
                f"has {what} in {known.name}, whose blocks have {known.block} values, with rows of {shape[-1]:,}"
            )
        return TensorEntry(name, known, shape, offset)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 at byte {error.start:,}") from None


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that is made when it is written.

    Args:
        type: a key of TYPES.
        shape: in row-major order.
        blocks: gives its bytes in row-major order, a piece at a time.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // TYPES[self.type].block * TYPES[self.type].nbytes


def write(
    file: BinaryIO,
    metadata: Mapping[str, Metadatum],
    tensors: Sequence[GgufTensor],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a whole file, each tensor made when it is written.

    Args:
        metadata: whole numbers are written in 32 bits without sign, others in float32; arrays as they are, lists as
            strings.
        progress: called with the number of bytes of tensors written since the last call.

    Raises:
        OSError: it cannot be written.
    """
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_string(key), _typed(value)]
    offset = 0
    for tensor in tensors:
        assert tensor.shape[-1] % TYPES[tensor.type].block == 0, tensor.name
        head.append(_string(tensor.name) + struct.pack("<I", len(tensor.shape)))
        head.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        head.append(struct.pack("<IQ", TYPE_NUMBERS[tensor.type], offset))
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    data = b"".join(head)
    file.write(data + bytes(-len(data) % ALIGNMENT))
    for tensor in tensors:
        written = 0
        for block in tensor.blocks():
            file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            written += block.nbytes
            progress(block.nbytes)
        assert written == tensor.nbytes, tensor.name
        file.write(bytes(-written % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return _LENGTH.pack(len(data)) + data


def _typed(value: Metadatum) -> bytes:
    """Returns a value of metadata behind its type's number."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _number_of("<u4"), value)
    if isinstance(value, float):
        return struct.pack("<If", _number_of("<f4"), value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kind = BOOL if value.dtype == bool else _number_of(value.dtype.newbyteorder("<").str)
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + np.ascontiguousarray(value).tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))


def _number_of(dtype: str) -> int:
    """Returns the number of a type of metadata."""
    return next(number for number, each in NUMBER_TYPES.items() if each == np.dtype(dtype))
