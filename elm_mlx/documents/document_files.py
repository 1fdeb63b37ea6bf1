"""The files of a directory that are indexed, and their text: what is hidden, ignored, binary or huge is left out."""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elm_mlx import reading
from elm_mlx.errors import InputError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

MOST_TEXT, MOST_PDF = 16 << 20, 256 << 20  # bytes of a file
MARKDOWN = (".md", ".markdown", ".mdown", ".qmd")
HTML = (".html", ".htm", ".xhtml")
PDF = (".pdf",)
TEXT = (".txt", ".text", ".rst", ".adoc", ".org", ".tex")
PYTHON = (".py", ".pyi")
CODE = (
    ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".m", ".mm", ".metal", ".cu", ".cs", ".java", ".kt", ".scala",
    ".swift", ".go", ".rs", ".zig", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".vue", ".css", ".rb", ".php", ".pl", ".lua",
    ".r", ".jl", ".hs", ".ml", ".ex", ".erl", ".clj", ".sh", ".bash", ".zsh", ".fish", ".ps1", ".sql", ".proto",
    ".cmake", ".toml", ".yaml", ".yml", ".ini", ".cfg",
)  # fmt: skip
_KNOWN = frozenset((*MARKDOWN, *HTML, *PDF, *TEXT, *PYTHON, *CODE))
_DIRECTORIES = frozenset(("__pycache__", "node_modules"))  # of programs, whether or not .gitignore names them
_DEEPEST = 100  # directories within each other
_STARS = re.compile(r"\*+")
_MOST_STARS = 4  # of a rule: each more multiplies the time for a long name by its length
_LOOKED_AT = 8192  # bytes, for a NUL, which no text has
_DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?([\w.:-]{1,40})", re.IGNORECASE)
_HEAD = 2048  # bytes of a page that say its encoding
# By what pages call them: as browsers read them, which is not what some are called.
_NAMES = {
    "utf-8": "utf8 utf-16 utf-16le utf-16be", "cp1252": "windows-1252 iso-8859-1 latin1 latin-1 ascii us-ascii",
    "gb18030": "gbk gb2312 x-gbk", "cp932": "shift_jis shift-jis sjis x-sjis windows-31j ms_kanji",
    "cp949": "euc-kr ks_c_5601-1987 ksc5601", "big5hkscs": "big5 big5-hkscs", "cp874": "windows-874 tis-620",
    "euc-jp": "x-euc-jp", "iso-2022-jp": "", "koi8-r": "koi8", "koi8-u": "", "cp866": "ibm866",
    "mac-roman": "macintosh x-mac-roman", "cp1254": "windows-1254 iso-8859-9 latin5",
    **{f"iso-8859-{part}": "" for part in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)},
    **{f"cp125{part}": f"windows-125{part}" for part in (0, 1, 3, 5, 6, 7, 8)},
}  # fmt: skip
_ENCODINGS = {name: [codec] for codec, names in _NAMES.items() for name in (codec, *names.split())}
_WIDE = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class LeftOut:
    """A file that is not indexed, by its path from the directory, and why."""

    path: str
    why: str


def walk(directory: Path, left_out: Callable[[LeftOut], None]) -> Iterator[tuple[str, Path]]:
    """Yields the files to index, sorted: each its path from `directory`, with `/`, and its place.

    Left out without a word are hidden files and directories, those that a `.gitignore` names, symbolic links (so that
    nothing outside is read, and nothing twice), and files of kinds that hold no text to ask about. What is too large,
    or of a name that is no text, goes to `left_out`.

    Raises:
        InputError: `directory` is none, or cannot be read.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: is no directory; its documents are to be indexed")
    yield from _walk(directory, "", (), left_out)


def _walk(
    directory: Path, prefix: str, ignored: Sequence[tuple[str, GitIgnoreSpec]], left_out: Callable[[LeftOut], None]
) -> Iterator[tuple[str, Path]]:
    if prefix.count("/") > _DEEPEST:
        left_out(LeftOut(prefix, f"lies more than {_DEEPEST} directories deep"))
        return
    try:
        with os.scandir(directory) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        if not prefix:
            raise InputError(f"{directory}: cannot be read: {error.strerror}") from None
        left_out(LeftOut(prefix, f"cannot be read: {error.strerror}"))
        return
    if any(entry.name == ".gitignore" for entry in entries):
        ignored = (*ignored, (prefix, _ignore_rules(directory / ".gitignore")))
    for entry in entries:
        path = prefix + entry.name
        if entry.name.startswith(".") or entry.is_symlink() or entry.name in _DIRECTORIES:
            continue
        is_directory = entry.is_dir(follow_symlinks=False)
        if _is_ignored(path + "/" * is_directory, ignored):
            continue
        if is_directory:
            yield from _walk(directory / entry.name, path + "/", ignored, left_out)
        elif _is_wanted(entry, path, left_out):
            yield path, directory / entry.name


def _is_wanted(entry: os.DirEntry[str], path: str, left_out: Callable[[LeftOut], None]) -> bool:
    suffix = Path(entry.name).suffix.lower()
    if suffix and suffix not in _KNOWN:
        return False
    try:
        path.encode()
        status = entry.stat(follow_symlinks=False)
    except UnicodeEncodeError:
        left_out(LeftOut(reading.printable(path), "its name is not UTF-8"))
        return False
    except OSError as error:
        left_out(LeftOut(path, f"cannot be read: {error.strerror}"))
        return False
    most = MOST_PDF if suffix in PDF else MOST_TEXT
    if status.st_size > most:
        left_out(LeftOut(path, f"has more than {reading.byte_size(most)}"))
    return stat.S_ISREG(status.st_mode) and status.st_size <= most


def _ignore_rules(path: Path) -> GitIgnoreSpec:
    """Returns the rules of a `.gitignore`, without those that are none to git either, or have too many stars."""
    from pathspec import GitIgnoreSpec

    rules = []
    with suppress(InputError):
        for line in reading.content(path, 1 << 20).decode("utf-8", "replace").splitlines():
            with suppress(ValueError):
                GitIgnoreSpec.from_lines([line])
                if len(_STARS.findall(line)) <= _MOST_STARS:
                    rules.append(line)
    return GitIgnoreSpec.from_lines(rules)


def _is_ignored(path: str, ignored: Sequence[tuple[str, GitIgnoreSpec]]) -> bool:
    """Returns whether the rules say so of a path, the nearest that say anything."""
    for prefix, rules in reversed(ignored):
        said = rules.check_file(path[len(prefix) :]).include
        if said is not None:
            return said
    return False


def is_binary(data: bytes) -> bool:
    """Returns whether a file's content is no text: it has a NUL near its beginning, and is not UTF-16."""
    return b"\0" in data[:_LOOKED_AT] and data[:2] not in _WIDE


def text_of(data: bytes, html: bool = False) -> str:
    """Returns a file's text, its lines ended by `\\n`, one for each line end of the file.

    It is read as its mark says, by the encoding that a page of HTML declares, or as UTF-8; and where it is none, as
    Windows-1252, which old files of Western languages are in. NULs are dropped.
    """
    encodings = [_WIDE.get(data[:2], "utf-8-sig")]
    if html and encodings == ["utf-8-sig"] and not data.startswith(codecs.BOM_UTF8):
        declared = _DECLARED.search(data[:_HEAD])
        encodings[:0] = _ENCODINGS.get(declared[1].decode("ascii", "replace").lower(), []) if declared else []
    text = None
    for encoding in encodings:
        try:
            text = data.decode(encoding)
            break
        except ValueError:
            continue
    if text is None:
        text = data.decode("cp1252", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
