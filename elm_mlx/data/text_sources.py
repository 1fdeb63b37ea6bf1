"""Raw text to pretrain on: files by path, directory or glob, or a data set on the Hugging Face Hub; read lazily.

A document is a line of JSON, an element of a JSON array, a row of CSV or Parquet, or a text file: a whole one, or the
text between lines that are the source's separator. Documents are numbered within their file: by line, element, row,
and 0 for a whole file. Importing this imports neither NumPy nor what unpacks Parquet and Zstandard.
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
from elm_mlx.data import data_files, packed_files, split_files
from elm_mlx.data.bad_record import BadRecord, keys_of, text_of
from elm_mlx.errors import ElmError, InputError

_IN_FOLDERS = (*data_files.JSON, *data_files.TEXT, data_files.PARQUET)
SUFFIXES = (*_IN_FOLDERS, *data_files.CSV)  # tables of all kinds lie about in folders: one is named to be read
_SAMPLED_BYTES = 1 << 14
_MANY = 16  # files for each process, from which on a process is given whole files rather than a share of each


@dataclass(frozen=True)
class TextSource:
    """One part of a mixture: either `path` or `dataset`.

    Args:
        path: a file; a directory: all data files below it but those that are held out by their or their folders'
            names, as `split_files.name_of` knows them; or a glob, in which `**` crosses directories.
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
            raise InputError("give a source a path or a dataset on the Hub, not both or neither")
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
    """A document as it was read, or the reason why there is none.

    Attributes:
        where: file and line, for people.
        content: a line of JSON, or a text; BadRecord where the record, and Broken where the rest of the file, cannot be
            read; None for what is a duplicate.
    """

    position: Position
    where: str
    content: bytes | str | BadRecord | Broken | None


class Broken(Exception):
    """The rest of a file cannot be read; the text names it, and says why."""


Order = Callable[[int, int], Sequence[int]]  # an epoch and a number of files to the order of them
Skipped = Callable[[int, int], bool]  # a file and a document's number to whether it is a duplicate


class TextFiles:
    """A source's files, found once.

    Attributes:
        paths: sorted; empty for a data set on the Hub.

    Raises:
        InputError: there are none, or one is of no kind that can be read.
        ElmError: a package that the source needs is not installed.
    """

    def __init__(self, source: TextSource) -> None:
        self.source = source
        self.paths = _found(source.path) if source.path else []
        if source.dataset:
            _datasets(source)

    def fingerprint(self) -> str:
        """Returns a hash of the files' names and sizes, and how they are read. Where they lie doesn't matter."""
        source = self.source
        parts = [source.dataset, source.subset, source.split, source.key, source.separator]
        parts += [f"{path.name} {path.stat().st_size}" for path in self.paths]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def sampled_content(self) -> str:
        """Returns a hash of the beginning, the middle and the end of each file. Raises InputError where one is gone."""
        digest = hashlib.sha256()
        for path in self.paths:
            with reading.opened(path) as file:
                size = path.stat().st_size
                for start in sorted({0, max(0, size // 2), max(0, size - _SAMPLED_BYTES)}):
                    file.seek(start)
                    digest.update(file.read(_SAMPLED_BYTES))
        return digest.hexdigest()

    def read(
        self,
        start: Position,
        order: Order,
        shard: int = 0,
        shards: int = 1,
        skipped: Skipped = lambda file, number: False,
    ) -> Iterator[Raw]:
        """Reads the shard's documents from `start` on, epoch after epoch without end. Each is of exactly one shard.

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
    """Reads a file's documents from number `start` on: number, place, and content as in `Raw`."""
    number, where = start, str(path)
    try:
        of_text = data_files.suffix_of(path, SUFFIXES) in data_files.TEXT
        found = _texts(path, separator, start) if of_text else _records(path, key, start)
        for number, where, content in found:
            yield number, where, content
            number += 1
    except InputError as error:
        yield number, where, Broken(str(error))


def _content(value: Any, key: str) -> str | BadRecord:
    try:
        return text_of(value, key)
    except BadRecord as error:
        return error


def _records(path: Path, key: str, start: int) -> Iterator[tuple[int, str, Any]]:
    by_column = path.name.lower().endswith((*data_files.CSV, data_files.PARQUET))
    for number, where, value in data_files.read(path, (key,), start, parse=False):
        if by_column and isinstance(value, dict) and key not in value:
            raise InputError(f"{path}: has no column `{key}`; it has {keys_of(value)}")
        yield number, where, value if isinstance(value, bytes) else _content(value, key)


def _texts(path: Path, separator: str | None, start: int) -> Iterator[tuple[int, str, Any]]:
    with packed_files.open_file(path) as file:
        if separator is None:
            parts = iter([(str(path), reading.unmarked(packed_files.read_whole(path, file), str(path)))])
        else:
            parts = _separated(path, file, separator.encode())
        for number, (where, data) in enumerate(parts):
            if number < start:
                continue
            try:
                content: Any = data.decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                content = BadRecord(f"not UTF-8 at byte {error.start + 1}")
            yield number, where, content


def _separated(path: Path, file: IO[bytes], separator: bytes) -> Iterator[tuple[str, bytes]]:
    """The texts between separators that are not blank, each with its place."""
    first, text = 1, bytearray()
    for number, line in packed_files.whole_lines(path, file):
        if line.strip() != separator:
            text += line
            if len(text) > packed_files.LINE_BYTES:
                raise InputError(f"{path}, line {first}: no separator in {len(text) >> 20} MB")
            continue
        if text.strip():
            yield f"{path}, line {first}", bytes(text)
        first, text = number + 1, bytearray()
    if text.strip():
        yield f"{path}, line {first}", bytes(text)


def _found(pattern: str) -> list[Path]:
    path = reading.expanded(pattern)
    if path.is_file():
        data_files.suffix_of(path, SUFFIXES)
        return [path]
    if path.is_dir():
        known = (each for each in path.rglob("*") if each.name.lower().endswith(_IN_FOLDERS) and each.is_file())
        paths = sorted(each for each in known if _is_to_train_on(each.relative_to(path)))
        if not paths:
            raise InputError(f"{path}: holds no data files, which are {', '.join(_IN_FOLDERS)}")
        return paths
    matching = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path's takes no absolute pattern)
    paths = sorted(each for each in matching if each.is_file())
    for each in paths:
        data_files.suffix_of(each, SUFFIXES)
    if not paths:
        raise InputError(f"{pattern}: no such file or directory, and no file matches it")
    return paths


def _is_to_train_on(path: Path) -> bool:
    """Tells whether a file below a source's directory is neither hidden nor held out."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and not split_files.is_held_out(path, data_files.suffix_of(path, SUFFIXES))


def _datasets(source: TextSource) -> Any:
    try:
        import datasets
    except ImportError:
        raise ElmError(f"{source.dataset}: streaming needs datasets: pip install 'elm-mlx[hub]'") from None
    return datasets


def _streamed(source: TextSource, start: int) -> Iterator[tuple[int, str, Any]]:
    """Reads the documents of a data set on the Hub; whatever goes wrong there is Broken."""
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
