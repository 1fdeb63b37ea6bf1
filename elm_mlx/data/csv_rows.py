"""The rows of a CSV or TSV file, one at a time, as objects of texts by the names in its first line.

Quoting is RFC 4180's: a field in quotes may hold separators, line ends and doubled quotes. The separator is a tab where
the file is called `.tsv`; otherwise what the first line has most of: commas, semicolons (as spreadsheets write them
where the comma is decimal) or tabs; or what a line `sep=` in front of it says.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from elm_mlx.data import packed_files
from elm_mlx.data.bad_record import BadRecord, few, key_of
from elm_mlx.data.columns import Heading
from elm_mlx.errors import InputError
from elm_mlx.reading import counted

_TSV = tuple(".tsv" + packing for packing in packed_files.PACKINGS)
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_COLUMNS = 100_000  # of which a name each is kept; spreadsheets have 16,384 at most
_FIELD = 32 << 20  # characters of a field, each of which takes four bytes while it is read
_SAID = re.compile(r"sep=([,;\t])\s*")  # a line that some spreadsheets write, and all of them read
_LONE_RETURN = re.compile(r"(?<=\r)(?!\n)")  # a line's end, to files of an older Macintosh
_QUOTED_LATE = re.compile(r'\s+".*"\s*', re.S)
_NUL = "a byte 0, which no text has"
_AS_UTF8 = "save it as UTF-8 (in Excel: CSV UTF-8; or iconv -f CP1252 -t UTF-8)"


class _Lines:
    """The lines of a file, as `csv.reader` takes them, and where it stands.

    Attributes:
        number: of the last line.
        record: the lines of the record under way.
        damaged: whether one of them is no text: has a byte 0, or is not UTF-8, of which lone surrogates stand in it.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._found = path, self._read(path, file)
        self.number = 0
        self.begin()

    def begin(self) -> None:
        """Begins a record, with the next line."""
        self.record: list[str] = []
        self.damaged = False
        self._size = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        text = next(self._found)
        self.number += 1
        self.record.append(text)
        self._size += len(text)
        if self._size > packed_files.LINE_BYTES:
            raise InputError(f"{self._path}, line {self.first}: a row of more than 128 MB: is a quote not closed?")
        return text

    @property
    def first(self) -> int:
        """The number of the first line of the record under way."""
        return self.number - len(self.record) + 1

    def _read(self, path: Path, file: IO[bytes]) -> Iterator[str]:
        for _, line in packed_files.whole_lines(path, file):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                text = line.decode("utf-8", "surrogateescape")
                self.damaged = True
            self.damaged |= b"\0" in line
            yield from filter(None, _LONE_RETURN.split(text)) if "\r" in text else (text,)


