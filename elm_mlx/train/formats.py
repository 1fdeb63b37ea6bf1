"""Data files: what their names say, how they are opened, and the values in them with where each stands.

Knows JSON lines, JSON arrays, gzip, Zstandard, Parquet and plain text. Knows nothing of what a record must have.
Importing this imports neither pyarrow nor zstandard.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from elm_mlx import json_files, reading
from elm_mlx.errors import ElmError, InputError

PACKINGS = ("", ".gz", ".zst")
JSON = tuple(kind + packing for packing in PACKINGS for kind in (".jsonl", ".json", ".ndjson"))
TEXT = tuple(".txt" + packing for packing in PACKINGS)
PARQUET = ".parquet"

LINE_BYTES = 128 << 20  # one text on one line: text8 has 100 MB
_PACKED_BYTES = 1 << 12  # of Zstandard, unpacked at once: 4 bytes may become 128 KB


class BadRecord(Exception):
    """One record is not whole; the text is the reason."""


def suffix_of(path: Path, suffixes: Sequence[str]) -> str:
    """Which of `suffixes` the file's name ends with, the longest. Raises InputError."""
    matching = [suffix for suffix in suffixes if path.name.lower().endswith(suffix)]
    if not matching:
        raise InputError(f"{path}: no kind of data file that can be read, which are {', '.join(suffixes)}")
    return max(matching, key=len)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked as its name says.

    Raises:
        InputError: it cannot be read, or what was packed is damaged; also later, while the block reads.
        ElmError: Zstandard, and its package is not installed.
    """
    with reading.opened(path) as packed:
        try:
            with _unpacked(path, packed) as file:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: damaged gzip: {error}") from None


def is_array(path: Path) -> bool:
    """Whether the file is a JSON array. Its name doesn't tell: Hugging Face's `.json` are often lines."""
    with opened(path) as file:
        return next((line.lstrip().startswith(b"[") for _, line in lines(path, file)), False)


def lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each line that isn't blank, without its end, and its number from 1. Raises as `whole_lines`."""
    for number, line in whole_lines(path, file):
        if line.strip():
            yield number, line.rstrip()


def whole_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each line with its end, but without a byte order mark, and its number from 1.

    Raises:
        InputError: one is longer than any text, or the file is UTF-16.
    """
    for number in itertools.count(1):
        line = reading.limited_line(file, LINE_BYTES, f"{path}, line {number}")
        if not line:
            return
        yield number, reading.unmarked(line, str(path)) if number == 1 else line


def whole(path: Path, file: IO[bytes]) -> bytes:
    """All that is in an opened file. Raises InputError where that is more than fits into memory without harm."""
    most = reading.CORPUS_BYTES
    if path.name.lower().endswith((".gz", ".zst")):  # of which a few kilobytes may become gigabytes
        most = min(most, LINE_BYTES + 100 * path.stat().st_size)
    data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path}: more than {most >> 20} MB, which only JSON lines and separated texts may have")
    return data


def parsed(line: bytes) -> Any:
    """The value of a line of JSON. Raises BadRecord."""
    try:
        return json_files.load(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON: {error.msg} at column {error.pos + 1}") from None
    except ValueError as error:  # a number of thousands of digits; brackets nested by hundreds
        raise BadRecord(f"not JSON: {error}") from None


def array(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """Each element of a JSON array, and the line that it begins on.

    Raises:
        InputError: at what is no JSON: nobody knows where the next element begins.
    """
    space = re.compile(r"[ \t\r\n]*")
    line = at = 0

    def skip(position: int) -> int:
        """Past white space, counting lines from where the last call ended."""
        nonlocal line, at
        position = space.match(text, position).end()  # type: ignore[union-attr]
        line, at = line + text.count("\n", at, position), position
        return position

    try:
        text = reading.decoded(data, str(path))
        position = skip(skip(0) + 1)
        while text[position : position + 1] != "]":
            number = line + 1
            value, position = json_files.DECODER.raw_decode(text, position)
            json_files.check_depth(value)
            yield number, value
            position = skip(position)
            if text[position : position + 1] == ",":
                position = skip(position + 1)
            elif text[position : position + 1] != "]":
                raise InputError(f"{path}, line {line + 1}: not JSON: a comma or ] is missing")
        if skip(position + 1) < len(text):
            raise InputError(f"{path}, line {line + 1}: not JSON: something follows the array")
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {line + 1}: not JSON: {error}") from None


def parquet(path: Path, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Each row from number `start` on: its number from 0, its row group, and its values.

    Of a column that is none of `columns` the value is not read, and None, but its name is there to be told.

    Raises:
        InputError: the file, or a part of it, cannot be read.
        ElmError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet as reader
    except ImportError:
        raise ElmError(f"{path}: Parquet needs pyarrow: pip install 'elm-mlx[parquet]'") from None
    try:
        with reader.ParquetFile(path) as file:
            names = file.schema_arrow.names
            present, unread = [name for name in names if name in columns], dict.fromkeys(names)
            row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row + size <= start:
                    row += size
                    continue
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=present):
                    for value in batch.to_pylist():
                        if row >= start:
                            yield row, group, unread | value
                        row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: no Parquet that can be read: {' '.join(str(error).split())[:200]}") from None


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def key_of(key: str) -> str:
    """A key on one line, whatever it holds."""
    return f"`{key[:30].encode('unicode_escape').decode()}`"


def keys_of(value: Mapping[str, Any]) -> str:
    """A few of its keys, on one line whatever they hold."""
    keys = list(map(key_of, list(value)[:8]))
    return ", ".join([*keys, "…"] if len(value) > 8 else keys) or "no keys"


def _unpacked(path: Path, file: BinaryIO) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(file))
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(path, file), 1 << 18)
    return file


class _Zstandard(io.RawIOBase):
    """Zstandard frames, one after the other. The package's own reader takes a file that is cut short for whole."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise ElmError(f"{path}: Zstandard needs its package: pip install 'elm-mlx[zstd]'") from None
        self._path, self._error = path, zstandard.ZstdError
        self._unpacker: Any = zstandard.ZstdDecompressor()
        self._file = file
        self._current: Any = None  # the frame that has begun and not ended
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_PACKED_BYTES)
            if not self._packed:
                if self._current is not None:
                    raise InputError(f"{self._path}: damaged Zstandard: it is cut short")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _unpack(self) -> None:
        if self._current is None:
            self._current = self._unpacker.decompressobj()
        try:
            self._ready = memoryview(self._current.decompress(self._packed))
        except self._error as error:
            raise InputError(f"{self._path}: damaged Zstandard: {error}") from None
        self._packed = self._current.unused_data
        if self._current.eof:
            self._current = None
