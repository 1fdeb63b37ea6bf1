"""Bringing an index up to date: what it holds is always what a new one would hold, whatever has been killed before."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from elm_mlx.documents.index_file import TOKENIZER, separated
from elm_mlx.documents.indexing import IndexReport, index_documents
from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.errors import ElmError, InputError

WORDS = [
    "apple",
    "図書館の本",
    "river",
    "stone",
    "cloud",
    "engine",
    "winter",
    "garden",
    "silver",
    "thread",
    "lantern",
    "meadow",
]


def content(path: Path) -> list[tuple[object, ...]]:
    """What an index holds, without numbers; its words agree with its passages."""
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO words (words) VALUES ('integrity-check')")
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.execute(f"CREATE VIRTUAL TABLE temp.anew USING fts5 (heading, text, tokenize='{TOKENIZER}')")
        for number, heading, text in connection.execute("SELECT id, heading, text FROM passages").fetchall():
            row = (number, separated(heading), separated(text))
            connection.execute("INSERT INTO temp.anew (rowid, heading, text) VALUES (?, ?, ?)", row)
        held = []
        for place in ("main, words", "temp, anew"):
            connection.execute(f"CREATE VIRTUAL TABLE temp.listed USING fts5vocab ({place}, instance)")
            held.append(connection.execute("SELECT * FROM temp.listed").fetchall())
            connection.execute("DROP TABLE temp.listed")
        assert held[0] == held[1]
        rows = connection.execute(
            "SELECT path, first, last, heading, text FROM passages JOIN files ON files.id = file "
            "ORDER BY path, first, text"
        ).fetchall()
    connection.close()
    return rows


def write_random(directory: Path, draw: random.Random, count: int) -> None:
    for _ in range(count):
        text = "".join(
            f"# {draw.choice(WORDS)}\n\n{' '.join(draw.choices(WORDS, k=60))}\n\n" for _ in range(draw.randint(1, 6))
        )
        path = directory / draw.choice("abc") / f"{draw.randrange(40)}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        if draw.random() < 0.2:
            path.unlink(missing_ok=True)
        else:
            path.write_text(text)


def counts(report: IndexReport) -> tuple[int, int, int, int]:
    return report.added, report.changed, report.removed, report.unchanged


def test_what_is_new_changed_and_gone(tmp_path: Path) -> None:
    notes, out = tmp_path / "notes", tmp_path / "notes.db"
    notes.mkdir()
    (notes / "a.md").write_text("# A\n\napple\n")
    (notes / "b.txt").write_text("banana\n")
    (notes / "c.txt").write_bytes(b"\0\1\2")
    report = index_documents(notes, out)
    assert counts(report) == (2, 0, 0, 0) and report.passages == 2 and report.files == 2
    assert [(each.path, each.why) for each in report.left_out] == [("c.txt", "is binary")]
    (notes / "a.md").write_text("# A\n\napricot\n")
    (notes / "b.txt").rename(notes / "d.txt")
    report = index_documents(notes, out)
    assert counts(report) == (1, 1, 1, 0)
    assert [each.why for each in report.left_out] == ["is binary"]  # still said, and not read as text again
    index = DocumentIndex(out)
    assert {each.place for each in index.search("apricot banana apple")} == {"a.md:3", "d.txt:1"}
    assert index.search("apple") == [] and len(index) == 2
    index.close()
    os.utime(notes / "a.md", (1, 1))
    assert counts(index_documents(notes, out)) == (0, 0, 0, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "notes.db"]


@pytest.mark.parametrize("name", ["notes", "notes.txt"])
def test_an_index_among_its_documents_is_none_of_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.md").write_text("one")
    for _ in range(2):
        report = index_documents(tmp_path, tmp_path / name)
        assert report.files == report.passages == 1 and not report.left_out


def test_an_updated_index_holds_what_a_new_one_does(tmp_path: Path) -> None:
    draw = random.Random(1)
    for number in range(5):
        write_random(tmp_path / "notes", draw, 12)
        index_documents(tmp_path / "notes", tmp_path / "old.db")
        index_documents(tmp_path / "notes", tmp_path / f"new-{number}.db")
        assert content(tmp_path / "old.db") == content(tmp_path / f"new-{number}.db")


KILLED = """
import sys
from pathlib import Path
from elm_mlx.documents import indexing
indexing._SECONDS = 0.0  # a transaction for each file
print("begun", flush=True)
indexing.index_documents(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_anywhere_it_answers_and_goes_on(tmp_path: Path) -> None:
    draw, out = random.Random(2), tmp_path / "notes.db"
    left = 0
    for number in range(9):
        write_random(tmp_path / "notes", draw, 60)
        command = [sys.executable, "-c", KILLED, str(tmp_path / "notes"), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            time.sleep(draw.random() * 0.06)
            process.send_signal(signal.SIGKILL)
        if out.exists():
            index = DocumentIndex(out)
            left += bool(index.notes)
            assert all(each.text for each in index.search(" ".join(WORDS)))
            index.close()
        if number % 3 == 2:
            index_documents(tmp_path / "notes", out)
            index_documents(tmp_path / "notes", tmp_path / f"new-{number}.db")
            assert content(out) == content(tmp_path / f"new-{number}.db")
            assert DocumentIndex(out).notes == ()
    assert left > 0
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".") and "lock" not in path.name]


