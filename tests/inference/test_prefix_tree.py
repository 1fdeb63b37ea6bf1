"""The tree against a list of all that was ever added, and its bytes against a count of them."""

from __future__ import annotations

import mlx.core as mx
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.inference.prefix_tree import BLOCK, Layers, PrefixTree

NBYTES = 4 * BLOCK  # of a block here: its ids

texts = st.lists(st.sampled_from([1, 2]), min_size=0, max_size=4).flatmap(
    lambda blocks: st.integers(0, BLOCK - 1).map(
        lambda rest: [number for number in blocks for _ in range(BLOCK)] + [9] * rest
    )
)


def add(tree: PrefixTree, name: str, ids: list[int]) -> None:
    def cut(start: int) -> Layers:
        return [[mx.array(ids[start : start + BLOCK])]]

    tree.add(name, ids, cut, NBYTES)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), texts), max_size=20), st.integers(0, 6))
@settings(max_examples=60)
def test_what_is_found_was_added_and_fits(steps: list[tuple[str, bool, list[int]]], blocks: int) -> None:
    tree = PrefixTree(blocks * NBYTES)
    added = set[tuple[str, tuple[int, ...]]]()
    for name, adds, ids in steps:
        if adds:
            add(tree, name, ids)
            added |= {(name, tuple(ids[:end])) for end in range(BLOCK, len(ids) + 1, BLOCK)}
            kept = len(tree.find(name, [*ids, 0]))
            assert kept == min(blocks, len(ids) // BLOCK)  # what was added last is what is there
        found = tree.find(name, ids)
        read = [token for node in found for token in node.layers[0][0].tolist()]
        assert read == ids[: len(read)] and len(read) < max(1, len(ids))
        assert not read or (name, tuple(read)) in added
        assert tree.nbytes == len(tree) * NBYTES <= tree.budget


def test_the_one_that_has_not_been_used_for_longest_goes() -> None:
    tree = PrefixTree(3 * NBYTES)
    for number in (1, 2, 3):
        add(tree, "a", [number] * BLOCK)
    assert tree.find("a", [1] * (BLOCK + 1))
    add(tree, "a", [4] * BLOCK)
    assert [bool(tree.find("a", [number] * (BLOCK + 1))) for number in (1, 2, 3, 4)] == [True, False, True, True]


def test_a_text_goes_from_its_end() -> None:
    tree = PrefixTree(4 * NBYTES)
    ids = [1] * BLOCK + [2] * BLOCK + [3] * BLOCK
    add(tree, "a", ids)
    tree.shrink(2 * NBYTES)
    assert len(tree.find("a", [*ids, 0])) == 2
    tree.clear()
    assert len(tree) == tree.nbytes == 0 and not tree.find("a", ids)


def test_one_that_is_larger_than_the_budget_is_kept_as_far_as_it_fits() -> None:
    tree = PrefixTree(2 * NBYTES)
    add(tree, "a", [5] * BLOCK)
    add(tree, "a", [1] * (4 * BLOCK))
    assert len(tree.find("a", [1] * (5 * BLOCK))) == 2


def test_blocks_behind_one_that_is_not_known_are_not_added() -> None:
    tree = PrefixTree(9 * NBYTES)
    tree.add("a", [1] * (3 * BLOCK), lambda start: None if start else [[mx.zeros(BLOCK)]], NBYTES)
    assert len(tree.find("a", [1] * (4 * BLOCK))) == len(tree) == 1
