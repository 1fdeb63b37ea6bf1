"""Data files of every kind, and the values in them, each with its place: JSON lines, JSON arrays, CSV, Parquet.

Importing this imports neither pyarrow nor zstandard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.data import csv_rows, parquet_rows
from elm_mlx.data.bad_record import BadRecord, key_of
from elm_mlx.data.columns import Heading
from elm_mlx.data.packed_files import PACKINGS, lines, open_file, read_whole
from elm_mlx.errors import InputError

JSON = tuple(kind + packing for packing in PACKINGS for kind in (".jsonl", ".json", ".ndjson"))
TEXT = tuple(".txt" + packing for packing in PACKINGS)
DOCUMENTS = (*TEXT, ".md")  # of which each is a record
CSV = tuple(kind + packing for packing in PACKINGS for kind in (".csv", ".tsv"))
PARQUET = ".parquet"
RECORDS = (*JSON, *CSV, PARQUET)
_SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")

_SPACE = re.compile(r"[ \t\r\n]*")
# An object with one of these keys is a record itself, and no list in it is a list of records.
_OF_RECORDS = ("text", "messages", "conversations", "mapping", "prompt", "chosen", "instruction")


def suffix_of(path: Path, suffixes: Sequence[str]) -> str:
    """The longest of `suffixes` that the file's name ends with. Raises InputError."""
    matching = [suffix for suffix in suffixes if path.name.lower().endswith(suffix)]
    if not matching:
        if path.suffix.lower() in _SPREADSHEETS:
            raise InputError(f"{path}: a spreadsheet; save it as CSV (in Excel: CSV UTF-8)")
        raise InputError(f"{path}: not a kind of data file that can be read: {', '.join(suffixes)}")
    return max(matching, key=len)


def read(path: Path, columns: Collection[str], start: int = 0, *, parse: bool = True) -> Iterator[tuple[int, str, Any]]:
    """Reads the records of a file lazily: each one's number, its place for people, its value.

    A text file is one record, with its `text`.

    Numbers are those of lines, array elements or rows, from 0. A value is BadRecord where its line is no JSON, or its
    row is not as the columns are or holds what Python cannot; a column that is not read is None in it.

    Args:
        columns: those of Parquet that are read.
        start: the first record's number.
        parse: parse lines; otherwise they are bytes.

    Raises:
        InputError: the file cannot be read, or nobody knows where in it the next record begins.
        ElmError: a package that unpacks it is not installed.
    """
    suffix = suffix_of(path, (*RECORDS, *DOCUMENTS))
    if suffix in DOCUMENTS:
        yield from _whole_text(path, start)
        return
    if suffix == PARQUET:
        yield from parquet_rows.read_rows(path, columns, start)
        return
    if suffix in CSV:
        yield from csv_rows.read_rows(path, start)
        return
    by_line = _is_lines(path)
    with open_file(path) as file:
        if not by_line:
            for number, (line, alone, value) in enumerate(_elements(path, read_whole(path, file))):
                if number >= start:
                    yield number, f"{path}, line {line}" + ("" if alone else f", record {number + 1}"), value
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


def _whole_text(path: Path, start: int) -> Iterator[tuple[int, str, Any]]:
    """A text file as the only record in it."""
    with open_file(path) as file:
        data = reading.unmarked(read_whole(path, file), str(path))
    if start == 0 and (at := data.find(b"\0")) >= 0:
        line, column = reading.place(data, at)
        yield 0, str(path), BadRecord(f"line {line}, byte {column}: a byte 0, which no text has")
    elif start == 0:
        try:
            yield 0, str(path), {"text": data.decode("utf-8").replace("\r\n", "\n")}
        except UnicodeDecodeError as error:
            line, column = reading.place(data, error.start)
            yield 0, str(path), BadRecord(f"line {line}, byte {column}: not UTF-8; {reading.AS_UTF8}")


def heading_of(path: Path) -> Heading | None:
    """Returns the names of a table's columns; None for a file of another kind. Raises what `read` raises."""
    suffix = suffix_of(path, (*RECORDS, *DOCUMENTS))
    if suffix == PARQUET:
        return Heading(parquet_rows.names_of(path), str(path), "Parquet")
    if suffix not in CSV:
        return None
    with csv_rows.opened(path) as table:
        return table.heading


def read_all(paths: Sequence[Path], columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Reads the records of several files, as `read`: each one's place and value. Raises InputError for none at all."""
    empty = True
    for path in paths:
        for _, where, value in read(path, columns):
            empty = False
            yield where, value
    if empty:
        raise InputError(f"{', '.join(map(str, paths))}: holds no records")


def parse_line(line: bytes) -> Any:
    """Returns the value of a line of JSON. Raises BadRecord."""
    try:
        return reading.load_json(line.decode("utf-8"), reading.JSON_RECORDS)
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start + 1} of the line; {reading.AS_UTF8}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.doc.startswith("{", error.pos):
            raise BadRecord(f"another object begins at column {error.pos + 1}: each needs a line of its own") from None
        raise BadRecord(f"not JSON: {_what(error)} at column {error.pos + 1}") from None
    except ValueError as error:  # a number of thousands of digits; brackets nested by hundreds
        raise BadRecord(f"not JSON: {error}") from None


def _what(error: json.JSONDecodeError) -> str:
    """What is wrong, without the words that lead to a place: `Unterminated string starting at`."""
    return error.msg.removesuffix(" at").removesuffix(" starting")


def _is_lines(path: Path) -> bool:
    """Tells lines of JSON from an array, and from objects on several lines.

    The name doesn't: Hugging Face's `.json` are often lines.
    """
    with open_file(path) as file:
        found = lines(path, file)
        first = next(found, (1, b""))[1].lstrip()
        if first.startswith(b"["):  # all of the file, or a list of messages on each line
            return first.endswith(b"]") and next(found, None) is not None and _is_conversation(first)
        if not first.startswith(b"{"):
            return True
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


def _is_conversation(line: bytes) -> bool:
    """Tells whether a line is a list of messages."""
    try:
        value = parse_line(line)
    except BadRecord:
        return False
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _elements(path: Path, data: bytes) -> Iterator[tuple[int, bool, Any]]:
    """Parses the elements of a JSON array, of the only array of objects in an object, or several objects in a row.

    Yields each with the line that it begins on, and whether it alone begins there: programs write a whole array on one
    line. Raises InputError as `read`.
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
        alone = True
        while not text.startswith("]", at) if array else at < len(text):
            line, counted, before = line + text.count("\n", counted, at), at, alone
            value, at = _value(text, at)
            comma = text.startswith(",", at)
            beyond = _past_space(text, at + 1) if comma else at
            last = text.startswith("]", at) if array else at == len(text)
            alone = last or text.find("\n", counted, beyond) >= 0
            yield line, before and alone, value
            if comma:
                at = beyond
            elif array and not text.startswith("]", at):
                raise ValueError("a comma or ] is missing")
        if array and wrapped is None:
            at = _past_space(text, at + 1)
            if at < len(text):
                raise ValueError("something follows the array")
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: not JSON: {_what(error)}") from None
    except (ValueError, RecursionError) as error:
        line, column = line + text.count("\n", counted, at), at - text.rfind("\n", 0, at)
        raise InputError(f"{path}, line {line}, column {column}: not JSON: {error}") from None


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
