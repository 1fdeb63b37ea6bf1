"""Files of training data as records: JSON lines, JSON arrays, both gzipped, Parquet; a file, or a directory of splits.

Knows formats and what makes a record whole, and names each one that isn't by file and line with the reason. Knows
nothing of tokens, templates and lengths. Importing this imports no pyarrow.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from elm_mlx.errors import ElmError, InputError
from elm_mlx.template import check_messages

SPLITS = ("train", "valid", "test")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass(frozen=True)
class Text:
    """Text to continue as it stands. `where` is its file and line, here and in the others."""

    where: str
    text: str


@dataclass(frozen=True)
class Completion:
    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """`messages`: each with its `role` and `content`; at least one is the assistant's."""

    where: str
    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Instruction:
    """Alpaca's. `input` is what the instruction is about, often empty."""

    where: str
    instruction: str
    input: str
    output: str


Record = Text | Completion | Conversation | Instruction


@dataclass
class Split:
    """What the files of one split hold.

    Attributes:
        bad: of each record that isn't whole, where it stands and what is wrong.
    """

    records: list[Record] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


class BadRecord(Exception):
    """One record is not whole; the text is the reason."""


def read(path: Path, format: str | None = None) -> dict[str, Split]:
    """Every record of a file, as split `train`, or of a directory's splits.

    A directory holds `train.jsonl` (or any of SUFFIXES), and if it likes `valid` (`validation`) and `test`; a split
    may be in shards, `train-00000-of-00002.parquet`.

    Args:
        format: one of FORMATS, for every record; otherwise each one's own keys tell.

    Raises:
        InputError: there is no such file, or nothing in it can be read, such as Parquet that is damaged.
        ElmError: Parquet, and pyarrow is not installed.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"--format {format}: is not one of {', '.join(FORMATS)}")
    splits: dict[str, Split] = {}
    for name, files in _files(path).items():
        split = splits[name] = Split()
        for file in files:
            _read_file(file, format, split)
        if not split.records and not split.bad:
            raise InputError(f"{', '.join(map(str, files))}: holds no records")
    return splits


def entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Each value of a data file, one at a time, with where it stands; BadRecord in place of what is no JSON.

    Raises:
        InputError, ElmError: as `read`.
    """
    suffix = _suffix(path)
    return _parquet(path) if suffix == ".parquet" else _json(path, suffix.endswith(".gz"))


def _files(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        _suffix(path)
        return {"train": [path]}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or directory")
    names = "train|valid(?:ation)?|test"
    pattern = re.compile(rf"({names})(-\d+-of-\d+)?({'|'.join(map(re.escape, SUFFIXES))})")
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if match := pattern.fullmatch(file.name):
            files = found.setdefault("valid" if match[1] == "validation" else match[1], [])
            if files and not (match[2] and "-of-" in files[0].name):
                both = f"{files[0].name} and {file.name}"
                raise InputError(f"{path}: {both} are of the same split; keep one, or pass a file")
            files.append(file)
    if "train" not in found:
        raise InputError(f"{path}: holds no train{', train'.join(SUFFIXES)}; to train on one file alone, pass it")
    return {name: found[name] for name in SPLITS if name in found}


def _suffix(path: Path) -> str:
    """Which of SUFFIXES the file's name ends with, the longest."""
    matching = [suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)]
    if not matching:
        raise InputError(f"{path}: no kind of data file that can be read, which are {', '.join(SUFFIXES)}")
    return max(matching, key=len)


def _read_file(path: Path, format: str | None, split: Split) -> None:
    """Appends the file's records to `split`, good and bad."""
    for where, value in entries(path):
        try:
            if isinstance(value, BadRecord):
                raise value
            split.records.append(_record(where, value, format))
        except BadRecord as error:
            split.bad.append(f"{where}: {error}")


def _json(path: Path, zipped: bool) -> Iterator[tuple[str, Any]]:
    """Each value of JSON lines or of a JSON array, with where it stands; BadRecord for a line that is no JSON.

    Which of the two a file is, its first character tells and not its name: Hugging Face's `.json` are often lines.
    """
    try:
        with _open(path, zipped) as file:
            array = _begins_array(file)
            file.seek(0)
            yield from _array(path, file.read()) if array else _lines(path, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _open(path: Path, zipped: bool) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path) if zipped else path.open("rb"))


