"""A record that cannot be used, and the names of its keys and values in the line that says why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from itertools import islice
from typing import Any


class BadRecord(Exception):
    """One record cannot be used; the text is the reason."""


def text_of(value: Any, key: str) -> str:
    """Returns the text in field `key` of a record. Raises BadRecord, which `value` may be already."""
    if isinstance(value, BadRecord):
        raise value
    if not isinstance(value, dict):
        raise BadRecord(f"is {kind_of(value)}, not an object")
    if key not in value:
        raise BadRecord(f"`{key}` is missing; it has {keys_of(value)}")
    if not isinstance(value[key], str):
        raise BadRecord(f"`{key}` is {kind_of(value[key])}, not a string")
    return value[key]


def kind_of(value: Any) -> str:
    """Names the kind of a value of JSON or Parquet: a string, a list, null."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {
        str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number", Decimal: "a number",
        bytes: "bytes",
    }  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")


def key_of(key: str) -> str:
    """Quotes a key on one line, whatever it holds."""
    return f"`{key[:30].encode('unicode_escape').decode()}`"


def keys_of(value: Mapping[str, Any]) -> str:
    """Lists a few of an object's keys on one line."""
    return few(map(key_of, value), 8) or "no keys"


def few(names: Iterable[str], most: int = 5) -> str:
    """Lists the first names."""
    shown = list(islice(names, most + 1))
    return ", ".join([*shown[:most], "…"] if len(shown) > most else shown)
