"""An index of documents on disk: one SQLite file that holds passages, the words of them (FTS5), and perhaps vectors.

`indexing` writes it, `retrieval` asks it. A file is checked before anything of it is used: it says by its header that
it is such an index, and holds these tables and no others, so that an index from elsewhere can run nothing. SQLite's
own files of a database in use, `-wal` and `-shm`, may stand beside it; of a killed `index` they are read as well.
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from elm_mlx import files, reading
from elm_mlx.documents.document_files import PDF
from elm_mlx.documents.text_blocks import SEPARATOR
from elm_mlx.errors import ElmError, InputError

APPLICATION = 0x454C4D64  # "ELMd", in the header of the file
VERSION = 4  # of the tables, of what is a passage, and of what is a word
# English words by their stems, all others as they are, without accents: see docs/index.md for what each is worth. Marks
# belong to a word: the vowels of Hindi, Tamil and their like are some, and would end it.
TOKENIZER = "porter unicode61 remove_diacritics 2 categories ''L* M* N* Co''"
# Letters that are written without spaces, which the tokenizer takes for one word as far as no sign stands between them:
# Han, kana, bopomofo and Hangul, also half as wide; Thai, Lao, Burmese and Khmer; and the marks that belong to them.
_UNSPACED = re.compile(
    "[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    "\u3105-\u312f\u31a0-\u31bf\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff"
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf\u1000-\u103f\u1050-\u108f\u109a-\u109f\u1780-\u17d3\u17dd]+"
)
# The points of Hebrew and Arabic, which most texts leave out.
_POINTS = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06dc]+"
)
_TABLES = {
    "settings": "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # A file with a `problem` is known, and has no passages.
    "files": "CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, hash BLOB NOT NULL, problem TEXT)",
    "passages": (
        "CREATE TABLE passages (id INTEGER PRIMARY KEY, file INTEGER NOT NULL, first INTEGER NOT NULL, "
        "last INTEGER NOT NULL, heading TEXT NOT NULL, text TEXT NOT NULL)"
    ),
    "passages_of_file": "CREATE INDEX passages_of_file ON passages (file)",
    "words": (f"CREATE VIRTUAL TABLE words USING fts5 (heading, text, content='', tokenize='{TOKENIZER}')"),
    # Of a file's passages by their ids: float16, the rows one after the other.
    "vectors": "CREATE TABLE vectors (file INTEGER PRIMARY KEY, rows BLOB NOT NULL)",
}
_SHADOWS = {  # FTS5's own tables, which all its versions make so
    "words_data": "CREATE TABLE 'words_data'(id INTEGER PRIMARY KEY, block BLOB)",
    "words_idx": "CREATE TABLE 'words_idx'(segid, term, pgno, PRIMARY KEY(segid, term)) WITHOUT ROWID",
    "words_docsize": "CREATE TABLE 'words_docsize'(id INTEGER PRIMARY KEY, sz BLOB)",
    "words_config": "CREATE TABLE 'words_config'(k PRIMARY KEY, v) WITHOUT ROWID",
}
BESIDE = ("-wal", "-shm", "-journal")  # what SQLite's own files of a database in use end with
_MOST_BYTES = 1 << 28  # of a value
_WAIT = 30.0  # seconds for another process's transaction
_DAMAGED = "damaged, or no index of documents: remove it and make it anew (elm-mlx index DIR --out FILE)"


@dataclass(frozen=True)
class Passage:
    """A passage of a document.

    Attributes:
        path: its file, from the directory that was indexed.
        first, last: its lines in the file, from 1; of a PDF its pages.
        heading: the headings above it, outermost first; empty for none.
    """

    path: str
    first: int
    last: int
    heading: str
    text: str

    @property
    def place(self) -> str:
        """Its file and first line, as editors and terminals take them; of a PDF the page."""
        if self.path.lower().endswith(PDF):
            return f"{self.path}, page {self.first}"
        return f"{self.path}:{self.first}"

    @property
    def title(self) -> str:
        """Its place and its heading."""
        return f"{self.place} ({self.heading})" if self.heading else self.place

    def values(self, number: int) -> dict[str, Any]:
        """Returns what an answer in JSON says of a source: its number there, place, heading and text."""
        unit = "page" if self.path.lower().endswith(PDF) else "line"
        places = {f"first_{unit}": self.first, f"last_{unit}": self.last}
        return {"number": number, "file": self.path, **places, "heading": self.heading, "text": self.text}

    @property
    def searched(self) -> str:
        """The text that stands for the passage where vectors are made."""
        return f"{self.heading.replace(SEPARATOR, ' ')}\n{self.text}" if self.heading else self.text


@dataclass(frozen=True)
class Embedder:
    """The static embeddings that an index has vectors of: their directory, what their weights hash to, and width."""

    directory: str
    sha256: str
    width: int


def separated(text: str, asked: bool = False) -> str:
    """Returns a text as the tokenizer is given it: of letters that are written without spaces, each pair is a word.

    The pairs overlap, so that a word of two or more letters is found wherever it stands, in Chinese, Japanese, Thai,
    Lao, Burmese, Khmer and Korean (whose words have endings). A letter's marks belong to it. The last letter of a run
    is a word as well, so that each letter begins one.

    Args:
        asked: it is a question: the last letter is a word only where it is the only one.
    """
    if text.isascii():
        return text
    return _UNSPACED.sub(lambda found: f" {_pairs(found[0], asked)} ", _POINTS.sub("", text))


def _pairs(run: str, asked: bool) -> str:
    letters = _letters(unicodedata.normalize("NFKC", run))
    pairs = [*map("".join, pairwise((*letters, "")))]
    return " ".join(pairs[:-1] if asked and len(pairs) > 1 else pairs)


def _letters(run: str) -> list[str]:
    """Returns the letters, each with its marks."""
    if run.isalpha():  # none is a mark
        return [*run]
    letters: list[str] = []
    for each in run:
        if letters and unicodedata.category(each)[0] == "M":
            letters[-1] += each
        else:
            letters.append(each)
    return letters


def is_unspaced_letter(word: str) -> bool:
    """Returns whether a word is one such letter."""
    return _UNSPACED.fullmatch(word) is not None and len(_letters(word)) == 1


def check_fts5() -> None:
    """Raises ElmError where this Python's SQLite lacks FTS5, which nearly every one has."""
    with sqlite3.connect(":memory:") as connection:
        try:
            connection.execute("CREATE VIRTUAL TABLE t USING fts5 (x)")
        except sqlite3.Error:
            raise ElmError(
                f"this Python's SQLite {sqlite3.sqlite_version} was built without FTS5, which searches documents: use "
                "a Python from python.org, Homebrew, conda or a Linux distribution"
            ) from None
    connection.close()


