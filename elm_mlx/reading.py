"""What comes in from outside, read by one rule: bytes with a limit, and text that is UTF-8.

A file that someone names may be anything: gigabytes of zeros, a pipe that nobody writes to, a device, a page saved
by an editor of another age. Whoever opens one does it here: only regular files are read, no more of them than such a
file can need, and what is no text is refused in one line that says where. Knows nothing of what the text means.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from elm_mlx.errors import InputError

# The largest text of each kind in the wild, and a margin: a tokenizer_config.json has 1 MB, a tokenizer.json 35 MB,
# a text to measure by 1 GB (enwik9).
SETTINGS_BYTES = 16 << 20
TABLES_BYTES = 1 << 20  # YAML and TOML, of which Python reads about 1 MB a second
TEXT_BYTES = 64 << 20
CORPUS_BYTES = 1 << 30

_MARK = b"\xef\xbb\xbf"
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
_PIPES = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")  # how a shell names `<(command)`
_MOST_NODES = 100_000


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Raises:
        InputError: it cannot be opened, or is no regular file; also later, while the block reads, where that fails.
    """
    with _failures_named(path), os.fdopen(_descriptor(path), "rb") as file:
        yield file


def content(path: Path, most: int) -> bytes:
    """The bytes of a file of at most `most` bytes, or of a shell's `<(command)`. Raises InputError."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Both, because a file may grow meanwhile, and those of /proc say that they have nothing.
        data = b"" if size > most else file.read(most + 1)
    if size > most or len(data) > most:
        raise InputError(f"{path}: larger than {_size(most)}, which no such file is")
    return data


def text(path: Path, most: int = TEXT_BYTES) -> str:
    """A text file without a byte order mark, its lines ended by `\\n`. Raises InputError."""
    return decoded(content(path, most), str(path))


def stdin_text() -> str:
    """All of standard input, as `text`. Raises InputError."""
    data = sys.stdin.buffer.read(TEXT_BYTES + 1)
    if len(data) > TEXT_BYTES:
        raise InputError(f"stdin: more than {_size(TEXT_BYTES)}")
    return decoded(data, "stdin")


def limited_line(file: IO[bytes], most: int, where: str) -> bytes:
    """The next line with its end; nothing where the file ends. Raises InputError for one of more than `most` bytes."""
    line = file.readline(most + 1)
    if len(line) > most:
        raise InputError(f"{where}: has more than {_size(most)} without an end: no such line is read")
    return line


def decoded(data: bytes, where: str) -> str:
    """`data` as text, without a byte order mark, its lines ended by `\\n`.

    Raises:
        InputError: it is not UTF-8; says at which line and byte of `where`, and what to do.
    """
    data = unmarked(data, where)
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        begin = data.rfind(b"\n", 0, error.start) + 1
        decoded_line(data[begin : error.end], f"{where}, line {line + 1}")
        raise


def decoded_line(line: bytes, where: str) -> str:
    """`line` as text, its end as it is. Raises InputError that says at which byte of it, and what to do."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}; save it as UTF-8 "
            "(from Windows' or Latin letters: iconv -f CP1252 -t UTF-8)"
        ) from None


def unmarked(data: bytes, where: str) -> bytes:
    """`data` without the byte order mark of UTF-8. Raises InputError where it begins with that of UTF-16."""
    if data.startswith(_WIDE_MARKS):
        raise InputError(f"{where}: not UTF-8 but UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    return data.removeprefix(_MARK)


def yaml_mapping(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file of plain values. Raises InputError when it cannot be read, is none, or says a key
    twice, of which YAML would take the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        merged = 0

        def compose_mapping_node(self, anchor: Any) -> Any:
            """Looks at keys as they are written: later, those that `<<` brings stand among them."""
            node = super().compose_mapping_node(anchor)
            counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = next((key for key, count in counts.items() if count > 1), None)
            if twice is not None:
                raise ValueError(f"line {node.start_mark.line + 1}: the key {twice[:30]} stands twice")
            return node

        def flatten_mapping(self, node: Any) -> None:
            """Bounds what `<<` copies: a few lines of it, each of the one before, could fill any memory."""
            merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
            for each in (one for value in merged for one in (value.value if value.id == "sequence" else [value])):
                if isinstance(each, yaml.MappingNode):
                    self.flatten_mapping(each)
                    self.merged += len(each.value)
                    if self.merged > _MOST_NODES:
                        raise ValueError(f"it has more than {_MOST_NODES:,} values")
            super().flatten_mapping(node)

    try:
        values = yaml.load(text(path, TABLES_BYTES), Loader)
        _check_nodes(values)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not YAML of plain values: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no YAML mapping, which has lines like `key: value`")
    return values


def _check_nodes(values: Any) -> None:
    """Raises ValueError where a few aliases stand for more than anyone wrote, or for themselves."""
    left, seen = [values], 0
    while left:
        value = left.pop()
        inner = [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        left.extend(inner)
        seen += 1
        if seen > _MOST_NODES:
            raise ValueError(f"it has more than {_MOST_NODES:,} values")


def _descriptor(path: Path) -> int:
    """The file's, open; without O_NONBLOCK a pipe would be waited for. Raises InputError and OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise InputError(f"{path}: is no regular file") from None
        raise
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(kind) and str(path).startswith(_PIPES):
        os.set_blocking(descriptor, True)
        return descriptor
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise InputError(f"{path}: is no regular file")


@contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL, or half a surrogate pair
        if "\0" not in str(path) and not isinstance(error, UnicodeEncodeError):
            raise
        raise InputError(f"{str(path)!r}: is no name of a file") from None


def _size(most: int) -> str:
    return f"{most >> 20} MB" if most < 1 << 30 else f"{most >> 30} GB"
