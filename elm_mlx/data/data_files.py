"""Data files: which ones a path names, by split and shard; how they are opened; their values, each with its place.

Knows JSON lines, JSON arrays, gzip, Zstandard, Parquet and plain text, and the names that people, mlx-lm and the
Hugging Face hub write. Importing this imports neither pyarrow nor zstandard.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any, cast

from elm_mlx import reading
from elm_mlx.errors import ElmError, InputError
from elm_mlx.reading import expanded

_PACKINGS = ("", ".gz", ".zst")
JSON = tuple(kind + packing for packing in _PACKINGS for kind in (".jsonl", ".json", ".ndjson"))
TEXT = tuple(".txt" + packing for packing in _PACKINGS)
PARQUET = ".parquet"
RECORDS = (*JSON, PARQUET)

LINE_BYTES = 128 << 20  # one text on one line: text8 has 100 MB
_RATIO = 100  # by which data may be packed, beyond the bytes of a line
_PACKED_BYTES = 1 << 12  # of Zstandard, unpacked at once: 4 bytes may become 128 KB
_ROWS = 64  # of Parquet, unpacked at once: each may be a megabyte that is stored once

_SPACE = re.compile(r"[ \t\r\n]*")
# An object with one of these keys is a record itself, and no list in it is a list of records.
_OF_RECORDS = ("text", "messages", "conversations", "prompt", "chosen", "instruction")

SPLITS = ("train", "valid", "test")
_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "valid")
# A shard's number: `00000-of-00002`, with the hash that the hub's uploads had for years, or just `3`.
_NUMBER = r"(?P<number>\d+)(?:[-_.]of[-_.](?P<count>\d+))?(?:-[0-9a-f]{16})?"
# A split, perhaps with more to it (`train_sft`); and the name of a file in a split's folder.
_STEM = re.compile(rf"(?P<split>{'|'.join(_NAMES)})(?P<variant>(?:[-_.].*?)??)(?:[-_.]{_NUMBER})?", re.IGNORECASE)
_SHARD = re.compile(rf"(?:(?P<variant>.*?)[-_.])?{_NUMBER}", re.IGNORECASE)
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # written beside data
_DEPTH = 3  # folders below the directory: data/default/train


class BadRecord(Exception):
    """One record cannot be used; the text is the reason."""


def suffix_of(path: Path, suffixes: Sequence[str]) -> str:
    """The longest of `suffixes` that the file's name ends with. Raises InputError."""
    matching = [suffix for suffix in suffixes if path.name.lower().endswith(suffix)]
    if not matching:
        raise InputError(f"{path}: not a kind of data file that can be read: {', '.join(suffixes)}")
    return max(matching, key=len)


def read(path: Path, columns: Collection[str], start: int = 0, *, parse: bool = True) -> Iterator[tuple[int, str, Any]]:
    """Reads the records of a file of JSON or Parquet lazily: each one's number, its place for people, its value.

    Numbers are those of lines, array elements or rows, from 0. A value is BadRecord where its line is no JSON, or its
    row holds what Python cannot; a column that is not read is None in it.

    Args:
        columns: those of Parquet that are read.
        start: the first record's number.
        parse: parse lines; otherwise they are bytes.

    Raises:
        InputError: the file cannot be read, or holds JSON in which nobody knows where the next record begins.
        ElmError: a package that unpacks it is not installed.
    """
    if suffix_of(path, RECORDS) == PARQUET:
        yield from _rows(path, columns, start)
        return
    by_line = _is_lines(path)
    with open_file(path) as file:
        if not by_line:
            for number, (line, value) in enumerate(_elements(path, read_whole(path, file))):
                if number >= start:
                    yield number, f"{path}, line {line}", value
            return
        for line, data in lines(path, file):
            if line <= start:
                continue
            value = data
            if parse:
                try:
                    value = parse_line(data)
                except BadRecord as error:
                    value = error
            yield line - 1, f"{path}, line {line}", value


