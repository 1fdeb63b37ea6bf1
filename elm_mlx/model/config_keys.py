"""The keys of a JSON object that came from elsewhere: each is checked for type and range where it is asked for.

Knows no key by name. A key that is null counts as unsaid, as in Hugging Face's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elm_mlx.errors import InputError

LARGEST = 1 << 30  # of a size: MLX adds positions up in 32 bits


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
        """Whether the key is there, be it null."""
        return name in self._values

    def says(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str) -> Any:
        """What is there, unchecked; None where nothing is."""
        return self._values.get(name)

    def size(self, name: str, default: int | None = None, most: int = LARGEST, word: str | None = None) -> int:
        """A whole number from 1 to `most`; or `word`, which stands for the default."""
        value = default if word is not None and self.get(name) == word else self._get(name, default)
        holds = type(value) is int and 0 < value <= most
        return int(self._checked(name, value, f"a whole number from 1 to {most:,}", holds))

    def number(self, name: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        """A number between `low` and `high`, and neither."""
        value = self._get(name, default)
        return float(self._checked(name, value, f"a number between {low:g} and {high:g}", _between(value, low, high)))

    def numbers(self, name: str, count: int, low: float = 0.0, high: float = 1e12) -> tuple[float, ...]:
        """A list of `count` such numbers."""
        value = self._get(name, None)
        holds = isinstance(value, list) and len(value) == count and all(_between(v, low, high) for v in value)
        return tuple(map(float, self._checked(name, value, f"a list of {count} numbers above {low:g}", holds)))

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


def short(value: object) -> str:
    """A value on one line as an error shows it: what came from a file may be of any size, and of any depth."""
    if isinstance(value, (list, Mapping)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _between(value: object, low: float, high: float) -> bool:
    """A NaN is between no two numbers."""
    return type(value) in (int, float) and low < value < high  # type: ignore[operator]
