"""Which difficulties come next: mostly those that are solved sometimes."""

from __future__ import annotations

from collections import Counter

import pytest

from elm_mlx.problems.checked_task import Verdict
from elm_mlx.selfplay.answer_record import RecordedAnswer, RecordedProblem
from elm_mlx.selfplay.difficulty_balance import BATCH, chosen_difficulties


def answered(difficulty: int, right: int, answers: int = 8) -> RecordedProblem:
    verdicts = [Verdict.RIGHT] * right + [Verdict.WRONG] * (answers - right)
    return RecordedProblem(0, difficulty, "", 0, tuple(RecordedAnswer("", each, 1, True) for each in verdicts))


def shares(difficulties: list[int], before: list[RecordedProblem]) -> Counter[int]:
    every: Counter[int] = Counter()
    for first in range(0, 100 * BATCH, BATCH):
        every.update(chosen_difficulties(difficulties, before, 0, first))
    return every


def test_the_first_batch_has_all_in_turn() -> None:
    assert chosen_difficulties([2, 3, 4], [], 0, 0)[:5] == [2, 3, 4, 2, 3]
    assert len(chosen_difficulties([2, 3, 4], [], 0, 0)) == BATCH


@pytest.mark.parametrize(("right", "often"), [(0, False), (1, True), (4, True), (7, True), (8, False)])
def test_what_is_solved_sometimes_comes_eight_times_as_often(right: int, often: bool) -> None:
    before = [answered(1, 4)] * 4 + [answered(2, right)] * 4
    found = shares([1, 2], before)
    expected = 1 if often else 8
    assert found[1] / found[2] == pytest.approx(expected, rel=0.2)


def test_what_was_hardly_tried_comes_often() -> None:
    found = shares([1, 2, 3], [answered(1, 4)] * 4 + [answered(2, 0)])
    assert found[1] / found[2] == pytest.approx(1, rel=0.1) == found[1] / found[3]


def test_where_nothing_is_solved_sometimes_all_come_alike() -> None:
    found = shares([1, 2], [answered(1, 8)] * 4 + [answered(2, 0)] * 4)
    assert found[1] / found[2] == pytest.approx(1, rel=0.1)


def test_they_depend_on_seed_and_number_alone() -> None:
    before = [answered(1, 4)] * 4 + [answered(2, 3)] * 4
    assert chosen_difficulties([1, 2], before, 0, 32) == chosen_difficulties([1, 2], before, 0, 32)
    assert chosen_difficulties([1, 2], before, 0, 32) != chosen_difficulties([1, 2], before, 1, 32)
    assert chosen_difficulties([1, 2], before, 0, 32) != chosen_difficulties([1, 2], before, 0, 64)