class Table:
    """An opened CSV or TSV file.

    Attributes:
        names: of the columns; `column 3` is one without.
        separator: what stands between fields.

    Raises:
        InputError: its first line names no columns, or one twice.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._lines = path, _Lines(path, file)
        csv.field_size_limit(_FIELD)
        self.separator, self.names = ",", []
        first = self._first()
        said = _SAID.fullmatch(first)
        if said is not None:
            first = self._first()
        self.separator = said[1] if said else _separator(path, first)
        # The reader takes the names too, for one may have a line's end in it.
        self._reader = csv.reader(
            itertools.chain(filter(None, [first]), self._lines), delimiter=self.separator, strict=True
        )
        row = self._next()
        if row is None:
            return
        self._header = self._lines.first
        if self._lines.damaged:
            what = f"have {_NUL}" if any("\0" in name for name in row) else f"are not UTF-8; {_AS_UTF8}"
            raise InputError(f"{path}, line {self._header}: the columns' names {what}")
        if len(row) > _COLUMNS:
            raise InputError(f"{path}, line {self._header}: more than {_COLUMNS:,} columns, which no table has")
        self._named = [name.strip() for name in row]
        if not any(self._named):
            raise InputError(f"{path}, line {self._header}: names no column")
        self.names = [name or f"column {number}" for number, name in enumerate(self._named, 1)]
        twice = next((name for name, count in Counter(self.names).items() if count > 1), None)
        if twice is not None:
            first_at, second = [number for number, name in enumerate(self.names, 1) if name == twice][:2]
            raise InputError(
                f"{path}, line {self._header}, column {second}: {key_of(twice)} is the name of column {first_at} too; "
                "give each a name of its own, in a line above if this one is a record already"
            )

    @property
    def heading(self) -> Heading:
        """The columns' names, as `columns.of_table` takes them."""
        line = self._header if self.names else 1
        kind = f"fields between {SEPARATORS[self.separator]}"
        return Heading(self.names, f"{self._path}, line {line}", kind, self.separator)

    def rows(self) -> Iterator[tuple[str, dict[str, str] | BadRecord]]:
        """Reads the rows that are not blank: each one's place, and its texts by column.

        Raises:
            InputError: quotes are where nobody knows any more which column, and which row, something belongs to.
        """
        while (row := self._next()) is not None:
            if any(cell and not cell.isspace() for cell in row):
                where = f"{self._path}, line {self._lines.first}"
                try:
                    yield where, self._value(row)
                except BadRecord as error:
                    yield where, error

    def _value(self, row: list[str]) -> dict[str, str]:
        """A row as an object. Raises BadRecord."""
        names = self.names
        if self._lines.damaged:
            for number, (name, cell) in enumerate(zip(names, row, strict=False), 1):
                if "\0" in cell:
                    raise BadRecord(f"column {number}, {key_of(name)}: has {_NUL}")
                if not cell.isascii() and re.search("[\udc80-\udcff]", cell):
                    raise BadRecord(f"column {number}, {key_of(name)}: not UTF-8; {_AS_UTF8}")
        for number, (name, cell) in enumerate(zip(names, row, strict=False), 1):
            if cell[:1].isspace() and _QUOTED_LATE.fullmatch(cell) and cell in "".join(self._lines.record):
                raise BadRecord(
                    f"column {number}, {key_of(name)}: has a space before its quote, which is one of the text "
                    "then; remove the space"
                )
        if len(row) < len(names):
            missing = few(map(key_of, names[len(row) :]))
            raise BadRecord(
                f"has {counted(len(row), 'field')}, and line {self._header} names {len(names)}: no {missing}"
            )
        if any(row[len(names) :]):
            number = len(names) + next(i for i, cell in enumerate(row[len(names) :], 1) if cell)
            raise BadRecord(
                f"column {number}: has no name, for line {self._header} names {counted(len(names), 'column')}; a field "
                f"with {SEPARATORS[self.separator]} in it needs quotes around it"
            )
        cells = zip(names, self._named, row, strict=False)
        return {name: cell for name, named, cell in cells if named or cell}

    def _first(self) -> str:
        """The next line that is not blank; an empty one at the end."""
        self._lines.begin()
        while (line := next(self._lines, "")) and not line.strip(" \r\n"):
            self._lines.begin()
        return line

    def _next(self) -> list[str] | None:
        """The next record's fields, none of a blank line; None at the end. Raises InputError."""
        if self._reader.line_num:
            self._lines.begin()
        try:
            return next(self._reader, None)
        except csv.Error as error:
            raise self._misplaced(str(error)) from None

    def _misplaced(self, reason: str) -> InputError:
        """Says at which line and column the record under way is no CSV."""
        text, apart = "".join(self._lines.record), re.escape(self.separator)
        field = re.compile(rf'(?:"[^"]*(?:""[^"]*)*"|[^"{apart}\r\n][^{apart}\r\n]*|){apart}')
        at, column = 0, 1
        while found := field.match(text, at):
            at, column = found.end(), column + 1
        if "larger" in reason:
            reason = f"a field of more than {_FIELD >> 20} million characters: is a quote not closed?"
        elif "NUL" in reason:
            reason = _NUL
        elif text.startswith('"', at):
            closed = re.compile(r'"[^"]*(?:""[^"]*)*"').match(text, at)
            reason = "the quote that it begins with is not closed"
            if closed is not None:
                at = closed.end()
                reason = "goes on after its closing quote; a quote in a field in quotes is written twice"
        line = self._lines.first + len(re.findall(r"\r\n|\r|\n", text[:at]))
        return InputError(f"{self._path}, line {line}, column {column}: {reason}")


@contextmanager
def opened(path: Path) -> Iterator[Table]:
    """Opens a table. Raises InputError as `Table` and `packed_files.open_file`, also while the block reads."""
    with packed_files.open_file(path) as file:
        yield Table(path, file)


def read_rows(path: Path, start: int) -> Iterator[tuple[int, str, dict[str, str] | BadRecord]]:
    """Reads the rows of a table from number `start` on, as `data_files.read`, and raises as it."""
    with opened(path) as table:
        for number, (where, value) in enumerate(table.rows()):
            if number >= start:
                yield number, where, value


def _separator(path: Path, line: str) -> str:
    """The separator of a file by its name, or its first line outside quotes."""
    if path.name.lower().endswith(_TSV):
        return "\t"
    counts = Counter(re.sub(r'"[^"]*"', "", line))
    return max(SEPARATORS, key=lambda separator: counts[separator])