def create(path: Path) -> None:
    """Makes an empty index, whole or not at all. Raises ElmError where it cannot be written."""
    with files.scratch_directory(path) as folder:
        made = folder / "index"
        connection = sqlite3.connect(made, isolation_level=None)
        try:
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            for statement in _TABLES.values():
                connection.execute(statement)
        finally:
            connection.close()
        made.rename(path)


def connect(path: Path, writable: bool = False) -> sqlite3.Connection:
    """Opens an index after a look at all that it is made of; for reading alone unless `writable`.

    Raises:
        InputError: there is none, or another file, or one of another version.
        ElmError: this Python's SQLite has no FTS5.
    """
    check_fts5()
    with reading.opened(path) as file:  # which refuses what is no regular file
        header = file.read(100)
    if header[:16] != b"SQLite format 3\0" or int.from_bytes(header[68:72], "big") != APPLICATION:
        raise InputError(f"{path}: is no index of documents; elm-mlx index DIR --out FILE makes one")
    if (version := int.from_bytes(header[60:64], "big")) != VERSION:
        raise InputError(
            f"{path}: an index of version {version}, and this is elm-mlx's {VERSION}: remove it, and index again"
        )
    for beside in BESIDE:
        if (own := path.with_name(path.name + beside)).exists() and not own.is_file():
            raise InputError(f"{own}: is no file, and SQLite would read it with {path.name}: remove it")
    place = f"file:{quote(str(path.absolute()))}?mode="
    if path.with_name(f"{path.name}-journal").exists():  # perhaps of a kill: who only reads cannot undo what it says
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"{place}rw", uri=True)) as undoing:
            undoing.execute("SELECT count(*) FROM sqlite_master")
    where = place + ("rw" if writable else "ro")
    with named_errors(path):
        connection = sqlite3.connect(where, uri=True, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        try:
            if sys.version_info >= (3, 11):
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES)
                connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            for pragma in (
                "trusted_schema = OFF",
                "cell_size_check = ON",
                f"query_only = {'OFF' if writable else 'ON'}",
            ):
                connection.execute(f"PRAGMA {pragma}")
            # As a list: a trigger may have a table's name.
            found = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL ORDER BY name")
            if found.fetchall() != sorted({**_TABLES, **_SHADOWS}.items()):
                raise InputError(f"{path}: {_DAMAGED}")
            connection.execute("SELECT count(*) FROM settings").fetchone()
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Raises what SQLite finds wrong in the block in one line about `path`: InputError for a damaged file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "locked" in text:
            raise ElmError(f"{path}: another process is writing to it; try again when it has ended") from None
        if "malformed" in text or "decode" in text or "no such" in text:
            raise InputError(f"{path}: {_DAMAGED}") from None
        if "unable to open" in text:
            raise ElmError(
                f"{path}: cannot be opened: SQLite makes files beside an index that is in use or was left unfinished, "
                "and may not do so here: copy it, with its -wal, to a directory that you may write to"
            ) from None
        raise ElmError(f"{path}: {text}") from None
    except (sqlite3.Error, OverflowError, UnicodeError):
        raise InputError(f"{path}: {_DAMAGED}") from None


