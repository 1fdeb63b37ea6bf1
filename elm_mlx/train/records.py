"""Files of training data as records: a file of any of SUFFIXES, or a directory of splits.

Knows what makes a record whole, and names each one that isn't by file and line with the reason. Knows nothing of
how files are packed, and of tokens, templates and lengths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.files import expanded
from elm_mlx.template import check_messages
from elm_mlx.train import formats
from elm_mlx.train.formats import BadRecord, keys_of, kind_of

SPLITS = ("train", "valid", "test")
SUFFIXES = (*formats.JSON, formats.PARQUET)


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
    for name, found in values(path, _COLUMNS).items():
        split = splits[name] = Split()
        for where, value in found:
            try:
                if isinstance(value, BadRecord):
                    raise value
                split.records.append(_record(where, value, format))
            except BadRecord as error:
                split.bad.append(f"{where}: {error}")
    return splits


def values(path: Path, columns: Collection[str]) -> dict[str, Iterator[tuple[str, Any]]]:
    """By split, as `read`, each value with where it stands, read when asked for; BadRecord for a line that is no JSON.

    Args:
        columns: of Parquet, those that are read.

    Raises:
        InputError, ElmError: as `read`; what is wrong within a file, when it is reached.
    """
    return {name: _values(files, columns) for name, files in _files(path).items()}


def _values(files: list[Path], columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    empty = True
    for file in files:
        for entry in _entries(file, formats.suffix_of(file, SUFFIXES), columns):
            empty = False
            yield entry
    if empty:
        raise InputError(f"{', '.join(map(str, files))}: holds no records")


def _files(path: Path) -> dict[str, list[Path]]:
    path = expanded(path)
    if path.is_file():
        formats.suffix_of(path, SUFFIXES)
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


def _entries(path: Path, suffix: str, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Each value of a file, with where it stands; BadRecord for a line that is no JSON."""
    if suffix == formats.PARQUET:
        for row, group, value in formats.parquet(path, tuple(columns)):
            yield f"{path}, row {row + 1} (row group {group})", value
        return
    array = formats.is_array(path)
    with formats.opened(path) as file:
        if array:
            for number, value in formats.array(path, file.read()):
                yield f"{path}, line {number}", value
            return
        for number, line in formats.lines(file):
            yield f"{path}, line {number}", _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return formats.parsed(line)
    except BadRecord as error:
        return error


def _record(where: str, value: Any, format: str | None) -> Record:
    """The record that a JSON value is. Raises BadRecord."""
    if not isinstance(value, dict):
        raise BadRecord(f"is {kind_of(value)}, and not an object")
    for name in ("tools", "functions"):
        if value.get(name):
            raise BadRecord(f"has `{name}`, which no template here can show")
    if format is None:
        format = next((name for name, (_, keys) in FORMATS.items() if all(key in value for key in keys)), None)
    if format is None:
        wanted = "; ".join(", ".join(f"`{key}`" for key in keys) for _, keys in FORMATS.values())
        raise BadRecord(f"has none of these sets of keys: {wanted}; it has {keys_of(value)}")
    make, keys = FORMATS[format]
    missing = next((key for key in keys if key not in value), None)
    if missing:
        raise BadRecord(f"`{missing}` is missing; it has {keys_of(value)}")
    return make(where, value)


def _text(value: Mapping[str, Any], key: str) -> str:
    if not isinstance(value[key], str):
        raise BadRecord(f"`{key}` is {kind_of(value[key])}, and not a text")
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
