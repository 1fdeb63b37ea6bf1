"""JSON in a file or a text, read with an error that says where and what. Knows nothing of what it means."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from elm_mlx import reading
from elm_mlx.errors import InputError

_MAX_DEPTH = 100
_TOO_DEEP = "lists or objects are nested too deep"
_MAX_DIGITS = 100  # of a whole number: longer ones fit into nothing that counts, and some libraries choke on them


def read(path: Path, most: int = reading.SETTINGS_BYTES) -> Any:
    """What a file of at most `most` bytes holds. Raises InputError where it cannot be read, or is no JSON."""
    return parse(reading.text(path, most), str(path))


def read_object(path: Path, most: int = reading.SETTINGS_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError where there is none."""
    values = read(path, most)
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object")
    return values


def read_object_if_there(path: Path, most: int = reading.SETTINGS_BYTES) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file. Raises InputError as `read_object`."""
    return read_object(path, most) if path.exists() else {}


def parse(text: str, where: str) -> Any:
    """The value of a JSON text. Raises InputError that begins with `where`."""
    try:
        return load(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None


def load(text: str, decoder: json.JSONDecoder | None = None) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or none that a program could handle."""
    try:
        value = (decoder or DECODER).decode(text)
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


DECODER = json.JSONDecoder(parse_int=_whole)
RECORDS = json.JSONDecoder(parse_int=_whole, object_pairs_hook=_object)  # where each value counts
