"""Where raw text comes from: files by path, directory or glob, or a data set on the Hugging Face Hub; read lazily.

Knows a source's files, their order in an epoch, which documents are this process's, and how to begin anywhere.
Knows nothing of filters and tokens. Importing this imports neither NumPy nor what unpacks Parquet and Zstandard.

A document is a line of JSON, an element of a JSON array, a row of Parquet, or a text file: a whole one, or what stands
between lines that are the source's separator. Documents are numbered within their file: by line, element, row, and 0
for a whole file.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from elm_mlx import reading
from elm_mlx.data import data_files
from elm_mlx.data.data_files import BadRecord
from elm_mlx.errors import ElmError, InputError

SUFFIXES = (*data_files.JSON, *data_files.TEXT, data_files.PARQUET)
_MANY = 16  # files for each process, from which on a process is given whole files rather than a share of each


@dataclass(frozen=True)
class Source:
    """One part of a mixture: either `path` or `dataset`.

    Args:
        path: a file; a directory: all data files below it but those that are held out by their or their folders'
            names, as `data_files.name_of` knows them; or a glob, in which `**` crosses directories.
        dataset: a data set's name on the Hub, to be streamed by the `datasets` package.
        subset, split: of `dataset`.
        weight: the share of this source's tokens, in relation to the others' weights.
        key: the field of a record, or column, that holds the text.
        separator: a line that stands between the documents of a text file; without one, each file is a document.

    Raises:
        InputError: neither or both of `path` and `dataset`; a weight that is not above 0; an empty key or separator.
    """

    path: str = ""
    dataset: str = ""
    subset: str | None = None
    split: str = "train"
    weight: float = 1.0
    key: str = "text"
    separator: str | None = None

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.dataset):
            raise InputError("a source has either a path, or a dataset on the Hub")
        if not 0 < self.weight < float("inf"):
            raise InputError(f"{self.name}: its weight must be above 0, not {self.weight}")
        if not self.key or self.separator == "":
            raise InputError(f"{self.name}: its {'separator' if self.key else 'key'} is empty")

    @property
    def name(self) -> str:
        return self.path or self.dataset


@dataclass(frozen=True, order=True)
class Position:
    """A document's place: the epoch, the file's place in that epoch's order, and the document's number in the file."""

    epoch: int = 0
    file: int = 0
    number: int = 0


@dataclass(frozen=True)
class Raw:
    """A document as it was read, or why there is none.

    Attributes:
        where: file and line, for people.
        content: a line of JSON, or a text; BadRecord where the record, and Broken where the rest of the file, cannot be
            read; None for what is a duplicate.
    """

    position: Position
    where: str
    content: bytes | str | BadRecord | Broken | None


class Broken(Exception):
    """A file cannot be read on from here; the text names it, and says why."""


Order = Callable[[int, int], Sequence[int]]  # an epoch and a number of files to an order of them
Skipped = Callable[[int, int], bool]  # whether document NUMBER of file FILE is to be left out as a duplicate


class Files:
    """A source's files, found once.

    Attributes:
        paths: sorted; empty for a data set on the Hub.

    Raises:
        InputError: there are none, or one is of no kind that can be read.
        ElmError: a package that the source needs is not installed.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.paths = _found(source.path) if source.path else []
        if source.dataset:
            _datasets(source)

    def fingerprint(self) -> str:
        """Tells other data by: the files' names and sizes, and how they are read. Where they lie doesn't matter."""
        source = self.source
        parts = [source.dataset, source.subset, source.split, source.key, source.separator]
        parts += [f"{path.name} {path.stat().st_size}" for path in self.paths]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def read(
        self,
        start: Position,
        order: Order,
        shard: int = 0,
        shards: int = 1,
        skipped: Skipped = lambda file, number: False,
    ) -> Iterator[Raw]:
        """The shard's documents from `start` on, an epoch after the other without end. Each is of exactly one shard.

        Raises:
            InputError: there is none in a whole epoch.
        """
        count = max(1, len(self.paths))
        while True:
            found = start.file > 0 or start.number > 0
            files = list(order(start.epoch, count))
            for place in range(start.file, count):
                file = files[place]
                first = start.number if place == start.file else 0
                whole = count >= _MANY * shards
                if whole and (file + start.epoch) % shards != shard:
                    continue
                for number, where, content in self._documents(file, first):
                    if whole or (number + file + start.epoch) % shards == shard:
                        found = True
                        kept = None if skipped(file, number) else content
                        yield Raw(Position(start.epoch, place, number), where, kept)
            if not found:
                raise InputError(f"{self.source.name}: holds no documents{' for each process' if shards > 1 else ''}")
            start = Position(start.epoch + 1)

    def _documents(self, file: int, start: int) -> Iterator[tuple[int, str, Any]]:
        if self.source.dataset:
            return _streamed(self.source, start)
        return documents(self.paths[file], self.source.key, self.source.separator, start)