def _begins_array(file: IO[bytes]) -> bool:
    for line in file:
        if text := line.removeprefix(b"\xef\xbb\xbf").strip():
            return text.startswith(b"[")
    return False


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield f"{path}, line {number}", _parsed(line.rstrip())


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRecord(f"not JSON: {error.msg} at column {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested by thousands
        return BadRecord(f"not JSON: {error}")


def _array(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    """Each element, by the line that it begins on. After one that is no JSON, nobody knows where the next begins."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    line = at = 0

    def skip(position: int) -> int:
        """Past white space, counting lines from where the last call ended."""
        nonlocal line, at
        position = space.match(text, position).end()  # type: ignore[union-attr]
        line, at = line + text.count("\n", at, position), position
        return position

    try:
        text = data.decode("utf-8-sig")
        position = skip(skip(0) + 1)
        while text[position : position + 1] != "]":
            where = f"{path}, line {line + 1}"
            value, position = decoder.raw_decode(text, position)
            yield where, value
            position = skip(position)
            if text[position : position + 1] == ",":
                position = skip(position + 1)
            elif text[position : position + 1] != "]":
                raise InputError(f"{path}, line {line + 1}: not JSON: a comma or ] is missing")
        if skip(position + 1) < len(text):
            raise InputError(f"{path}, line {line + 1}: not JSON: something follows the array")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {data.count(10, 0, error.start) + 1}: not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {line + 1}: not JSON: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ElmError(f"{path}: Parquet needs pyarrow: pip install 'elm-mlx[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                    for value in batch.to_pylist():
                        row += 1
                        yield f"{path}, row {row} (row group {group})", value
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: no Parquet that can be read: {' '.join(str(error).split())[:200]}") from None


def _record(where: str, value: Any, format: str | None) -> Record:
    """The record that a JSON value is. Raises BadRecord."""
    if not isinstance(value, dict):
        raise BadRecord(f"is {_kind(value)}, and not an object")
    for name in ("tools", "functions"):
        if value.get(name):
            raise BadRecord(f"has `{name}`, which no template here can show")
    if format is None:
        format = next((name for name, (_, keys) in FORMATS.items() if all(key in value for key in keys)), None)
    if format is None:
        wanted = "; ".join(", ".join(f"`{key}`" for key in keys) for _, keys in FORMATS.values())
        raise BadRecord(f"has none of these sets of keys: {wanted}; it has {_named(value)}")
    make, keys = FORMATS[format]
    missing = next((key for key in keys if key not in value), None)
    if missing:
        raise BadRecord(f"`{missing}` is missing; it has {_named(value)}")
    return make(where, value)


def _text(value: Mapping[str, Any], key: str) -> str:
    if not isinstance(value[key], str):
        raise BadRecord(f"`{key}` is {_kind(value[key])}, and not a text")
    if not value[key].strip():
        raise BadRecord(f"`{key}` is empty")
    return value[key]


def _make_text(where: str, value: Mapping[str, Any]) -> Record:
    return Text(where, _text(value, "text"))


def _make_completion(where: str, value: Mapping[str, Any]) -> Record:
    return Completion(where, _text(value, "prompt"), _text(value, "completion"))


def _make_instruction(where: str, value: Mapping[str, Any]) -> Record:
    about = _text(value, "input") if value.get("input") else ""
    return Instruction(where, _text(value, "instruction"), about, _text(value, "output"))


def _make_conversation(where: str, value: Mapping[str, Any]) -> Record:
    messages = value["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord("`messages` is no list of objects")
    try:
        check_messages(messages)
    except InputError as error:
        raise BadRecord(str(error)) from None
    for number, message in enumerate(messages, 1):
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise BadRecord(f"message {number} has `{name}`, which no template here can show")
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadRecord(f"message {number}: the assistant says nothing")
    if messages[0]["role"] == "assistant":
        raise BadRecord("message 1 is the assistant's: nothing asks for it")
    if all(message["role"] != "assistant" for message in messages):
        raise BadRecord("no message is the assistant's: there is nothing to learn")
    return Conversation(where, tuple({"role": each["role"], "content": each["content"]} for each in messages))


# By name, in the order in which a record's keys are tried: Alpaca's own files have a `text` too. The keys are those
# that a record of the format must have.
FORMATS: dict[str, tuple[Callable[[str, Mapping[str, Any]], Record], tuple[str, ...]]] = {
    "completion": (_make_completion, ("prompt", "completion")),
    "messages": (_make_conversation, ("messages",)),
    "alpaca": (_make_instruction, ("instruction", "output")),
    "text": (_make_text, ("text",)),
}
_COLUMNS = {key for _, keys in FORMATS.values() for key in keys} | {"input", "tools", "functions"}


def _named(value: Mapping[str, Any]) -> str:
    """A few of its keys, on one line whatever they hold."""
    keys = [f"`{key[:30].encode('unicode_escape').decode()}`" for key in list(value)[:8]]
    return ", ".join([*keys, "…"] if len(value) > 8 else keys) or "no keys"


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
