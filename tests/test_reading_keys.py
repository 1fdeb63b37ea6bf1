"""A value of the type that is asked for and within its range, or one line with the file and the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elm_mlx.errors import InputError
from elm_mlx.reading import Keys, short

KEYS = Keys("config.json", {
    "size": 7, "half": 0.5, "yes": True, "word": "silu", "words": ["a", "b"], "numbers": [1, 2.5], "null": None,
    "inner": {"size": "7"}, "huge": 10**400, "auto": "auto", "nan": float("nan"),
})  # fmt: skip


def test_what_is_there_or_its_default() -> None:
    assert KEYS.size("size") == 7 and KEYS.size("none", 3) == 3 and KEYS.size("null", 3) == 3
    assert KEYS.size("auto", 5, word="auto") == 5
    assert KEYS.number("half") == 0.5 and KEYS.number("size") == 7.0 and KEYS.number("none", 0.1) == 0.1
    assert KEYS.numbers("numbers", 2) == (1.0, 2.5)
    assert KEYS.flag("yes", False) and not KEYS.flag("none", False)
    assert KEYS.word("word", ("silu", "gelu")) == "silu" and KEYS.word("none", ("a",), "a") == "a"
    assert KEYS.words("words", ("a", "b"), 2) == ("a", "b") and KEYS.words("none", ("a",), 2) is None
    assert KEYS.object("inner") == {"size": "7"} and KEYS.object("none") == {}
    assert KEYS.has("null") and not KEYS.says("null") and not KEYS.has("none") and KEYS.get("none") is None


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda keys: keys.size("none"), "none is missing: a whole number from 1 to"),
        (lambda keys: keys.size("size", most=6), "size is 7: a whole number from 1 to 6 is needed"),
        (lambda keys: keys.size("yes"), "yes is True"), (lambda keys: keys.size("half"), "half is 0.5"),
        (lambda keys: keys.size("huge"), "huge is 1000"), (lambda keys: keys.size("auto"), "auto is 'auto'"),
        (lambda keys: keys.number("nan"), "nan is nan"), (lambda keys: keys.number("huge"), "huge is 1000"),
        (lambda keys: keys.number("size", high=7), "size is 7: a number between 0 and 7"),
        (lambda keys: keys.numbers("numbers", 3), "numbers is [1, 2.5]: a list of 3 numbers"),
        (lambda keys: keys.flag("size", True), "size is 7: true or false"),
        (lambda keys: keys.word("words", ("a",)), "words is ['a', 'b']: one of a"),
        (lambda keys: keys.words("words", ("a",), 2), "words is ['a', 'b']: a list of 2, each a"),
        (lambda keys: keys.object("words"), "words is ['a', 'b']: an object"),
        (lambda keys: keys.within("inner").size("size"), "inner: size is '7': a whole number"),
    ],
)  # fmt: skip
def test_anything_else_is_one_line(ask: Callable[[Keys], Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        ask(KEYS)
    assert str(error.value).startswith(f"config.json: {says}") and len(str(error.value)) < 200


def test_a_value_of_any_size_and_depth_is_short() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, {"a": nested}, "x\n" * 10**6, 10**400, None):
        assert len(short(value)) <= 60 and "\n" not in short(value)
