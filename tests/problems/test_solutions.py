"""Solutions of a task's own program: right, different, and of problems that are not held out."""

from __future__ import annotations

from collections import Counter

import pytest

from elm_mlx.errors import InputError
from elm_mlx.problems.built_in import load_task
from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.drawn_problems import is_held_out, normalized, training_problem
from elm_mlx.problems.solutions import solved_by_program


def test_they_are_right_different_and_of_each_difficulty_in_turn() -> None:
    task = load_task("arithmetic")
    found = solved_by_program(task, [3, 4], 0, 60)
    assert len({each["prompt"] for each in found}) == 60
    assert not any(is_held_out(each["prompt"]) for each in found)
    assert [each["source"]["difficulty"] for each in found[:4]] == [3, 4, 3, 4]
    assert Counter(each["source"]["difficulty"] for each in found) == {3: 30, 4: 30}
    for each in found[:20]:
        asked = each["prompt"].removeprefix("What is ").removesuffix("?\n")
        assert int(each["completion"]) == eval(asked)


def test_sampling_by_the_same_seed_draws_others() -> None:
    task = load_task("arithmetic")
    solutions = {each["prompt"] for each in solved_by_program(task, [3], 0, 300)}
    sampled = {training_problem(task, [3], 0, number).problem.prompt for number in range(300)}
    assert len(solutions & sampled) < 3  # of 1.5 million


def test_a_small_task_gives_what_it_has_and_leaves_out_what_is_asked() -> None:
    def problem(difficulty: int, seed: int) -> Problem:
        return Problem(f"number {seed % 50}?", "yes")

    task = CheckedTask("few", 1, problem, lambda problem, answer: Verdict.RIGHT)
    every = {f"number {number}?" for number in range(50)}
    left_out = {normalized("number 7?")}
    found = {each["prompt"] for each in solved_by_program(task, [1], 0, 1000, left_out)}
    assert found == {prompt for prompt in every if not is_held_out(prompt)} - {"number 7?"}


def test_a_task_without_solutions_is_refused() -> None:
    task = CheckedTask(
        "open", 1, lambda difficulty, seed: Problem(f"{seed}", ""), lambda problem, answer: Verdict.WRONG
    )
    with pytest.raises(InputError, match="task open: its problems have no solutions"):
        solved_by_program(task, [1], 0, 5)