def read_setting(connection: sqlite3.Connection, name: str) -> Any:
    """Returns what `write_setting` has written, None where it has not. Raises ValueError for what is no JSON."""
    row = connection.execute("SELECT substr(value, 1, 10000) FROM settings WHERE name = ?", (name,)).fetchone()
    return None if row is None else reading.load_json(str(row[0]))


def write_setting(connection: sqlite3.Connection, name: str, value: Any) -> None:
    """Records a value of JSON's kinds."""
    connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))


def read_embedder(connection: sqlite3.Connection, path: Path) -> Embedder | None:
    """Returns the embeddings whose vectors the index has, None without. Raises InputError where that is damaged."""
    try:
        value = read_setting(connection, "embedder")
        embedder = None if value is None else Embedder(**value)
    except (ValueError, TypeError):
        raise InputError(f"{path}: {_DAMAGED}") from None
    if embedder is not None and not (
        isinstance(embedder.directory, str)
        and isinstance(embedder.sha256, str)
        and type(embedder.width) is int
        and 0 < embedder.width <= 1 << 14
    ):
        raise InputError(f"{path}: {_DAMAGED}")
    return embedder


def read_passages(connection: sqlite3.Connection, path: Path, ids: list[int]) -> list[Passage]:
    """Returns the passages of these ids, in this order. Raises InputError for one that is not what was written."""
    passages = []
    for number in ids:
        row = connection.execute(
            "SELECT substr(path, 1, 4096), first, last, substr(heading, 1, 2000), substr(text, 1, 4000) "
            "FROM passages JOIN files ON files.id = passages.file WHERE passages.id = ?",
            (number,),
        ).fetchone()
        if row is None or [*map(type, row)] != [str, int, int, str, str]:
            raise InputError(f"{path}: {_DAMAGED}")
        passages.append(Passage(*row))
    return passages
