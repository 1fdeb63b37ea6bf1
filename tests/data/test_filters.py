"""Filters: each by texts worked out by hand."""

from __future__ import annotations

import hashlib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx.data.filters import REPETITIVE, SHORT, SYMBOLS, Filters, repetition, symbols, text_hash
from elm_mlx.errors import InputError

NONE = Filters(nfc=False, duplicates=False, min_chars=0, max_repetition=None, max_symbols=None, min_tokens=0)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("a b c d", 0),
        ("a b c d e", 0),
        ("a b c d e a b c d e", 1 / 6),  # abcde bcdea cdeab deabc eabcd abcde
        ("a a a a a a a a", 3 / 4),  # four times the same
        ("buy now " * 50, 1 - 2 / 96),
        ("a  b\nc\td e", 0),
        ("漢字" * 500, 0),
    ],
)
def test_repetition(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        (" \n\t", 0),
        ("abc", 0),
        ("ab, c.", 2 / 5),
        ("---- ----", 1),
        ("हिन्दी में", 0),  # vowel signs are marks, and no symbols
        ("1 + 1 = 2", 2 / 5),
        ("a\x00\u200b😀", 3 / 4),
        ("\u00a0a\u2003b", 0),
    ],
)
def test_symbols(text: str, share: float) -> None:
    assert symbols(text) == pytest.approx(share)


@given(st.text())
def test_symbols_equal_a_count_one_by_one(text: str) -> None:
    visible = [character for character in text if not character.isspace()]
    odd = [character for character in visible if unicodedata.category(character)[0] in "PSC"]
    assert symbols(text) == (len(odd) / len(visible) if visible else 0)


def test_each_filter_at_its_limit() -> None:
    assert Filters(min_chars=5).objection("abcd") == SHORT and Filters(min_chars=4).objection("abcd") is None
    text = "a b c d e a b c d e"
    assert Filters(min_chars=0, max_repetition=0.16).objection(text) == REPETITIVE
    assert Filters(min_chars=0, max_repetition=0.17).objection(text) is None
    assert Filters(min_chars=0, max_symbols=0.39).objection("ab, c.") == SYMBOLS
    assert Filters(min_chars=0, max_symbols=0.4).objection("ab, c.") is None


def test_each_filter_can_be_switched_off() -> None:
    for text in ("a", "buy now " * 50, "-" * 500):
        assert NONE.objection(text) is None and Filters().objection(text) is not None
    assert NONE.objection(" \n") == SHORT  # there is nothing to learn
    assert NONE.normalized("e\u0301") == "e\u0301" and Filters().normalized("e\u0301") == "é"


def test_the_paper_s_limits() -> None:
    assert (Filters().nfc, Filters().min_chars, Filters().min_tokens) == (True, 200, 256)


@given(st.text())
def test_hashes_are_those_of_normal_form_c(text: str) -> None:
    assert 0 < text_hash(text) < 2**64
    assert text_hash(text) == text_hash(unicodedata.normalize("NFD", text))


def test_a_hash_by_hand() -> None:
    digest = hashlib.blake2b("é".encode(), digest_size=8).digest()
    assert text_hash("e\u0301") == int.from_bytes(digest, "little") and text_hash("\ud800") > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_chars": -1}, "min_chars must be at least 0, not -1"),
        ({"min_tokens": -2}, "min_tokens must be at least 0"),
        ({"max_symbols": 1.5}, "max_symbols must be from 0 to 1, not 1.5"),
        ({"max_repetition": float("nan")}, "max_repetition must be"),
    ],
)
def test_numbers_that_will_not_do(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Filters(**options)  # type: ignore[arg-type]
