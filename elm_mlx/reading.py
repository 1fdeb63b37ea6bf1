"""Reads files from outside by one rule: bytes with a limit, text that is UTF-8, JSON and YAML with checked values.

A file that someone names may be anything: gigabytes of zeros, a pipe that nobody writes to, a device, a page saved
by an editor of another age. Whoever opens one does it here: only regular files are read, no more of them than such a
file can need, and what is no text is refused in one line that says where. Knows nothing of what the text means.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
LARGEST_SIZE = 1 << 30  # of a size: MLX adds positions up in 32 bits

AS_UTF8 = "save it as UTF-8 (from Windows' or Latin letters: iconv -f CP1252 -t UTF-8)"

_MARK = b"\xef\xbb\xbf"
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
_PIPES = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")  # how a shell names `<(command)`
_MOST_NODES = 100_000
_MAX_DEPTH = 100
_TOO_DEEP = "lists or objects are nested too deep"
_MAX_DIGITS = 100  # of a whole number: longer ones fit into nothing that counts, and some libraries choke on them
_MOST_SHOWN = 500  # characters of a value that is shown: a config's may have millions
_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_OBEYED_IN_TEXT = re.compile(_OBEYED.pattern.replace(r"\x00-\x1f", r"\x00-\x08\x0b-\x1f"))


def expanded(path: str | Path) -> Path:
    """The path that someone wrote, `~` or `~user` at its beginning replaced by that home directory.

    Whatever becomes a path from outside does so here: arguments and options, settings in files, Python's arguments.
    `./~/m` stays what it says, a directory that is called `~`, and a result can be given here again.
    """
    text = os.path.expanduser(path)  # noqa: PTH111 (Path would drop the ./ first, and raises where there is no user)
    made = Path(text)
    return made.absolute() if str(made).startswith("~") and not text.startswith("~") else made


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Raises:
        InputError: it cannot be opened, or is not a regular file; also later, while the block reads, where that fails.
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
        raise InputError(f"{path}: larger than {limit_size(most)}, the limit for such a file")
    return data


def text(path: Path, most: int = TEXT_BYTES) -> str:
    """A text file without a byte order mark, its lines ended by `\\n`. Raises InputError."""
    return decoded(content(path, most), str(path))


def stdin_text() -> str:
    """All of standard input, as `text`. Raises InputError."""
    data = sys.stdin.buffer.read(TEXT_BYTES + 1)
    if len(data) > TEXT_BYTES:
        raise InputError(f"stdin: more than {limit_size(TEXT_BYTES)}")
    return decoded(data, "stdin")


def limited_line(file: IO[bytes], most: int, where: str) -> bytes:
    """The next line with its end; nothing where the file ends. Raises InputError for one of more than `most` bytes."""
    line = file.readline(most + 1)
    if len(line) > most:
        raise InputError(f"{where}: has more than {limit_size(most)} without an end: that is the limit for a line")
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
        line, byte = place(data, error.start)
        decoded_line(data[error.start + 1 - byte : error.end], f"{where}, line {line}")
        raise


def place(data: bytes, at: int) -> tuple[int, int]:
    """Returns the line that the byte at index `at` is on, and its number in that line, both from 1."""
    return data.count(b"\n", 0, at) + 1, at - data.rfind(b"\n", 0, at)


def decoded_line(line: bytes, where: str) -> str:
    """`line` as text, its end as it is. Raises InputError that says at which byte of it, and what to do."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}; {AS_UTF8}"
        ) from None


