"""What a text's own past and a smaller model guess, against the plainest ways to the same."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.inference.drafts import LONGEST, SHORTEST, ModelDrafts, PromptLookup, Share
from elm_mlx.inference.generation import stream_generate
from elm_mlx.inference.sampling import Sampler, State
from elm_mlx.model.network import Model

GREEDY = Sampler()


def looked_up(text: Sequence[int], count: int) -> list[int]:
    """Slowly: the longest run of tokens before a place that ends the text too, and of those the last place."""
    best, start = 0, 0
    for place in range(SHORTEST, len(text)):
        agreeing = 0
        while agreeing < min(place, LONGEST) and text[place - 1 - agreeing] == text[-1 - agreeing]:
            agreeing += 1
        if agreeing >= max(best, SHORTEST):
            best, start = agreeing, place
    if not best:
        return []
    goes_on = [*text]
    for at in range(count):
        goes_on.append(goes_on[start + at])
    return goes_on[len(text) :]


def guessed(lookup: PromptLookup, count: int) -> list[int]:
    offers = lookup.offers(count)
    return lookup.draft(len(offers), GREEDY, State()).tolist() if offers else []


@settings(max_examples=200)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40))
def test_a_lookup_guesses_what_followed_the_longest_and_last_match(text: list[int], read: int) -> None:
    lookup = PromptLookup()
    lookup.begin(text[:read])
    for token in text[read:]:
        lookup.add(token)
    assert guessed(lookup, 7) == looked_up(text, 7)


def test_a_text_without_repetition_is_offered_nothing() -> None:
    lookup = PromptLookup()
    lookup.begin(range(100))
    assert guessed(lookup, 7) == []


def test_a_text_in_circles_goes_on_in_circles() -> None:
    lookup = PromptLookup()
    lookup.begin([9, 1, 2, 3, 1, 2, 3, 1, 2])
    assert guessed(lookup, 7) == [3, 1, 2, 3, 1, 2, 3]


def test_guesses_are_as_likely_as_they_were_right_by_how_much_agreed() -> None:
    lookup = PromptLookup()
    lookup.begin([1, 2, 3] * 10)
    for token in [1, 2, 3] * 20:
        lookup.add(token)
    assert min(lookup.offers(7)) > 0.9
    lookup.begin([])
    for number in range(40):  # two tokens agree, and something else follows each time
        for token in (1, 2, 10 + number):
            lookup.add(token)
    lookup.add(1)
    lookup.add(2)
    first, *_ = lookup.offers(7)
    assert first < 0.2


def test_a_share_follows_what_changes() -> None:
    share = Share(0.5)
    assert share.value == 0.5
    for _ in range(100):
        share.add(True)
    assert share.value > 0.95
    for _ in range(100):
        share.add(False)
    assert share.value < 0.1


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.random_model(tiny.scaled_config(96), seed=3)


@settings(max_examples=20)
@given(st.data())
def test_a_model_guesses_its_own_text_wherever_the_text_goes(model: Model, data: st.DataObject) -> None:
    """Whatever was guessed before, right or wrong, and however far the text went without it."""
    drafts, text = ModelDrafts(model, 96), [1, 5, 9]
    drafts.begin(text)
    for _ in range(data.draw(st.integers(1, 5))):
        for token in data.draw(st.lists(st.integers(3, 95), max_size=12)):
            text.append(token)
            drafts.add(token)
        if data.draw(st.booleans()):
            text = [*text[: data.draw(st.integers(1, len(text)))], 4]
            drafts.begin(text)
        count = data.draw(st.integers(1, 7))
        guesses = drafts.draft(count, GREEDY, State()).tolist()
        own = stream_generate(model, None, text, max_tokens=count, stop_at_eos=False)
        assert guesses == [response.token for response in own]
        for token in guesses[: data.draw(st.integers(0, count))]:
            text.append(token)
            drafts.add(token)


def test_a_model_offers_no_more_than_its_context_holds() -> None:
    drafts = ModelDrafts(tiny.random_model(tiny.scaled_config(96, max_context_length=16)), 96)
    drafts.begin([5] * 12)
    assert len(drafts.offers(7)) == 4
    drafts.begin([5] * 20)
    assert not drafts.offers(7)


def test_functions_of_the_callers_are_not_asked_for_guesses(model: Model) -> None:
    def never(logprobs: mx.array) -> mx.array:
        raise AssertionError

    drafts = ModelDrafts(model, 96)
    drafts.begin([1, 5, 9])
    sampler = Sampler(choose=never)
    assert drafts.draft(3, sampler, State()).shape == (3,)
