"""Sections of settings in files: frozen dataclasses are read from TOML, checked, and written with what fields mean."""

from __future__ import annotations

import difflib
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from elm_mlx import reading
from elm_mlx.errors import InputError
from elm_mlx.train.setting_fields import abouts, without_none

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
_ENDLESS = 2**63  # no number in a file is meant to be as large
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def read(path: Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Returns the `cls` that a TOML file holds, after `overrides` like `optimizer.lr=0.001`.

    Raises:
        InputError: names the file and the key that is unknown, missing or of another type.
    """
    path = reading.expanded(path)
    text = reading.text(path, reading.TABLES_BYTES)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of any kind: dates that are none, endless numbers
        raise InputError(f"{path}: is not TOML: {error}") from None
    for override in overrides:
        _override(values, override)
    return typing.cast(T, _table(cls, values, "", str(path)))


def scalar(kind: type, value: Any) -> Any:
    """Returns `value` as a `kind`: a whole number, a number, a text or a truth value, however a file may write it.

    1e-4 is a text in YAML, 1e5 no whole number in TOML, and a list of one thing is that thing.

    Raises:
        ValueError: it is something else; the text goes on after the value's name.
    """
    single = _single(value)
    if kind in (int, float):
        number = _number(single)
        if kind is float and number is not None:
            return float(number)
        if number is not None and number == number // 1 and abs(number) < _ENDLESS:
            return int(number)
    elif kind is bool and isinstance(single, str) and single.lower() in _WORDS:
        return _WORDS[single.lower()]
    elif type(single) is kind:
        return single
    raise ValueError(f"is {reading.short(value)}; it needs {_KINDS[kind]}")


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _number(value: Any) -> int | float | None:
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return value if type(value) is float or (type(value) is int and abs(value) < _ENDLESS) else None


def write(value: Any, about: str) -> str:
    """Returns `value` as TOML, each field under a comment that says what it is, `about` in front."""
    return "".join(f"# {line}\n" for line in about.splitlines()) + "\n" + _written(value, "").lstrip("\n")


def _override(values: dict[str, Any], override: str) -> None:
    name, sign, text = override.partition("=")
    *tables, key = name.strip().split(".")
    if not sign or not key:
        raise InputError(f"--set {override}: needs the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()  # a text without its quotes
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override}: {table} is not a section")
    values[key] = value


def _table(cls: type[Any], values: Mapping[str, Any], name: str, where: str) -> Any:
    """Returns an instance of a dataclass."""
    known = {item.name: item for item in fields(cls)}
    types = typing.get_type_hints(cls)
    at = f"{where}: [{name}]" if name else f"{where}:"
    found = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(known)}"
            raise InputError(f"{at} has no key {key!r}; {hint}")
        found[key] = value_of(types[key], value, f"{name}.{key}".lstrip("."), where)
    for key, item in known.items():
        if key not in found and item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{at} {key} is missing: {abouts(cls).get(key, '')}")
    try:
        return cls(**found)
    except InputError as error:
        raise InputError(f"{at} {error}") from None


def value_of(kind: Any, value: Any, name: str, where: str) -> Any:
    """Returns a file's `value` as a field's type wants it. Raises InputError, which names the file and the field."""
    kind = without_none(kind)
    if is_dataclass(kind):
        value = _single(value)
        if not isinstance(value, dict):
            raise InputError(f"{where}: {name} is not a section; it starts with [{name}]")
        return _table(typing.cast(type, kind), value, name, where)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        items = value if isinstance(value, list) else [value]  # one of them needs no list
        return tuple(value_of(item, each, name, where) for each in items)
    choices = typing.get_args(kind)
    try:
        found = scalar(str if kind is Path or choices else kind, value)
    except ValueError as error:
        raise InputError(f"{where}: {name} {error}") from None
    if choices and found not in choices:
        raise InputError(f"{where}: {name} is {reading.short(value)}; choose from {', '.join(choices)}")
    return reading.expanded(found) if kind is Path else found


def _written(value: Any, name: str) -> str:
    """Returns the fields that are values, and then each table."""
    lines, tables, meanings = [], [], abouts(type(value))
    for item in fields(value):
        inner = getattr(value, item.name)
        path = f"{name}.{item.name}".lstrip(".")
        about = f"# {meanings[item.name]}\n" if item.name in meanings else ""
        if is_dataclass(inner):
            tables.append(f"\n{_heading(inner)}[{path}]\n{_written(inner, path)}")
        elif isinstance(inner, tuple) and inner and is_dataclass(inner[0]):
            tables += [f"\n{_heading(each)}[[{path}]]\n{_written(each, path)}" for each in inner]
        else:
            lines.append(about + (f"# {item.name} =\n" if inner is None else f"{item.name} = {_literal(inner)}\n"))
    return "".join(lines) + "".join(tables)


def _heading(value: Any) -> str:
    return f"# {(type(value).__doc__ or '').strip().splitlines()[0]}\n"


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, (str, bool)):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML alone forbids
    return repr(value)
