"""Where a text ends, against `str.partition`, however its tokens fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx.errors import InputError
from elm_mlx.inference.generation import TextStream
from elm_mlx.text.tokenizer import Tokenizer

ALPHABET = "ab .漢😀\n"
texts = st.text(st.sampled_from(ALPHABET), max_size=25)
stops = st.text(st.sampled_from(ALPHABET), min_size=1, max_size=4)


def continuation(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """A prompt, and the tokens that add `text` to it."""
    prompt = tokenizer.encode("x")
    ids = tokenizer.encode("x" + text)
    assert ids[: len(prompt)] == prompt
    return prompt, ids[len(prompt) :]


def stream(tokenizer: Tokenizer, text: str, stop: list[str]) -> tuple[list[str], bool]:
    """What each token shows, and the rest; and whether a stop string ended it."""
    prompt, ids = continuation(tokenizer, text)
    texts, stream = [], TextStream(tokenizer, prompt, stop)
    for token in ids:
        texts.append(stream.add(token))
        if stream.finish_reason is not None:
            return texts, True
    return [*texts, stream.finish()], False


@given(texts, stops)
def test_a_stop_string_ends_the_text_before_it(tiny_tokenizer: Tokenizer, text: str, stop: str) -> None:
    pieces, ended = stream(tiny_tokenizer, text, [stop])
    assert "".join(pieces) == text.partition(stop)[0]
    assert ended is (stop in text)


@given(texts, st.lists(stops, min_size=2, max_size=4))
def test_of_several_one_ends_it_and_none_is_in_it(tiny_tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    pieces, ended = stream(tiny_tokenizer, text, stop)
    shown = "".join(pieces)
    assert text.startswith(shown)
    assert ended is any(string in text for string in stop)
    assert not any(string in shown for string in stop)
    if ended:
        assert any(text.startswith(string, len(shown)) for string in stop)
    else:
        assert shown == text


@given(texts, st.lists(stops, max_size=3))
def test_what_is_shown_is_final_and_not_held_back_needlessly(
    tiny_tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    prompt, ids = continuation(tiny_tokenizer, text)
    plain, stopping, shown, known = TextStream(tiny_tokenizer, prompt), TextStream(tiny_tokenizer, prompt, stop), "", ""
    for token in ids:
        known += plain.add(token)
        shown += stopping.add(token)
        if stopping.finish_reason is not None:
            break
        held = known.removeprefix(shown)
        assert known == shown + held
        assert not held or any(string.startswith(held) for string in stop)


def test_candidates_that_overlap(tiny_tokenizer: Tokenizer) -> None:
    for text, stop, expected in (
        ("aaab", ["aab"], "a"),
        ("abababc", ["ababc"], "ab"),
        ("abab", ["ababc"], "abab"),
        ("a\n\nb", ["\n\n"], "a"),
        ("a\n \n\n", ["\n\n"], "a\n "),
        ("ab漢", ["漢"], "ab"),
        ("ab漢😀", ["漢😀a", "😀"], "ab漢"),
        ("abc", ["abcd", "bc"], "a"),
        ("abc", ["c", "abc"], ""),
    ):
        pieces, _ = stream(tiny_tokenizer, text, stop)
        assert "".join(pieces) == expected, (text, stop)


def test_the_prompt_is_not_searched(tiny_tokenizer: Tokenizer) -> None:
    prompt = tiny_tokenizer.encode("the end")
    text = TextStream(tiny_tokenizer, prompt, ["the", "end!", "d"])
    assert text.add(tiny_tokenizer.encode("!", add_bos=False)[-1]) == "!" and text.finish_reason is None


def test_bytes_of_a_broken_character_come_at_the_end(tiny_tokenizer: Tokenizer) -> None:
    prompt, ids = continuation(tiny_tokenizer, "b😀")
    text = TextStream(tiny_tokenizer, prompt, ["z"])
    shown = "".join(text.add(token) for token in ids[:-1])
    assert shown == "b"
    assert text.finish() == "\ufffd" * 3


def test_a_stop_string_may_complete_in_the_bytes_that_are_left(tiny_tokenizer: Tokenizer) -> None:
    prompt, ids = continuation(tiny_tokenizer, "b😀")
    text = TextStream(tiny_tokenizer, prompt, ["\ufffd"])
    assert "".join(text.add(token) for token in ids[:-1]) + text.finish() == "b"


@pytest.mark.parametrize("stop", [[""], ["a", ""]])
def test_an_empty_stop_string_is_refused(tiny_tokenizer: Tokenizer, stop: list[str]) -> None:
    with pytest.raises(InputError, match="a stop string is empty"):
        TextStream(tiny_tokenizer, [1], stop)


def test_one_string_alone_is_one_stop_string(tiny_tokenizer: Tokenizer) -> None:
    prompt, ids = continuation(tiny_tokenizer, "abba.")
    text = TextStream(tiny_tokenizer, prompt, "ba")
    assert "".join(text.add(token) for token in ids[:4]) == "ab"


@pytest.mark.parametrize(("max_tokens", "room", "reason"), [(2, 9, "length"), (9, 2, "context"), (2, 2, "length")])
def test_the_last_token_allowed_ends_it(tiny_tokenizer: Tokenizer, max_tokens: int, room: int, reason: str) -> None:
    prompt, ids = continuation(tiny_tokenizer, "ab.")
    text = TextStream(tiny_tokenizer, prompt, ["b."], (), max_tokens, room)
    assert [text.add(token) for token in ids[:2]] == ["a", "b"] and text.finish_reason == reason
    text = TextStream(tiny_tokenizer, prompt, ["b."], ids[1:2], max_tokens, room)
    assert [text.add(token) for token in ids[:2]] == ["a", ""] and text.finish_reason == "stop"
