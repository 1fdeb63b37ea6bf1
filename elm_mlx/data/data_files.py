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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from elm_mlx import reading
from elm_mlx.errors import ElmError, InputError

PACKINGS = ("", ".gz", ".zst")
JSON = tuple(kind + packing for packing in PACKINGS for kind in (".jsonl", ".json", ".ndjson"))
TEXT = tuple(".txt" + packing for packing in PACKINGS)
PARQUET = ".parquet"

LINE_BYTES = 128 << 20  # one text on one line: text8 has 100 MB
_PACKED_BYTES = 1 << 12  # of Zstandard, unpacked at once: 4 bytes may become 128 KB


_SPACE = re.compile(r"[ \t\r\n]*")
# What a record has, of whatever kind: an object with one of these is none that records are in.
_OF_RECORDS = ("text", "messages", "conversations", "prompt", "chosen", "instruction")


class BadRecord(Exception):
    """One record is not whole; the text is the reason."""


Row = dict[str, Any] | BadRecord  # of Parquet


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


def values(path: Path) -> Iterator[tuple[int, Any]]:
    """Each value of a file of JSON and the line that it begins on; BadRecord for a line that is no JSON.

    Raises:
        InputError: at what is no JSON where lines don't tell where the next value begins.
    """
    by_line = is_lines(path)
    with opened(path) as file:
        if not by_line:
            yield from elements(path, whole(path, file))
            return
        for number, line in lines(path, file):
            try:
                yield number, parsed(line)
            except BadRecord as error:
                yield number, error


def is_lines(path: Path) -> bool:
    """Whether each line of a file is a JSON value; or else it is an array, or objects on several lines.

    Its name doesn't tell: Hugging Face's `.json` are often lines.
    """
    with opened(path) as file:
        found = lines(path, file)
        first = next(found, (1, b""))[1].lstrip()
        if not first.startswith(b"{"):
            return not first.startswith(b"[")
        try:
            return not _wrapping(parsed(first)) or next(found, None) is not None
        except BadRecord:
            goes_on = first.endswith((b"{", b"[", b",", b":")) and next(found, None) is not None
    return not goes_on and not _begins_whole(path, len(first.decode(errors="replace")))


def _begins_whole(path: Path, length: int) -> bool:
    """Whether a file begins with an object that goes on after its first line, of `length`, or that another follows."""
    try:
        with opened(path) as file:
            text = reading.decoded(whole(path, file), str(path)).lstrip()
        end = reading.JSON_RECORDS.raw_decode(text)[1]
    except (InputError, ValueError, RecursionError):
        return False
    return end > length or text[end:].lstrip().startswith("{")


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
        return reading.load_json(line.decode("utf-8"), reading.JSON_RECORDS)
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.doc.startswith("{", error.pos):
            raise BadRecord(f"another object begins at column {error.pos + 1}: each needs a line of its own") from None
        raise BadRecord(f"not JSON: {error.msg} at column {error.pos + 1}") from None
    except ValueError as error:  # a number of thousands of digits; brackets nested by hundreds
        raise BadRecord(f"not JSON: {error}") from None