def read_all(paths: Sequence[Path], columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Reads the records of several files, as `read`: each one's place and value. Raises InputError for none at all."""
    empty = True
    for path in paths:
        for _, where, value in read(path, columns):
            empty = False
            yield where, value
    if empty:
        raise InputError(f"{', '.join(map(str, paths))}: holds no records")


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file, unpacked as its name says.

    Raises:
        InputError: it cannot be read, or what was packed is damaged; also later, while the block reads.
        ElmError: Zstandard, and its package is not installed.
    """
    name = path.name.lower()
    with reading.opened(path) as file:
        try:
            if name.endswith(".gz"):
                yield cast(IO[bytes], gzip.open(file))  # noqa: SIM115
            elif name.endswith(".zst"):
                yield io.BufferedReader(_Zstandard(path, file), 1 << 18)
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
    if path.name.lower().endswith((".gz", ".zst")):  # of which a few kilobytes may become gigabytes
        most = min(most, LINE_BYTES + _RATIO * path.stat().st_size)
    data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path}: more than {most >> 20} MB, the limit but for JSON lines and separated texts")
    return data


def parse_line(line: bytes) -> Any:
    """Returns the value of a line of JSON. Raises BadRecord."""
    try:
        return reading.load_json(line.decode("utf-8"), reading.JSON_RECORDS)
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.doc.startswith("{", error.pos):
            raise BadRecord(f"another object begins at column {error.pos + 1}: each needs a line of its own") from None
        raise BadRecord(f"not JSON: {error.msg} at column {error.pos + 1}") from None
    except ValueError as error:  # a number of thousands of digits; brackets nested by hundreds
        raise BadRecord(f"not JSON: {error}") from None


def text_of(value: Any, key: str) -> str:
    """Returns the text in field `key` of a record. Raises BadRecord, which `value` may be already."""
    if isinstance(value, BadRecord):
        raise value
    if not isinstance(value, dict):
        raise BadRecord(f"is {kind_of(value)}, not an object")
    if key not in value:
        raise BadRecord(f"`{key}` is missing; it has {keys_of(value)}")
    if not isinstance(value[key], str):
        raise BadRecord(f"`{key}` is {kind_of(value[key])}, not a string")
    return value[key]


def kind_of(value: Any) -> str:
    """Names the kind of a value of JSON or Parquet: a string, a list, null."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {
        str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number", Decimal: "a number",
        bytes: "bytes",
    }  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")


def key_of(key: str) -> str:
    """Quotes a key on one line, whatever it holds."""
    return f"`{key[:30].encode('unicode_escape').decode()}`"


def keys_of(value: Mapping[str, Any]) -> str:
    """Lists a few of an object's keys on one line."""
    return _few(map(key_of, value), 8) or "no keys"


def _few(names: Iterable[str], most: int = 5) -> str:
    """Lists the first names."""
    shown = list(islice(names, most + 1))
    return ", ".join([*shown[:most], "…"] if len(shown) > most else shown)


def _is_lines(path: Path) -> bool:
    """Tells lines of JSON from an array, and from objects on several lines.

    The name doesn't: Hugging Face's `.json` are often lines.
    """
    with open_file(path) as file:
        found = lines(path, file)
        first = next(found, (1, b""))[1].lstrip()
        if not first.startswith(b"{"):
            return not first.startswith(b"[")
        try:
            return not _wrapping(parse_line(first)) or next(found, None) is not None
        except BadRecord:
            goes_on = first.endswith((b"{", b"[", b",", b":")) and next(found, None) is not None
    if goes_on:
        return False
    # One damaged line of several, unless an object goes on after it, or another follows on the same.
    try:
        with open_file(path) as file:
            text = reading.decoded(read_whole(path, file), str(path)).lstrip()
        end = reading.JSON_RECORDS.raw_decode(text)[1]
    except (InputError, ValueError, RecursionError):
        return True
    return end <= len(first.decode(errors="replace")) and not text[end:].lstrip().startswith("{")


