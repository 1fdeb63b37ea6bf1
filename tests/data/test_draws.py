"""Weights of sources: shares of an epoch's tokens, every example at least once, evenly over epochs; resumed exactly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import equal

from elm_mlx.data.batches import Batches
from elm_mlx.data.draws import Draws
from elm_mlx.data.encoding import Example
from elm_mlx.errors import InputError


def examples(lengths: list[int]) -> list[Example]:
    return [Example(tuple(range(number, number + n)), (False, *[True] * (n - 1))) for number, n in enumerate(lengths)]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.floats(0.1, 10)), min_size=1, max_size=4
    ),
    st.integers(0, 5),
)
def test_shares_are_the_weights(sources: list[tuple[list[int], float]], seed: int) -> None:
    counts, weights = [len(lengths) for lengths, _ in sources], [weight for _, weight in sources]
    tokens = np.array([n for lengths, _ in sources for n in lengths])
    draws = Draws(counts, weights, tokens, seed)
    seen: Counter[int] = Counter()
    for epoch in range(4):
        numbers = draws(epoch)
        assert {*numbers.tolist()} == {*range(len(tokens))}  # no epoch without one
        seen.update(numbers.tolist())
        for first, (lengths, weight) in zip(np.cumsum([0, *counts]), sources, strict=False):
            of_it = numbers[(first <= numbers) & (numbers < first + len(lengths))]
            wanted = sum(draws.wanted) * weight / sum(weights)
            assert abs(tokens[of_it].sum() - wanted) <= max(lengths) + len(sources)
            often = [seen[first + i] for i in range(len(lengths))]
            assert max(often) - min(often) <= 1
    assert np.array_equal(draws(2), Draws(counts, weights, tokens, seed)(2))


def test_the_longest_for_its_weight_is_in_an_epoch_once() -> None:
    draws = Draws([3, 2], [1, 1], np.array([10, 10, 10, 4, 2]), 0)
    assert draws.totals == [30, 6] and draws.wanted == [30, 30]
    assert sorted(draws(0).tolist()) == [0, 1, 2, *[3] * 5, *[4] * 5]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [([1], "--weight: 1 for 2 of --data"), ([1, 0], "--weight: must be above 0"), ([1, float("nan")], "must be above")],
)
def test_weights_that_are_none(weights: list[float], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Draws([1, 1], weights, np.array([2, 2]), 0)


def test_batches_hold_what_is_drawn_and_resume_exactly() -> None:
    made: dict[str, Any] = {"batch_size": 2, "row_length": 32, "seed": 3, "counts": [6, 2]}
    every = examples([9, 8, 7, 9, 8, 7, 5, 3])
    batches = Batches(every, **made, weights=[1, 2])
    assert batches.tokens() > 2 * sum(len(each.ids) - 1 for each in every)
    first = [next(batches) for _ in range(7)]
    state = batches.state()
    following = [next(batches) for _ in range(20)]  # over more than one epoch
    again = Batches(every, **made, weights=[1, 2])
    again.resume(state)
    assert all(equal(one, other) for one, other in zip(following, again, strict=False))
    assert first[0].inputs.shape == (2, 32)
    for weights in ([1, 1], []):
        with pytest.raises(InputError, match="cannot resume: the weights changed"):
            Batches(every, **made, weights=weights).resume(state)


def test_without_weights_an_old_state_is_resumed() -> None:
    batches = Batches(examples([4] * 9), 2, 8)
    next(batches)
    state = batches.state()
    del state["weights"]
    Batches(examples([4] * 9), 2, 8).resume(state)
