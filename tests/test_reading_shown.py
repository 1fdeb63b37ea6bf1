"""Text from outside cannot steer a terminal, whole or in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx.reading import printable, stripped, visible

# What terminals obey, by ECMA-48 and Unicode's bidirectional algorithm (UAX 9).
C0, C1 = map(chr, range(32)), map(chr, range(0x7F, 0xA0))
OBEYED = {*C0, *C1, *"\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_obeyed_is_left(text: str) -> None:
    assert not OBEYED & {*printable(text)}
    for shown in (visible(text), stripped(text)):
        assert OBEYED & {*shown} <= {"\n", "\t"}
        shown.encode("utf-8")


def test_what_is_no_control_stays() -> None:
    text = "naïve 漢字 \U0001f469\u200d\U0001f4bb עברית\u200f (a \\x1b of letters)"
    assert printable(text) == text and visible(f"{text}\n\tb\n") == stripped(f"{text}\n\tb\n") == f"{text}\n\tb\n"


def test_controls_are_seen_by_their_codes() -> None:
    assert printable("a\x1b]0;t\x07\n\tb\r\x9b2J\u202e\udc80") == "a\\x1b]0;t\\x07\\n\\tb\\x0d\\x9b2J\\u202e\\udc80"
    assert visible("a\x1b\nb") == "a\\x1b\nb" and stripped("a\x1b\r\nb") == "a\nb"


def test_both_ends_of_a_long_value_are_shown_and_no_more_than_500_characters() -> None:
    shown = printable("begin" + "x" * 10**6 + "end")
    assert shown.startswith("beginx") and shown.endswith("xend") and len(shown) <= 500
    assert len(printable("\x1b" * 10**6)) <= 500 and printable("y" * 500) == "y" * 500


@pytest.mark.parametrize("value", [3, None, b"\x1b", ["\x1b"], ValueError("a\x1bb")])
def test_any_value_is_shown_as_its_text(value: object) -> None:
    assert "\x1b" not in printable(value) and printable(value)
