"""Files that call themselves an index and are none: refused in one line, whatever they hold."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from elm_mlx.documents.index_file import named_errors
from elm_mlx.documents.indexing import index_documents
from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.errors import ElmError, InputError


@pytest.fixture
def index(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    for number in range(20):
        (tmp_path / "notes" / f"{number}.md").write_text(f"# Note {number}\n\n" + "some words of a note. " * 80)
    index_documents(tmp_path / "notes", tmp_path / "notes.db")
    return tmp_path / "notes.db"


def change(path: Path, *statements: str) -> None:
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            connection.executescript(statement)
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON files BEGIN DELETE FROM passages; END",
        "CREATE VIEW v AS SELECT 1",
        "CREATE TABLE more (x)",
        *(
            f"CREATE TRIGGER {name} AFTER INSERT ON files BEGIN DELETE FROM passages; END"
            for name in ("files", "settings", "passages_of_file", "words", "words_data", "words_config")
        ),
        "DROP TABLE words_config; CREATE VIEW words_config AS WITH RECURSIVE n (k, v) AS "
        "(SELECT 1, 1 UNION ALL SELECT k + 1, 1 FROM n) SELECT k, v FROM n",
        "DROP TABLE words_docsize; CREATE VIEW words_docsize AS SELECT 1 AS id, x'01' AS sz",
        "DROP TABLE vectors",
        "UPDATE sqlite_master SET sql = 'CREATE TABLE settings (name, value)' WHERE name = 'settings'",
        "PRAGMA application_id = 7",
        "PRAGMA user_version = 1",
        "UPDATE passages SET text = x'ff'",
        "UPDATE passages SET text = CAST(x'ff41' AS TEXT)",
        "UPDATE passages SET first = 'one'",
        "UPDATE settings SET value = '{' WHERE name = 'root'",
        "DELETE FROM files",
        "DELETE FROM passages",
        "INSERT INTO settings VALUES ('embedder', '3')",
        """INSERT INTO settings VALUES ('embedder', '{"directory": "x", "sha256": "", "width": -1}')""",
        """INSERT INTO settings VALUES ('embedder', '{"directory": "relative", "sha256": "", "width": 8}')""",
        "DROP TABLE words_data",
    ],
)
def test_a_changed_index_is_refused(index: Path, statement: str) -> None:
    change(index, statement)
    with pytest.raises(InputError) as error:
        DocumentIndex(index).search("some words")
    assert "\n" not in str(error.value) and str(index) in str(error.value)


def test_a_huge_text_is_cut(index: Path) -> None:
    change(index, "UPDATE passages SET text = printf('%.*c', 900000, 'x'), heading = printf('%.*c', 900000, 'x')")
    assert {len(each.text) for each in DocumentIndex(index).search("words", count=3)} == {4000}


def test_damaged_bytes_are_an_error_or_harmless(index: Path) -> None:
    draw, whole = random.Random(3), index.read_bytes()
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 20, 400])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        index.write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        try:
            opened = DocumentIndex(index)
            opened.search("some words of note 3")
            opened.close()
        except ElmError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"SQLite format 3\0" + bytes(84))
    for path, why in ((tmp_path / "a.db", "no index"), (tmp_path, "directory"), (tmp_path / "none.db", "No such file")):
        with pytest.raises(InputError, match=why):
            DocumentIndex(path)


@pytest.mark.parametrize("beside", ["-wal", "-shm", "-journal"])
def test_what_is_no_file_beside_an_index(index: Path, beside: str) -> None:
    """SQLite would wait for a named pipe for good."""
    os.mkfifo(f"{index}{beside}")
    with pytest.raises(InputError, match=f"{beside}: is no file"):
        DocumentIndex(index)


def test_where_nothing_may_be_written_it_is_said_why_that_is_needed(index: Path) -> None:
    """As SQLite ends where an index was left unfinished in a directory of someone else's."""
    with pytest.raises(ElmError, match="cannot be opened: SQLite makes files beside"), named_errors(index):
        raise sqlite3.OperationalError("unable to open database file")


KILLED = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # so that pages are written before the end
connection.execute("BEGIN")
connection.execute("UPDATE passages SET text = upper(text)")
connection.execute("DELETE FROM files")
os._exit(0)
"""


def test_what_was_killed_amid_a_transaction_is_undone(index: Path) -> None:
    """Outside of WAL too, as when an index becomes one file again: SQLite refuses it to who only reads."""
    whole = DocumentIndex(index).search("some words", count=3)
    subprocess.run([sys.executable, "-c", KILLED, str(index)], check=True)
    assert index.with_name(f"{index.name}-journal").stat().st_size
    assert DocumentIndex(index).search("some words", count=3) == whole


def test_a_command_that_is_named_can_be_pasted(index: Path) -> None:
    change(
        index,
        "UPDATE settings SET value = '\"/a b; rm c\"' WHERE name = 'root'",
        "UPDATE settings SET value = 'true' WHERE name = 'unfinished'",
    )
    assert DocumentIndex(index).notes[0].endswith(f"elm-mlx index '/a b; rm c' --out {index}")


def test_asking_writes_nothing(index: Path) -> None:
    before = index.read_bytes()
    opened = DocumentIndex(index)
    with pytest.raises(sqlite3.OperationalError):
        opened._connection.execute("DELETE FROM files")
    opened.search("note")
    opened.close()
    assert index.read_bytes() == before