def elements(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """Each element of a JSON array, or of the only array of objects in an object, or each of several objects in a row,
    and the line that it begins on.

    Raises:
        InputError: at what is no JSON: nobody knows where the next element begins.
    """
    cursor = _Cursor(reading.decoded(data, str(path)))
    try:
        key = _enter_records(path, cursor)
        array = key is not None or cursor.sees("[")
        if array:
            cursor.step()
        while not cursor.sees("]") if array else not cursor.ended:
            yield cursor.line, cursor.value()
            if cursor.sees(","):
                cursor.step()
            elif array and not cursor.sees("]"):
                raise InputError(f"{path}, line {cursor.line}: not JSON: a comma or ] is missing")
        if array and key is None:
            cursor.step()
            if not cursor.ended:
                raise InputError(f"{path}, line {cursor.line}: not JSON: something follows the array")
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {cursor.line}: not JSON: {error}") from None


class _Cursor:
    """A place in a JSON text, past all white space, and the line that it is on."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.line = text, 0, 1
        self._move(0)

    @property
    def ended(self) -> bool:
        return self.at == len(self.text)

    def sees(self, character: str) -> bool:
        return self.text.startswith(character, self.at)

    def step(self) -> None:
        """Past one character."""
        self._move(self.at + 1)

    def value(self) -> Any:
        """The value that begins here, and past it. Raises ValueError, RecursionError."""
        found, end = reading.JSON_RECORDS.raw_decode(self.text, self.at)
        reading.check_depth(found)
        self._move(end)
        return found

    def _move(self, position: int) -> None:
        position = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
        self.line += self.text.count("\n", self.at, position)
        self.at = position


def _enter_records(path: Path, cursor: _Cursor) -> str | None:
    """Where one object is all of a file, and holds records under a key, past that key, which is returned.

    Raises:
        InputError: it does under several.
    """
    if not cursor.sees("{"):
        return None
    whole = _Cursor(cursor.text)
    value = whole.value()
    keys = _wrapping(value) if whole.ended else []
    if len(keys) > 1:
        named = " and ".join(map(key_of, keys[:2]))
        raise InputError(f"{path}: holds lists of objects under {named}: write each to a file of its own")
    for key in keys:
        while True:  # through the keys before it
            cursor.step()
            name = cursor.value()
            cursor.step()
            if name == key:
                return key
            cursor.value()
    return None


def _wrapping(value: Any) -> list[str]:
    """The keys under which an object holds lists of objects, unless it is itself a record."""
    if not isinstance(value, dict) or not value.keys().isdisjoint(_OF_RECORDS):
        return []
    return [
        key
        for key, inner in value.items()
        if isinstance(inner, list) and inner and all(isinstance(each, dict) for each in inner)
    ]


def parquet(path: Path, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, int, Row]]:
    """Each row from number `start` on: its number from 0, its row group, and its values, or why it has none.

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
            twice = next((name for name in columns if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"{path}: has the column {key_of(twice)} twice")
            present, unread = [name for name in names if name in columns], dict.fromkeys(names)
            row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row + size <= start:
                    row += size
                    continue
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=present):
                    for value in _rows_of(batch):
                        if row >= start:
                            yield row, group, value if isinstance(value, BadRecord) else unread | value
                        row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
        raise InputError(f"{path}: no Parquet that can be read: {' '.join(str(error).split())[:200]}") from None


def _rows_of(batch: Any) -> list[Any]:
    """The rows of a part of a table as objects; BadRecord for one with what Python has no value for."""
    try:
        return cast(list[Any], batch.to_pylist())
    except (ValueError, OverflowError) as error:  # no UTF-8, a time in nanoseconds
        if len(batch) == 1:
            return [BadRecord(f"holds what cannot be read: {' '.join(str(error).split())[:100]}")]
    return [row for number in range(len(batch)) for row in _rows_of(batch.slice(number, 1))]


def kind_of(value: Any) -> str:
    """What a value of JSON or Parquet is, in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {
        str: "a text", list: "a list", dict: "an object", int: "a number", float: "a number", Decimal: "a number",
        bytes: "bytes",
    }  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")


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


SPLITS = ("train", "valid", "test")
_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "valid")
# A split, perhaps with more to it (`train_sft`), and a shard's number: `-00000-of-00002`, with the hash that the hub's
# uploads had for years, or just `_3`.
_STEM = re.compile(
    rf"(?P<split>{'|'.join(_NAMES)})(?P<variant>(?:[-_.].*?)??)"
    r"(?:[-_.](?P<number>\d+)(?:[-_.]of[-_.](?P<count>\d+))?(?:-[0-9a-f]{16})?)?",
    re.IGNORECASE,
)
_SHARD = re.compile(
    r"(?:(?P<variant>.*?)[-_.])?(?P<number>\d+)(?:[-_.]of[-_.](?P<count>\d+))?(?:-[0-9a-f]{16})?", re.IGNORECASE
)
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # written beside data
_DEPTH = 3  # folders below the directory: data/default/train
_LISTED = 5  # files, where what is needed is not there


@dataclass(frozen=True)
class Name:
    """What a file's name says.

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
class Files:
    """The files of one split, in order.

    Attributes:
        missing: what is told where shards of it are not there.
    """

    paths: list[Path]
    missing: str | None = None


def name_of(path: Path, suffix: str) -> Name | None:
    """What the name of a file that ends with `suffix` says; None where it names no split."""
    found = _STEM.fullmatch(path.name[: -len(suffix)])
    if found is None:
        return None
    return Name(_NAMES[found["split"].lower()], found["variant"].lower(), *_numbers(found))


def is_held_out(path: Path, suffix: str) -> bool:
    """Whether a file, relative to a directory of raw text, is by its name or a folder's of another split than train."""
    if any(folder_split(folder) not in (None, "train") for folder in path.parts[:-1]):
        return True
    name = name_of(path, suffix)
    # A text file may well be called test_of_time.txt, and records are not.
    return name is not None and name.split != "train" and not (suffix in TEXT and name.variant[:1] == "_")


def folder_split(name: str) -> str | None:
    """The split whose files a folder of that name holds, if it is one's."""
    return _NAMES.get(name.lower())


def find(directory: Path, suffixes: Sequence[str]) -> dict[str, Files]:
    """The splits in a directory, `train` first: its own files and those in folders `train`, `validation` and so on;
    or, where it has none to train on, those of the one folder below it that does, such as the hub's `data`.

    Raises:
        InputError: there are none to train on, or two of which nobody can say which is meant; it names them.
    """
    below = [directory]
    for _ in range(_DEPTH):
        having = [(folder, found) for folder in below if "train" in (found := _by_split(folder, suffixes))]
        if len(having) > 1:
            both = " and ".join(str(folder.relative_to(directory)) for folder, _ in having[:2])
            raise InputError(f"{directory}: {both} both hold data to train on; pass one of them")
        if having:
            folder, found = having[0]
            return {split: _files(folder, split, found[split]) for split in SPLITS if split in found}
        below = [each for folder in below for each in _entries(folder) if each.is_dir() and os.access(each, os.R_OK)]
    there = [each.name for each in _entries(directory)]
    listed = ", ".join(there[:_LISTED]) + (", …" if len(there) > _LISTED else "")
    raise InputError(
        f"{directory}: holds no train{', train'.join(suffixes)}; to train on one file alone, pass it"
        + (f" (it holds {listed})" if there else "")
    )


@dataclass(frozen=True)
class _Found:
    """A file of a split, what its name says, and the folder that it was found in, or whose name is the split's."""

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
        split = folder_split(folder.name)
        if split is not None and folder.is_dir():
            for file, suffix in _data(folder, suffixes, deep=True):
                name = name_of(file, suffix)
                if name is None or name.variant:  # train/test-questions.jsonl is of train, and train/test.jsonl is not
                    name = _name_in(split, file.name[: -len(suffix)])
                found.setdefault(name.split, []).append(_Found(file, name, folder))
    return found


def _name_in(split: str, stem: str) -> Name:
    """What the name of a file in a split's folder says: `part-00003`, or anything."""
    found = _SHARD.fullmatch(stem)
    return Name(split, stem) if found is None else Name(split, found["variant"] or "", *_numbers(found))


def _files(root: Path, split: str, found: list[_Found]) -> Files:
    """Those of a split that belong together. Raises InputError where two don't."""
    if any(each.place == root and not each.name.variant for each in found):
        # train.jsonl is meant where train_old.jsonl lies beside it
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
    return Files([each.file for each in found], _missing(found))


def _missing(found: Sequence[_Found]) -> str | None:
    """What is told of shards that are not there."""
    counts = {each.name.variant: each.name.count for each in found if each.name.count is not None}
    here = {(each.name.variant, each.name.number) for each in found if each.name.count is not None}
    gone = ((name, number) for name, count in counts.items() for number in range(count))
    listed = [f"{number:05}" for name, number in islice((each for each in gone if each not in here), _LISTED + 1)]
    if not listed:
        return None
    shown = ", ".join([*listed[:_LISTED], *(["…"] if len(listed) > _LISTED else [])])
    return f"{len(here):,} of {sum(counts.values()):,} shards are here, {found[0].file.name} first; missing: {shown}"


def _data(folder: Path, suffixes: Sequence[str], deep: bool = False) -> Iterator[tuple[Path, str]]:
    """The data files in a folder, `deep` in those below it too, each with the suffix that tells."""
    for entry in _entries(folder):
        if deep and entry.is_dir():
            yield from _data(entry, suffixes)
        elif entry.name.lower().endswith(tuple(suffixes)) and entry.name not in _ABOUT and entry.is_file():
            yield entry, suffix_of(entry, suffixes)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing hidden, as `.DS_Store` and `._train.jsonl` are."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None


def _numbers(found: re.Match[str]) -> tuple[int | None, int | None]:
    number, count = (None if found[name] is None else int(found[name]) for name in ("number", "count"))
    return number, count
