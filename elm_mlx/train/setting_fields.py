"""The fields of a class of settings: type and default of each by the class, what it means by the class's docstring.

Options, their help, and what files may hold are made of these.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """A field that holds a value.

    Args:
        name: unique among a run's settings.
        kind: its type, without None.
        default: MISSING where there is none.
        about: what it means.
        section: the section that it is in, by its class's name without "Settings"; empty for the run's own.
    """

    name: str
    kind: Any
    default: Any
    about: str
    section: str


def described(cls: type[Any], section: str = "") -> dict[str, Setting]:
    """Returns the fields of a dataclass, and of the dataclasses in it, by name."""
    found, kinds, meanings = dict[str, Setting](), typing.get_type_hints(cls), abouts(cls)
    for item in fields(cls):
        kind = without_none(kinds[item.name])
        if isinstance(kind, type) and is_dataclass(kind):
            found |= described(kind, kind.__name__.removesuffix("Settings"))
        else:
            found[item.name] = Setting(item.name, kind, item.default, meanings.get(item.name, ""), section)
    return found


def made(cls: type[T], values: Mapping[str, Any]) -> T:
    """Returns a `cls` with `values`, as `described` names them, and defaults."""
    values = {**getattr(cls, "defaults", {}), **values}
    kinds, found = typing.get_type_hints(cls), dict[str, Any]()
    for item in fields(typing.cast(Any, cls)):
        if is_dataclass(kinds[item.name]):
            found[item.name] = made(kinds[item.name], values)
        elif item.name in values:
            found[item.name] = values[item.name]
    return cls(**found)


def flat(value: Any) -> dict[str, Any]:
    """Returns the values of a dataclass, and of the dataclasses in it, by name."""
    found: dict[str, Any] = {}
    for item in fields(value):
        inner = getattr(value, item.name)
        found |= flat(inner) if is_dataclass(inner) else {item.name: inner}
    return found


def without_none(kind: Any) -> Any:
    """Returns the type of a field that may be None, without that."""
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return next(each for each in typing.get_args(kind) if each is not type(None))
    return kind


def abouts(cls: type[Any]) -> dict[str, str]:
    """Returns what each field means, by the `Args:` of the docstrings of a class and of its bases."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        _, _, text = inspect.cleandoc(each.__doc__ or "").partition("Args:\n")
        for names, about in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", text, re.M):
            found |= dict.fromkeys(names.split(", "), " ".join(about.split()))
    return found
