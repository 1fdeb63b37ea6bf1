"""Brings an index up to date with a directory: what is new, changed or gone, by the hash of each file's content.

Each file is exchanged within a transaction, so that an index is whole whenever the process is killed, and goes on from
there the next time; one process writes at a time. Who asks meanwhile sees each file as it was or as it is.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from elm_mlx import files, reading
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.documents import index_file
from elm_mlx.documents.document_files import MOST_PDF, LeftOut, walk
from elm_mlx.documents.index_file import Embedder, Passage, named_errors, separated, write_setting
from elm_mlx.documents.passages import passages_of
from elm_mlx.documents.pdf_pages import INSTALL
from elm_mlx.documents.static_embeddings import StaticEmbeddings, embeddings_of
from elm_mlx.documents.text_blocks import TextBlock
from elm_mlx.errors import InputError

_SECONDS = 1.0  # of a transaction: what a kill loses
_EMBEDDED = 2000  # passages at a time, of whole files


@dataclass
class IndexReport:
    """What bringing an index up to date has done: numbers of files, and the passages that it holds now.

    Attributes:
        left_out: files that hold no text which can be read.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    passages: int = 0
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def files(self) -> int:
        return self.added + self.changed + self.unchanged


def index_documents(
    directory: Path, path: Path, embeddings: StaticEmbeddings | None = None, on_progress: OnProgress = no_progress
) -> IndexReport:
    """Indexes the documents in `directory` and below it in the file `path`; of one that is there, what has changed.

    Args:
        embeddings: make vectors of these. None keeps those that the index has: it goes on with theirs.

    Raises:
        InputError: `directory` is none; `path` is something else than an index, or one of another directory.
        ElmError: it cannot be written; another process writes to it; SQLite has no FTS5.
    """
    directory, path = reading.expanded(directory).resolve(), reading.expanded(path)
    report = IndexReport()
    if not directory.is_dir():
        raise InputError(f"{directory}: is no directory; the documents in it are to be indexed")
    index_file.check_fts5()
    if path.exists():
        index_file.connect(path).close()  # before a lock is left beside what is none of ours
    with files.hold(path, beside=True):
        if not path.exists():
            index_file.create(path)
        with closing(index_file.connect(path, writable=True)) as connection, named_errors(path):
            _Update(connection, directory, path, report).run(embeddings, on_progress)
    return report