def _elements(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """Parses the elements of a JSON array, of the only array of objects in an object, or several objects in a row.

    Yields each with the line that it begins on. Raises InputError as `read`.
    """
    text = reading.decoded(data, str(path))
    at = counted = _past_space(text, 0)
    line = text.count("\n", 0, at) + 1
    try:
        wrapped = _wrapped_array(path, text, at)
        at = at if wrapped is None else wrapped
        array = text.startswith("[", at)
        if array:
            at = _past_space(text, at + 1)
        while not text.startswith("]", at) if array else at < len(text):
            line, counted = line + text.count("\n", counted, at), at
            value, at = _value(text, at)
            yield line, value
            if text.startswith(",", at):
                at = _past_space(text, at + 1)
            elif array and not text.startswith("]", at):
                raise ValueError("a comma or ] is missing")
        if array and wrapped is None:
            at = _past_space(text, at + 1)
            if at < len(text):
                raise ValueError("something follows the array")
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        line += text.count("\n", counted, at)
        raise InputError(f"{path}, line {line}: not JSON: {error}") from None


def _past_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _value(text: str, at: int) -> tuple[Any, int]:
    """The value at a place in a JSON text, and the place of what follows. Raises ValueError, RecursionError."""
    value, end = reading.JSON_RECORDS.raw_decode(text, at)
    reading.check_depth(value)
    return value, _past_space(text, end)


def _wrapped_array(path: Path, text: str, at: int) -> int | None:
    """The place of the records where one object is all of a file, and holds them under a key.

    Raises:
        InputError: it does under several.
    """
    if not text.startswith("{", at):
        return None
    value, end = _value(text, at)
    keys = _wrapping(value) if end == len(text) else []
    if len(keys) > 1:
        named = " and ".join(map(key_of, keys[:2]))
        raise InputError(f"{path}: holds lists of objects under {named}: write each to a file of its own")
    while keys:  # through the keys before it
        name, at = _value(text, _past_space(text, at + 1))
        at = _past_space(text, at + 1)
        if name == keys[0]:
            return at
        _, at = _value(text, at)
    return None


def _wrapping(value: Any) -> list[str]:
    """The keys under which an object holds lists of objects, unless it is itself a record."""
    if not isinstance(value, dict) or not value.keys().isdisjoint(_OF_RECORDS):
        return []
    lists = ((key, inner) for key, inner in value.items() if isinstance(inner, list) and inner)
    return [key for key, inner in lists if all(isinstance(each, dict) for each in inner)]


def _rows(path: Path, columns: Collection[str], start: int) -> Iterator[tuple[int, str, Any]]:
    """The rows of a Parquet file, as `read`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ElmError(f"{path}: Parquet needs pyarrow: pip install 'elm-mlx[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = next((name for name in columns if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"{path}: has the column {key_of(twice)} twice")
            present, unread = [name for name in names if name in columns], dict.fromkeys(names)
            row = 0
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                if row + about.num_rows <= start:
                    row += about.num_rows
                    continue
                _check_size(path, group, about, present)
                for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=present):
                    for value in _row_values(batch):
                        if row >= start:
                            where = f"{path}, row {row + 1} (row group {group})"
                            yield row, where, value if isinstance(value, BadRecord) else unread | value
                        row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
        raise InputError(f"{path}: not Parquet that can be read: {' '.join(str(error).split())[:200]}") from None


def _check_size(path: Path, group: int, about: Any, columns: Sequence[str]) -> None:
    """Raises InputError where the columns of a row group would fill the memory that a small file asks for."""
    chunks = [about.column(number) for number in range(about.num_columns)]
    chunks = [chunk for chunk in chunks if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns)]
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    packed = sum(chunk.total_compressed_size for chunk in chunks)
    if unpacked > LINE_BYTES + _RATIO * packed:
        raise InputError(f"{path}: row group {group} unpacks to {unpacked >> 20:,} MB, over {_RATIO} times its size")


def _row_values(batch: Any) -> list[Any]:
    """The rows of a part of a table as objects; BadRecord for one with what Python has no value for."""
    try:
        return cast(list[Any], batch.to_pylist())
    except (ValueError, OverflowError) as error:  # no UTF-8, a time in nanoseconds
        if len(batch) == 1:
            return [BadRecord(f"holds what cannot be read: {' '.join(str(error).split())[:100]}")]
    return [row for number in range(len(batch)) for row in _row_values(batch.slice(number, 1))]


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


@dataclass(frozen=True)
class Name:
    """The split and shard in a file's name.

    Attributes:
        split: one of SPLITS.
        variant: what else it is called, `_sft`; mostly empty.
        number, count: of a shard: which it is, and of how many.
    """

    split: str
    variant: str = ""
    number: int | None = None
    count: int | None = None


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, in order.

    Attributes:
        missing: a line about shards that are not there.
    """

    paths: list[Path]
    missing: str | None = None


def name_of(path: Path, suffix: str) -> Name | None:
    """Reads the name of a file that ends with `suffix`; None where it names no split."""
    found = _STEM.fullmatch(path.name[: -len(suffix)])
    return None if found is None else _named(_NAMES[found["split"].lower()], found["variant"].lower(), found)


def is_held_out(path: Path, suffix: str) -> bool:
    """Tells whether a file below a directory of raw text is by its or a folder's name of another split than train."""
    if any(_NAMES.get(folder.lower(), "train") != "train" for folder in path.parts[:-1]):
        return True
    name = name_of(path, suffix)
    # A text file may well be called test_of_time.txt, and records are not.
    return name is not None and name.split != "train" and not (suffix in TEXT and name.variant[:1] == "_")


def find(path: str | Path, suffixes: Sequence[str] = RECORDS) -> dict[str, SplitFiles]:
    """Finds the files that a path means, by split, `train` first. A file is `train`.

    Of a directory they are its own files and those in folders `train`, `validation` and so on; or, where it has none to
    train on, those of the one folder below it that does, such as the hub's `data`.

    Raises:
        InputError: there are none to train on, or two that could both be; it names them.
    """
    path = expanded(path)
    if path.is_file():
        suffix_of(path, suffixes)
        return {"train": SplitFiles([path])}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or directory")
    below = [path]
    for _ in range(_DEPTH):
        having = [(folder, found) for folder in below if "train" in (found := _by_split(folder, suffixes))]
        if len(having) > 1:
            both = " and ".join(str(folder.relative_to(path)) for folder, _ in having[:2])
            raise InputError(f"{path}: {both} both hold data to train on; pass one of them")
        if having:
            folder, found = having[0]
            return {split: _together(folder, split, found[split]) for split in SPLITS if split in found}
        below = [each for folder in below for each in _entries(folder) if each.is_dir() and os.access(each, os.R_OK)]
    there = _few(each.name for each in _entries(path))
    raise InputError(
        f"{path}: holds no train{', train'.join(suffixes)}; to train on one file alone, pass it"
        + (f" (it holds {there})" if there else "")
    )


@dataclass(frozen=True)
class _Found:
    """A file of a split, its name, and the folder that it was found in, or whose name is the split's."""

    file: Path
    name: Name
    place: Path


def _by_split(root: Path, suffixes: Sequence[str]) -> dict[str, list[_Found]]:
    """The data files in a folder, and in the folders of splits in it."""
    found: dict[str, list[_Found]] = {}
    for file, suffix in _data(root, suffixes):
        if name := name_of(file, suffix):
            found.setdefault(name.split, []).append(_Found(file, name, root))
    for folder in _entries(root):
        split = _NAMES.get(folder.name.lower())
        if split is None or not folder.is_dir():
            continue
        for file, suffix in _data(folder, suffixes, deep=True):
            name = name_of(file, suffix)
            if name is None or name.variant:  # train/test-questions.jsonl is of train, and train/test.jsonl is not
                stem = file.name[: -len(suffix)]
                shard = _SHARD.fullmatch(stem)
                name = Name(split, stem) if shard is None else _named(split, shard["variant"] or "", shard)
            found.setdefault(name.split, []).append(_Found(file, name, folder))
    return found


def _named(split: str, variant: str, found: re.Match[str]) -> Name:
    number, count = (None if found[key] is None else int(found[key]) for key in ("number", "count"))
    return Name(split, variant, number, count)


def _together(root: Path, split: str, found: list[_Found]) -> SplitFiles:
    """Those of a split that belong together. Raises InputError where two don't."""
    if any(each.place == root and not each.name.variant for each in found):
        # train.jsonl, where train_old.jsonl lies beside it
        found = [each for each in found if each.place != root or not each.name.variant]
    found = sorted(found, key=lambda each: (each.name.variant, each.name.number or 0, each.file))
    for one, other in pairwise(found):
        shards = one.name.count == other.name.count and one.name.number != other.name.number
        if one.name.variant != other.name.variant:
            together = one.place != root  # in a split's folder all are of it
        else:
            together = shards and (one.place != root or one.name.number is not None)
        if not together or one.place != other.place:
            both = " and ".join(str(each.file.relative_to(root)) for each in (one, other))
            raise InputError(f"{root}: {both} are of the same split, {split}; keep one, or pass a file")
    return SplitFiles([each.file for each in found], _missing(found))


def _missing(found: Sequence[_Found]) -> str | None:
    """A line about shards that are not there, if any."""
    counts = {each.name.variant: each.name.count for each in found if each.name.count is not None}
    here = {(each.name.variant, each.name.number) for each in found if each.name.count is not None}
    gone = ((name, number) for name, count in counts.items() for number in range(count))
    missing = _few(f"{number:05}" for name, number in gone if (name, number) not in here)
    present = f"{len(here):,} of {sum(counts.values()):,} shards are here, {found[0].file.name} first"
    return f"{present}; missing: {missing}" if missing else None


def _data(folder: Path, suffixes: Sequence[str], deep: bool = False) -> Iterator[tuple[Path, str]]:
    """The data files in a folder, `deep` in those below it too, each with its suffix."""
    for entry in _entries(folder):
        if deep and entry.is_dir():
            yield from _data(entry, suffixes)
        elif entry.name.lower().endswith(tuple(suffixes)) and entry.name not in _ABOUT and entry.is_file():
            yield entry, suffix_of(entry, suffixes)


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted; nothing hidden, as `.DS_Store` and `._train.jsonl` are."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