def unmarked(data: bytes, where: str) -> bytes:
    """`data` without the byte order mark of UTF-8. Raises InputError where it begins as UTF-16 does.

    That is with a mark of its own, or a letter that has a byte 0 before or after it, which no text in UTF-8 has.
    """
    if data.startswith(_WIDE_MARKS) or b"\0" in data[:4]:
        raise InputError(f"{where}: not UTF-8 but UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    return data.removeprefix(_MARK)


def json_value(path: Path, most: int = SETTINGS_BYTES) -> Any:
    """Returns the JSON value in a file of at most `most` bytes. Raises InputError: it cannot be read, or is no JSON."""
    return parse_json(text(path, most), str(path))


def json_object(path: Path, most: int = SETTINGS_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError where there is none."""
    values = json_value(path, most)
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object")
    return values


def json_object_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file. Raises InputError as `json_object`."""
    return json_object(path) if path.exists() else {}


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises InputError that begins with `where`."""
    try:
        return load_json(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None


def load_json(text: str, decoder: json.JSONDecoder | None = None) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or none that a program could handle."""
    try:
        value = (decoder or _DECODER).decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > _MAX_DEPTH:  # or else it cannot be that deep
        check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raises ValueError where lists and objects are nested so deep that printing or copying them could fail."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = [each for values in inner for each in values]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice[:30]!r} twice")
    return found


_DECODER = json.JSONDecoder(parse_int=_whole)
JSON_RECORDS = json.JSONDecoder(parse_int=_whole, object_pairs_hook=_object)  # where each value counts


def yaml_mapping(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file of plain values. Raises InputError when it cannot be read, or as `mapping_of_yaml`."""
    return mapping_of_yaml(text(path, TABLES_BYTES), path)


def mapping_of_yaml(content: str, path: Path) -> dict[Any, Any]:
    """The mapping that a YAML text from `path` is. Raises InputError when it is none, or says a key twice, of which
    YAML would take the last."""
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
        values = yaml.load(content, Loader)
        _check_nodes(values)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not YAML with plain values: {' '.join(str(error).split())[:300]}") from None
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


class Keys:
    """An object's keys. Each method returns a value of its type, or `default` where the key is unsaid.

    Args:
        where: what errors begin with: the file's path and, of an object within it, its key.

    Every method raises InputError, which names `where` and the key, for a value of another type or out of range, and
    for an unsaid key whose `default` is None.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self._values = values

    def has(self, name: str) -> bool:
        """Returns whether the key is there, be it null."""
        return name in self._values

    def says(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str) -> Any:
        """Returns the value unchecked, None where there is none."""
        return self._values.get(name)

    def size(self, name: str, default: int | None = None, most: int = LARGEST_SIZE, word: str | None = None) -> int:
        """A whole number from 1 to `most`; or `word`, which stands for the default."""
        value = default if word is not None and self.get(name) == word else self._get(name, default)
        holds = type(value) is int and 0 < value <= most
        return int(self._checked(name, value, f"a whole number from 1 to {most:,}", holds))

    def number(self, name: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        """A number between `low` and `high`, and neither."""
        value = self._get(name, default)
        return float(self._checked(name, value, f"a number between {low:g} and {high:g}", _between(value, low, high)))

    def numbers(self, name: str, count: int, high: float = 1e12) -> tuple[float, ...]:
        """A list of `count` numbers between 0 and `high`."""
        value = self._get(name, None)
        holds = isinstance(value, list) and len(value) == count and all(_between(v, 0.0, high) for v in value)
        return tuple(map(float, self._checked(name, value, f"a list of {count} numbers above 0", holds)))

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        return bool(self._checked(name, value, "true or false", isinstance(value, bool)))

    def word(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        """One of the words `known`."""
        value = self._get(name, default)
        return str(self._checked(name, value, f"one of {', '.join(known)}", isinstance(value, str) and value in known))

    def words(self, name: str, known: Sequence[str], count: int) -> tuple[str, ...] | None:
        """A list of `count` of the words `known`; None where the key is unsaid."""
        if not self.says(name):
            return None
        value = self.get(name)
        holds = isinstance(value, list) and len(value) == count and all(v in known for v in value)
        return tuple(self._checked(name, value, f"a list of {count}, each {' or '.join(known)},", holds))

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Numbers of tokens: one or a list of them, none where the key is unsaid."""
        value = self._get(name, [])
        each = value if isinstance(value, list) else [value]
        found = [int(token) if isinstance(token, float) and token.is_integer() else token for token in each]
        self._checked(name, value, "a token's number, or a list of them,", all(type(token) is int for token in found))
        return tuple(found)

    def object(self, name: str) -> Mapping[str, Any]:
        """An object; an empty one where the key is unsaid."""
        value = self._get(name, {})
        found: Mapping[str, Any] = self._checked(name, value, "an object", isinstance(value, Mapping))
        return found

    def within(self, name: str) -> Keys:
        """The keys of that object."""
        return Keys(f"{self.where}: {name}", self.object(name))

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def _checked(self, name: str, value: Any, needed: str, holds: bool) -> Any:
        if value is None:
            raise InputError(f"{self.where}: {name} is missing: {needed} is needed")
        if not holds:
            raise InputError(f"{self.where}: {name} is {short(value)}: {needed} is needed")
        return value


def printable(value: object) -> str:
    """`value` on one line of at most `_MOST_SHOWN` characters, both ends of a longer one."""
    return _cut(_OBEYED.sub(_code, _cut(str(value))))


def visible(text: str) -> str:
    """`text` whole, with its lines and tabs."""
    return _OBEYED_IN_TEXT.sub(_code, text)


def stripped(text: str) -> str:
    """`text` with its lines and tabs, without what is not for readers."""
    return _OBEYED_IN_TEXT.sub("", text)


def short(value: object) -> str:
    """A value on one line as an error shows it: what came from a file may be of any size, and of any depth."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)}"
    if isinstance(value, list) and (len(value) > 8 or any(isinstance(inner, (list, Mapping)) for inner in value)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 10_000:  # of YAML, hexadecimal: Python prints none so long
        return "huge"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _between(value: object, low: float, high: float) -> bool:
    """A NaN is between no two numbers."""
    return type(value) in (int, float) and low < value < high  # type: ignore[operator]


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    shown = ", ".join(repr(name if len(name) <= 100 else name[:97] + "...") for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def quoted(path: object) -> str:
    """Returns a path as a shell takes it, for commands that are suggested."""
    return shlex.quote(str(path))


def counted(count: int, noun: str) -> str:
    """Returns a number of things in words: 1 process, 2 processes, 1,000 entries."""
    if count == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{count:,} {plural}"


def byte_size(count: int) -> str:
    """`count` bytes in the unit that suits them: 14.4 MB, 1.09 GB."""
    size = f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
    return size.replace(".00 ", " ").replace(".0 ", " ")


def limit_size(most: int) -> str:
    """Returns a limit, which is a power of two, as messages and docs/limits.md have it: 16 MB for 16 << 20 bytes."""
    return f"{most >> 20} MB" if most < 1 << 30 else f"{most >> 30} GB"


def _code(found: re.Match[str]) -> str:
    code = ord(found[0])
    return {9: "\\t", 10: "\\n"}.get(code) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[: 2 * _MOST_SHOWN // 3]} … {text[3 - _MOST_SHOWN // 3 :]}"


def check_made_with(path: Path, what: str, known: Mapping[str, Any], wanted: Mapping[str, Any], advice: str) -> None:
    """Raises InputError where what a file or directory holds was made with other settings, by names, than are wanted.

    Args:
        what: it holds.
        known: the settings, as JSON gave them back.
        advice: what to do, which ends the message.
    """
    now = json.loads(json.dumps(dict(wanted)))
    for name in {**now, **known}:
        if known.get(name) != now.get(name):
            before, after = (_digest_cut(values.get(name)) for values in (known, now))
            raise InputError(f"{path}: holds {what} with {name} = {before}, not {after}; {advice}")


def _digest_cut(value: object) -> str:
    """Returns the beginning of a digest, anything else whole."""
    text = printable("none" if value is None else value)
    return f"{text[:8]}…" if len(text) == 64 else text


def check_seed(seed: int | None) -> None:
    """Raises InputError for a seed that does not fit 64 bits."""
    if seed is not None and not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}: it must be from 0 to 2**64 - 1")


def _descriptor(path: Path) -> int:
    """The file's, open; without O_NONBLOCK a pipe would be waited for. Raises InputError and OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise InputError(f"{path}: is not a regular file") from None
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
    raise InputError(f"{path}: is not a regular file")


@contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL, or half a surrogate pair
        if "\0" not in str(path) and not isinstance(error, UnicodeEncodeError):
            raise
        raise InputError(f"{str(path)!r}: is not a valid file name") from None
