"""Tables as spreadsheets and programs write them: separators, quotes, line ends; faults by line and column."""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.data import csv_rows, data_files, packed_files
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.errors import InputError


def read(path: Path, data: bytes | None = None) -> list[tuple[str, object]]:
    """Each row's place in the file, and its value; of a bad one, the reason."""
    if data is not None:
        path.write_bytes(data)
    found = []
    for number, where, value in data_files.read(path, ()):
        assert number == len(found)
        found.append((where.removeprefix(f"{path}, "), str(value) if isinstance(value, BadRecord) else value))
    return found


@pytest.mark.parametrize(
    ("data", "separator"),
    [
        (b"a,b\n1,x\n", ","),
        (b"\xef\xbb\xbfa;b\r\n1;x\r\n", ";"),
        (b"a\tb\n1\tx", "\t"),
        (b'"a,c;d",b\n1,x\n', ","),  # what stands in quotes doesn't count
        (b'sep=;\r\n"a";b\r\n1;x\r\n', ";"),
        (b"a,b\r1,x\r", ","),  # as on an older Macintosh
        (b"\n \n\n a , b \n\n1,x\n\n,\n", ","),  # blank lines, and a row without anything
    ],
)
def test_what_stands_between_fields(tmp_path: Path, data: bytes, separator: str) -> None:
    (_, value), *others = read(tmp_path / "a.csv", data)
    assert others == [] and isinstance(value, dict) and list(value.values()) == ["1", "x"]
    with csv_rows.opened(tmp_path / "a.csv") as table:
        assert table.separator == separator and table.names[1] == "b"


def test_a_tsv_file_has_tabs(tmp_path: Path) -> None:
    assert read(tmp_path / "a.tsv", b"a,c\tb\n1\t2\n") == [("line 2", {"a,c": "1", "b": "2"})]
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"a,c\tb\n1\t2\n"))
    assert read(tmp_path / "a.tsv.gz") == [("line 2", {"a,c": "1", "b": "2"})]


def test_fields_of_several_lines_and_the_lines_after_them(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", b'a,b\n"1\n\n2","say ""hi"""\n3,5" pipe\r\n"4\r\n5",6\n7,8')
    assert rows == [
        ("line 2", {"a": "1\n\n2", "b": 'say "hi"'}), ("line 5", {"a": "3", "b": '5" pipe'}),
        ("line 6", {"a": "4\r\n5", "b": "6"}), ("line 8", {"a": "7", "b": "8"}),
    ]  # fmt: skip


def test_columns_without_a_name_are_numbered_where_they_hold_something(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", b",a,,\n0,x,,\n1,y,z,\n2,y,,,,\n")
    assert [value for _, value in rows] == [
        {"column 1": "0", "a": "x"}, {"column 1": "1", "a": "y", "column 3": "z"}, {"column 1": "2", "a": "y"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"1", "has 1 field, and line 1 names 3: no `b`, `c`"),
        (b"1,2,3,4", "column 4: has no name, for line 1 names 3 columns; a field with commas in it needs quotes"),
        (b"1,caf\xe9,3", "column 2, `b`: not UTF-8; save it as UTF-8"),
        (b'1, "2",3', "column 2, `b`: has a space before its quote, which is one of the text then; remove"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path: Path, row: bytes, reason: str) -> None:
    first, (where, bad), last = read(tmp_path / "a.csv", b'a,b,c\n"1\n",2,3\n' + row + b"\n4,5,6\n")
    assert first[0] == "line 2" and last == ("line 5", {"a": "4", "b": "5", "c": "6"})
    assert where == "line 4" and str(bad).startswith(reason)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a,b,a\n1,2,3\n", "line 1, column 3: `a` is the name of column 1 too"),
        (b"\n,,\n1,2,3\n", "line 2: names no column"),
        (b"a,b\xff\n1,2\n", "line 1: the columns' names are not UTF-8; save it"),
        (b'a,b\n1,2\n3,"4"5\n', "line 3, column 2: goes on after its closing quote"),
        (b'a,b\n1,"x\ny" z\n', "line 3, column 2: goes on after its closing quote"),
        (b'a,b\n1,2\n"3\n4",",\n5,6\n', "line 4, column 2: the quote that it begins with is not closed"),
        (b'a,b\n"', "line 2, column 1: the quote that it begins with is not closed"),
        ("a,b\n1,2\n".encode("utf-16"), "not UTF-8 but UTF-16"),
        ("a,b\n1,2\n".encode("utf-16-le"), "not UTF-8 but UTF-16"),
        (b"name,b\0\n1,2\n", "a byte 0, which no text has"),
    ],
)
def test_what_is_no_table_is_named_by_line_and_column(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.csv", data)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_columns_without_end_do_not_fill_the_memory(tmp_path: Path) -> None:
    """A few kilobytes of gzip are millions of separators."""
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"," * 100_000 + b"a\n1\n"))
    with pytest.raises(InputError, match=r"a\.csv\.gz, line 1: more than 100,000 columns, which no table has"):
        read(tmp_path / "a.csv.gz")


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_files, "LINE_BYTES", 1 << 16)
    with pytest.raises(InputError, match=r"a\.csv, line 2: a row of more than .*: is a quote not closed\?"):
        read(tmp_path / "a.csv", b'a,b\n1,"2\n' + b"3,4\n" * 50_000)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no row behind a byte 0")
def test_a_byte_0_is_one_rows_fault(tmp_path: Path) -> None:
    first, bad, last = read(tmp_path / "a.csv", b"name,b\n1,2\n3,4\x005\n6,7\n")
    assert bad == ("line 3", "column 2, `b`: has a byte 0, which no text has")
    assert (first[0], last[0]) == ("line 2", "line 4")


def test_a_field_that_no_text_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "_FIELD", 1 << 20)
    rows = b'a,b\n1,"' + b"x" * (1 << 20) + b'"\n'
    assert len(read(tmp_path / "a.csv", rows)) == 1
    with pytest.raises(
        InputError, match=r"a\.csv, line 2, column 2: a field of more than 1 million characters: is a quo"
    ):
        read(tmp_path / "a.csv", rows.replace(b"xx", b"xxx", 9))


def test_reading_on_from_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'a\n1\n\n"2\n"\n3\n')
    every = list(data_files.read(tmp_path / "a.csv", ()))
    for start in range(4):
        assert list(data_files.read(tmp_path / "a.csv", (), start)) == every[start:]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8) | st.sampled_from(
    ['"', '""', "a\nb", "\r", "\r\n", ",", ";", "\t", " ", "\ufeff", "\u2028", "'", "sep=;"]
)


@settings(max_examples=200)
@given(st.lists(st.tuples(texts, texts), max_size=5), st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"]))
def test_what_pythons_writer_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], separator: str, end: str
) -> None:
    made = io.StringIO(newline="")
    writer = csv.writer(made, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    found = read(tmp_path_factory.getbasetemp() / "made.csv", made.getvalue().encode())
    assert [value for _, value in found] == [
        {"a": a, "b": b} for a, b in rows if not all(not cell or cell.isspace() for cell in (a, b))
    ]


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([b"a", b"\xff", b'"', b",", b";", b"\n", b"\r", b" ", b"\0", b"\xef\xbb\xbf", b"sep=;"]))
)
def test_any_bytes_are_rows_or_one_line_of_error(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    try:
        for where, value in read(tmp_path_factory.getbasetemp() / "any.csv", b"".join(parts)):
            assert re.fullmatch(r"line \d+", where) and (isinstance(value, dict) or "\n" not in str(value))
    except InputError as error:
        assert "\n" not in str(error)
