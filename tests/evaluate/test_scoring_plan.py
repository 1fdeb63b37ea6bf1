"""Plans: everything is scored once, in its place, whatever is shared."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.evaluate import scoring_plan
from elm_mlx.evaluate.tokens import Scored


def items(seed: int, count: int, stem: int = 0) -> list[list[Scored]]:
    """Items of 1 to 5 sequences with a common beginning, in a small vocabulary so that ends coincide."""
    draw = random.Random(seed)
    beginning = [1, *(draw.randrange(2, 9) for _ in range(stem))]
    found = []
    for _ in range(count):
        context = beginning + [draw.randrange(2, 9) for _ in range(draw.randrange(0, 40))]
        item = []
        for _ in range(draw.randrange(1, 6)):
            own = context + [draw.randrange(2, 9) for _ in range(draw.randrange(0, 3))]
            item.append(Scored(own + [draw.randrange(2, 5) for _ in range(draw.randrange(1, 9))], len(own)))
        found.append(item)
    return found


def read_back(planned: scoring_plan.Plan) -> dict[int, list[list[tuple[list[int], int]]]]:
    """For each item and sequence, what is read before each scored token, and that token."""
    found: dict[int, list[list[tuple[list[int], int]]]] = {}
    for batch in planned.batches:
        laid = []  # for each position of the blocks' rows: what is read up to it
        for block in batch.blocks:
            for row, owner in zip(block.rows.tolist(), block.owners.tolist(), strict=True):
                before = planned.stem + batch.prefix[owner].tolist()
                laid += [before + row[: position + 1] for position in range(len(row))]
        for span in batch.spans:
            sequences = []
            for place in span.places:
                pairs = []
                for where, token in zip(batch.where[place].tolist(), batch.targets[place].tolist(), strict=True):
                    pairs.append((laid[where], token))
                sequences.append(pairs)
            assert span.item not in found
            found[span.item] = sequences
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 25),
    st.sampled_from([0, 0, 12]),
    st.sampled_from([16, 200, 4096]),
    st.booleans(),
)
def test_each_token_is_scored_once_after_exactly_what_comes_before_it(
    seed: int, count: int, stem: int, tokens: int, sharing: bool
) -> None:
    asked = items(seed, count, stem)
    found = read_back(scoring_plan.make(asked, tokens, sharing))
    assert sorted(found) == list(range(count))
    for number, item in enumerate(asked):
        expected = [[(each.ids[:at], each.ids[at]) for at in range(each.start, len(each.ids))] for each in item]
        assert found[number] == expected


def test_batches_keep_to_their_size_and_the_longest_come_first() -> None:
    planned = scoring_plan.make(items(3, 60), 256)
    several = [batch for batch in planned.batches if len(batch.prefix) > 1]
    assert all(batch.prefix.size <= 256 for batch in several)
    assert all(sum(block.rows.size for block in batch.blocks) <= 256 for batch in several)
    costs = [batch.cost for batch in planned.batches]
    assert costs == sorted(costs, reverse=True)


def test_a_description_is_read_once_for_all() -> None:
    about = [1, *range(100, 150)]
    asked = [[Scored([*about, at, 7, 8], 52), Scored([*about, at, 9, 3], 52)] for at in range(200, 230)]
    planned = scoring_plan.make(asked, 2048)
    assert planned.stem == about
    assert sum(batch.cost for batch in planned.batches) < 30 * 2 * 3


def test_choices_of_one_token_are_one_row() -> None:
    asked = [[Scored([1, 5, 6, letter], 3) for letter in (11, 12, 13, 14)]]
    batch = scoring_plan.make(asked, 2048).batches[0]
    assert [len(block.rows) for block in batch.blocks] == [1]
    assert batch.targets.tolist() == [11, 12, 13, 14]
    assert len(set(batch.where.tolist())) == 1


def test_rows_of_very_different_lengths_are_blocks_of_their_own() -> None:
    asked = [[Scored([1, number, *range(2, length)], 2) for length in (12, 13, 100)] for number in range(101, 117)]
    batch = scoring_plan.make(asked, 8192).batches[0]
    assert [len(block.rows) for block in batch.blocks] == [16, 32]
    assert batch.cost < 16 * (1 + 98 + 2 * 12) + 32


def test_without_sharing_every_sequence_is_read_whole() -> None:
    planned = scoring_plan.make(items(5, 10, 12), 2048, sharing=False)
    assert planned.stem == []
    assert all(batch.prefix.size == 0 for batch in planned.batches)
    assert scoring_plan.make([], 2048) == scoring_plan.Plan([], [])