class _Update:
    def __init__(self, connection: sqlite3.Connection, directory: Path, path: Path, report: IndexReport) -> None:
        self._connection, self._directory, self._path, self._report = connection, directory, path, report
        self._begun = 0.0  # when the transaction did; 0 outside of one

    def run(self, embeddings: StaticEmbeddings | None, on_progress: OnProgress) -> None:
        root = index_file.read_setting(self._connection, "root")
        if root is not None and root != str(self._directory):
            raise InputError(f"{self._path}: is an index of {root}; choose another --out, or remove it")
        embedder = index_file.read_embedder(self._connection, self._path)
        if embeddings is None and embedder is not None:
            embeddings = embeddings_of(embedder, self._path)
        own = None if embeddings is None else _embedder_of(embeddings)
        self._connection.execute(
            "PRAGMA journal_mode = WAL"
        )  # where the file system has no such thing, another is kept
        self._connection.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            write_setting(self._connection, "root", str(self._directory))
            write_setting(self._connection, "unfinished", True)
            if own is not None:  # from the beginning on, so that whoever goes on with it makes them too
                if embedder is not None and (own.sha256, own.width) != (embedder.sha256, embedder.width):
                    self._connection.execute("DELETE FROM vectors")
                write_setting(self._connection, "embedder", vars(own))
        self._files(on_progress)
        if embeddings is not None:
            self._vectors(embeddings, on_progress)
        with self._transaction():
            write_setting(self._connection, "unfinished", False)
        self._report.passages = self._connection.execute("SELECT count(*) FROM passages").fetchone()[0]
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with suppress(sqlite3.OperationalError):  # someone reads it just now
            self._connection.execute("PRAGMA journal_mode = DELETE")  # one file again, which can be copied

    def _files(self, on_progress: OnProgress) -> None:
        known: dict[str, tuple[int, bytes, str | None]] = {
            path: (number, hashed, problem)
            for number, path, hashed, problem in self._connection.execute("SELECT id, path, hash, problem FROM files")
        }
        report, seen = self._report, set()
        real = self._path.resolve()
        own = {real, *(real.with_name(real.name + end) for end in index_file.BESIDE)}
        found = [each for each in walk(self._directory, report.left_out.append) if each[1] not in own]
        with self._transactions():
            for number, (path, place) in enumerate(found):
                on_progress("index", number, len(found))
                try:
                    data = reading.content(place, MOST_PDF)
                except InputError as error:  # gone meanwhile, or not to be read
                    report.left_out.append(LeftOut(path, str(error).removeprefix(f"{place}: ")))
                    continue
                hashed = hashlib.sha256(data).digest()
                before = known.get(path)
                if before is not None and before[1] == hashed:
                    problem = before[2]
                    report.unchanged += problem is None
                else:
                    passages, problem, lasting = _read(path, data)
                    if not lasting:
                        report.left_out.append(LeftOut(path, problem or ""))
                        seen.add(path)  # what was read of it before stays
                        continue
                    self._exchange(path, hashed, passages, problem, None if before is None else before[0])
                    report.changed += problem is None and before is not None
                    report.added += problem is None and before is None
                seen.add(path)
                if problem is not None:
                    report.left_out.append(LeftOut(path, problem))
            for path, (number, _, problem) in known.items():
                if path not in seen:
                    self._remove(number)
                    report.removed += problem is None
                    self._pause()
        on_progress("index", len(found), len(found))

    def _exchange(
        self, path: str, hashed: bytes, passages: list[TextBlock], problem: str | None, old: int | None
    ) -> None:
        """Puts a file and its passages in the place of those that it had."""
        self._pause()
        if old is not None:
            self._remove(old)
        connection = self._connection
        number = connection.execute(
            "INSERT INTO files (path, hash, problem) VALUES (?, ?, ?)", (path, hashed, problem)
        ).lastrowid
        for each in passages:
            made = connection.execute(
                "INSERT INTO passages (file, first, last, heading, text) VALUES (?, ?, ?, ?, ?)",
                (number, each.first, each.last, each.heading, each.text),
            ).lastrowid
            connection.execute(
                "INSERT INTO words (rowid, heading, text) VALUES (?, ?, ?)",
                (made, separated(each.heading), separated(each.text)),
            )

    def _remove(self, number: int) -> None:
        connection = self._connection
        written = connection.execute("SELECT id, heading, text FROM passages WHERE file = ?", (number,)).fetchall()
        connection.executemany(
            "INSERT INTO words (words, rowid, heading, text) VALUES ('delete', ?, ?, ?)",
            [(passage, separated(heading), separated(text)) for passage, heading, text in written],
        )
        for table, column in (("passages", "file"), ("vectors", "file"), ("files", "id")):
            connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (number,))

    def _vectors(self, embeddings: StaticEmbeddings, on_progress: OnProgress) -> None:
        """Makes the vectors that are missing."""
        connection = self._connection
        rows = connection.execute(
            "SELECT file, count(*) FROM passages WHERE file NOT IN (SELECT file FROM vectors) GROUP BY file"
        ).fetchall()
        with self._transactions():
            done, total = 0, sum(count for _, count in rows)
            for group in _groups(rows):
                on_progress("embed", done, total)
                texts: list[str] = []
                counts = []
                for file, _ in group:
                    found = connection.execute("SELECT heading, text FROM passages WHERE file = ? ORDER BY id", (file,))
                    own_texts = [Passage("", 0, 0, heading, text).searched for heading, text in found]
                    counts.append(len(own_texts))
                    texts += own_texts
                vectors = embeddings.vectors(texts)
                start = 0
                for (file, _), count in zip(group, counts, strict=True):
                    made = vectors[start : start + count].tobytes()
                    connection.execute("INSERT INTO vectors VALUES (?, ?)", (file, made))
                    start += count
                done += start
                self._pause()
            on_progress("embed", total, total)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _transactions(self) -> Iterator[None]:
        """One transaction after the other: `_pause` ends one that has lasted long enough."""
        with self._transaction():
            self._begun = time.monotonic()
            yield

    def _pause(self) -> None:
        if time.monotonic() - self._begun > _SECONDS:
            self._connection.execute("COMMIT")
            self._connection.execute("BEGIN IMMEDIATE")
            self._begun = time.monotonic()


def _embedder_of(embeddings: StaticEmbeddings) -> Embedder:
    return Embedder(str(embeddings.directory.resolve()), embeddings.sha256, embeddings.width)


def _read(path: str, data: bytes) -> tuple[list[TextBlock], str | None, bool]:
    """Returns a file's passages; or what is wrong with it, and whether it stays so while the file is the same."""
    try:
        return passages_of(path, data), None, True
    except ValueError as error:
        return [], str(error), True
    except ChildProcessError as error:  # somebody else ended it
        return [], str(error), False
    except ImportError:
        return [], INSTALL, False


def _groups(rows: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yields files and the numbers of their passages, in groups of about `_EMBEDDED` passages."""
    group: list[tuple[int, int]] = []
    for row in rows:
        group.append(row)
        if sum(count for _, count in group) >= _EMBEDDED:
            yield group
            group = []
    if group:
        yield group