def test_a_search_sees_one_state_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, out = tmp_path / "notes", tmp_path / "notes.db"
    notes.mkdir()
    (notes / "a.md").write_text("# Pets\n\nCats are kept.")
    index_documents(notes, out)
    with sqlite3.connect(out) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # as while it is written
    index = DocumentIndex(out)
    by_words = DocumentIndex._by_words

    def meanwhile(self: DocumentIndex, asked: Any) -> dict[int, float]:
        found = by_words(self, asked)
        with sqlite3.connect(out) as connection:
            connection.execute("UPDATE passages SET text = 'Taxes are due in May.'")
        return found

    monkeypatch.setattr(DocumentIndex, "_by_words", meanwhile)
    assert [each.text for each in index.search("cats")] == ["Cats are kept."]
    index.close()


def test_a_reader_sees_each_file_as_it_was_or_is(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("apple")
    index_documents(tmp_path / "notes", tmp_path / "notes.db")
    index = DocumentIndex(tmp_path / "notes.db")
    (tmp_path / "notes" / "a.md").write_text("banana")
    index_documents(tmp_path / "notes", tmp_path / "notes.db")
    assert index.search("apple") == [] and len(index.search("banana")) == 1
    index.close()


def test_two_writers(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    index_documents(tmp_path / "notes", tmp_path / "notes.db")
    with sqlite3.connect(tmp_path / "notes.db", isolation_level=None) as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr("elm_mlx.documents.index_file._WAIT", 0.05)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ElmError, match="another process"):
            index_documents(tmp_path / "notes", tmp_path / "notes.db")
    other.close()


def test_what_is_no_index_or_of_another_directory_stays(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.db").write_text("precious")
    (tmp_path / "empty.db").touch()
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE notes (text)")
    other.close()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.db")}
    for name in before:
        with pytest.raises(InputError, match="no index of documents"):
            index_documents(tmp_path / "one", tmp_path / name)
    index_documents(tmp_path / "one", tmp_path / "own.db")
    with pytest.raises(InputError, match=r"is an index of .*one; choose another --out"):
        index_documents(tmp_path / "two", tmp_path / "own.db")
    with pytest.raises(InputError, match="is no directory"):
        index_documents(tmp_path / "none", tmp_path / "new.db")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.db") if path.name != "own.db"} == before


def test_without_fts5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without(sqlite3.Connection):
        def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
            if "fts5" in sql:
                raise sqlite3.OperationalError("no such module: fts5")
            return super().execute(sql, *arguments)

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, **k, factory=Without))
    with pytest.raises(ElmError, match="built without FTS5"):
        index_documents(tmp_path, tmp_path / "notes.db")
    assert [*tmp_path.iterdir()] == []
