"""Files of data, opened and unpacked as their names say: gzip, Zstandard; their lines, and all of them, with limits.

Importing this does not import zstandard.
"""

from __future__ import annotations

import gzip
import io
import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from elm_mlx import reading
from elm_mlx.errors import ElmError, InputError

PACKINGS = ("", ".gz", ".zst")
LINE_BYTES = 128 << 20  # one text on one line: text8 has 100 MB
RATIO = 100  # by which data may be packed, beyond the bytes of a line
_PACKED_BYTES = 1 << 12  # of Zstandard, unpacked at once: 4 bytes may become 128 KB


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file, unpacked as its name says.

    Raises:
        InputError: it cannot be read, or what was packed is damaged or a hundred times as large; also later, while the
            block reads.
        ElmError: Zstandard, and its package is not installed.
    """
    name = path.name.lower()
    with reading.opened(path) as file:
        try:
            if name.endswith(".gz"):
                yield io.BufferedReader(_Limited(path, gzip.open(file)), 1 << 18)  # noqa: SIM115
            elif name.endswith(".zst"):
                yield io.BufferedReader(_Limited(path, _Zstandard(path, file)), 1 << 18)
            else:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: damaged gzip: {error}") from None


def lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Reads the lines that are not blank: number from 1, and bytes without the line's end. Raises as `whole_lines`."""
    for number, line in whole_lines(path, file):
        if line.strip():
            yield number, line.rstrip()


def whole_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Reads every line with its end, but without a byte order mark, and its number from 1.

    Raises:
        InputError: one is longer than any text, or the file is UTF-16.
    """
    for number in itertools.count(1):
        line = reading.limited_line(file, LINE_BYTES, f"{path}, line {number}")
        if not line:
            return
        yield number, reading.unmarked(line, str(path)) if number == 1 else line


def read_whole(path: Path, file: IO[bytes]) -> bytes:
    """Reads all of an opened file. Raises InputError where that is more than fits into memory without harm."""
    most = reading.CORPUS_BYTES
    data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path}: more than {most >> 20} MB, the limit but for JSON lines and separated texts")
    return data


def most_unpacked(path: Path) -> int:
    """Returns the bytes that what is stored in a file may unpack to."""
    return LINE_BYTES + RATIO * path.stat().st_size


class _Limited(io.RawIOBase):
    """What a file is unpacked to, as far as that is no more than `most_unpacked`: a few kilobytes may be gigabytes."""

    def __init__(self, path: Path, unpacked: io.BufferedIOBase | io.RawIOBase) -> None:
        self._path, self._unpacked, self._most, self._size = path, unpacked, most_unpacked(path), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._unpacked.readinto(buffer) or 0
        self._size += size
        if self._size > self._most:
            raise InputError(
                f"{self._path}: more than {self._most >> 20:,} MB unpacked, over {RATIO} times the file: unpack it"
            )
        return size


class _Zstandard(io.RawIOBase):
    """Zstandard frames, one after the other. The package's own reader takes a file that is cut short for whole."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise ElmError(f"{path}: Zstandard needs its package: pip install 'elm-mlx[zstd]'") from None
        self._path, self._file, self._error = path, file, zstandard.ZstdError
        self._begin: Any = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None  # under way
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise InputError(f"{self._path}: damaged Zstandard: it is cut short")
                return 0
            self._frame = self._frame or self._begin()
            try:
                self._ready = memoryview(self._frame.decompress(self._packed))
            except self._error as error:
                raise InputError(f"{self._path}: damaged Zstandard: {error}") from None
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