def documents(path: Path, key: str, separator: str | None, start: int = 0) -> Iterator[tuple[int, str, Any]]:
    """Number, place and content (as in `Raw`) of each document of a file from number `start` on."""
    number, where = start, str(path)
    try:
        suffix = data_files.suffix_of(path, SUFFIXES)
        read = _rows if suffix == data_files.PARQUET else _texts if suffix in data_files.TEXT else _json
        for number, where, content in read(path, key, separator, start):
            yield number, where, content
            number += 1
    except InputError as error:
        yield number, where, Broken(str(error))


def text_of(value: Any, key: str) -> str:
    """The text of a record. Raises BadRecord."""
    if not isinstance(value, dict):
        raise BadRecord(f"is {data_files.kind_of(value)}, and not an object")
    if key not in value:
        raise BadRecord(f"`{key}` is missing; it has {data_files.keys_of(value)}")
    if not isinstance(value[key], str):
        raise BadRecord(f"`{key}` is {data_files.kind_of(value[key])}, and not a text")
    return value[key]


def _content(value: Any, key: str) -> str | BadRecord:
    if isinstance(value, BadRecord):
        return value
    try:
        return text_of(value, key)
    except BadRecord as error:
        return error


def _json(path: Path, key: str, separator: str | None, start: int) -> Iterator[tuple[int, str, Any]]:
    by_line = data_files.is_lines(path)
    with data_files.opened(path) as file:
        if not by_line:
            for number, (line, value) in enumerate(data_files.elements(path, data_files.whole(path, file))):
                if number >= start:
                    yield number, f"{path}, line {line}", _content(value, key)
            return
        for line, data in data_files.lines(path, file):
            if line > start:  # numbers begin at 0, lines at 1
                yield line - 1, f"{path}, line {line}", data


def _rows(path: Path, key: str, separator: str | None, start: int) -> Iterator[tuple[int, str, Any]]:
    for number, group, value in data_files.parquet(path, (key,), start):
        if isinstance(value, dict) and key not in value:
            raise InputError(f"{path}: has no column `{key}`; it has {data_files.keys_of(value)}")
        yield number, f"{path}, row {number + 1} (row group {group})", _content(value, key)


def _texts(path: Path, key: str, separator: str | None, start: int) -> Iterator[tuple[int, str, Any]]:
    with data_files.opened(path) as file:
        parts = [(1, _whole(path, file))] if separator is None else _separated(path, file, separator.encode())
        for number, (line, data) in enumerate(parts):
            if number >= start:
                where = str(path) if separator is None else f"{path}, line {line}"
                yield number, where, _decoded(data)


def _whole(path: Path, file: IO[bytes]) -> bytes:
    return reading.unmarked(data_files.whole(path, file), str(path))


def _separated(path: Path, file: IO[bytes], separator: bytes) -> Iterator[tuple[int, bytes]]:
    """What stands between separators and isn't blank, with the line that it begins on."""
    first, held = 1, bytearray()
    for number, line in data_files.whole_lines(path, file):
        if line.strip() != separator:
            held += line
            if len(held) > data_files.LINE_BYTES:
                raise InputError(f"{path}, line {first}: no separator in {len(held) >> 20} MB")
            continue
        if held.strip():
            yield first, bytes(held)
        first, held = number + 1, bytearray()
    if held.strip():
        yield first, bytes(held)


def _decoded(data: bytes) -> str | BadRecord:
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start + 1}")


def _found(pattern: str) -> list[Path]:
    path = reading.expanded(pattern)
    if path.is_file():
        data_files.suffix_of(path, SUFFIXES)
        return [path]
    if path.is_dir():
        known = (each for each in path.rglob("*") if each.name.lower().endswith(SUFFIXES) and each.is_file())
        paths = sorted(each for each in known if _is_meant(each.relative_to(path)))
        if not paths:
            raise InputError(f"{path}: holds no data files, which are {', '.join(SUFFIXES)}")
        return paths
    matching = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path's takes no absolute pattern)
    paths = sorted(each for each in matching if each.is_file())
    for each in paths:
        data_files.suffix_of(each, SUFFIXES)
    if not paths:
        raise InputError(f"{pattern}: no such file or directory, and no file's name matches it")
    return paths


def _is_meant(path: Path) -> bool:
    """Whether a file below a source's directory is one of its files: not hidden, and not held out."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and not data_files.is_held_out(path, data_files.suffix_of(path, SUFFIXES))


def _datasets(source: Source) -> Any:
    try:
        import datasets
    except ImportError:
        raise ElmError(f"{source.dataset}: streaming needs datasets: pip install 'elm-mlx[hub]'") from None
    return datasets


def _streamed(source: Source, start: int) -> Iterator[tuple[int, str, Any]]:
    """The documents of a data set on the Hub; whatever goes wrong there is Broken."""
    number = start
    try:
        stream = _datasets(source).load_dataset(source.dataset, source.subset, split=source.split, streaming=True)
        rows = stream.skip(start) if start and hasattr(stream, "skip") else islice(stream, start, None)
        for row in rows:
            yield number, f"{source.dataset}, row {number + 1}", _content(row, source.key)
            number += 1
    except Exception as error:  # its own kinds, the network's, the server's
        reason = " ".join(str(error).split())[:200]
        yield number, source.dataset, Broken(f"{source.dataset}: cannot be streamed on: {reason}")
