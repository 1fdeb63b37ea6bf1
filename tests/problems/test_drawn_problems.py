"""Problems to train on and held-out ones: never the same, and the same for all who ask."""

import random

import pytest

from elm_mlx.errors import InputError
from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.drawn_problems import held_out_problems, is_held_out, normalized, training_problem


def sums(most=1000, difficulties=3):
    def problem(difficulty, seed):
        draw = random.Random(f"{difficulty} {seed}")
        a, b = draw.randrange(most), draw.randrange(most)
        return Problem(f"{difficulty}: {a} + {b} =", f" {a + b}")

    return CheckedTask("sums", difficulties, problem, lambda problem, answer: Verdict.RIGHT)


def test_no_seed_or_range_brings_a_held_out_problem_into_training():
    task = sums(most=12)  # 144 sums a difficulty
    held = {normalized(each.problem.prompt) for each in held_out_problems(task, [1, 2, 3], 1000)}
    trained = {
        normalized(training_problem(task, difficulties, seed, number).problem.prompt)
        for seed in range(3) for difficulties in ([1], [1, 2, 3]) for number in range(300)
    }  # fmt: skip
    assert held and trained and not held & trained
    assert 30 <= len(held) <= 80  # an eighth of 432 is 54


def test_a_problem_depends_on_seed_and_number_alone():
    task = sums()
    drawn = [training_problem(task, [1, 2, 3], 7, number) for number in range(20)]
    assert [training_problem(task, [1, 2, 3], 7, number) for number in reversed(range(20))] == drawn[::-1]
    assert {each.difficulty for each in drawn} == {1, 2, 3}
    assert [each.number for each in drawn] == [*range(20)]
    assert len({each.problem.prompt for each in drawn}) == 20
    other = [training_problem(task, [1, 2, 3], 8, number).problem for number in range(20)]
    assert not {each.prompt for each in other} & {each.problem.prompt for each in drawn}


def test_held_out_problems_are_all_different_in_turn_and_begin_alike_for_any_count():
    task = sums()
    many = held_out_problems(task, range(1, 4), 50)
    assert len({each.problem.prompt for each in many}) == 50
    assert [each.difficulty for each in many[:6]] == [1, 2, 3, 1, 2, 3]
    assert all(is_held_out(each.problem.prompt) for each in many)
    assert held_out_problems(task, range(1, 4), 17) == many[:17]
    two = [each.problem for each in many if each.difficulty == 2]
    assert [each.problem for each in held_out_problems(task, [2], len(two))] == two


def test_a_difficulty_that_has_no_more_lets_the_others_go_on():
    def problem(difficulty, seed):
        return Problem("the only one, 16" if difficulty == 1 else f"one of many, {seed}", "x")

    task = CheckedTask("few", 2, problem, lambda problem, answer: Verdict.RIGHT)
    found = held_out_problems(task, [1, 2], 10)
    assert len(found) == 10
    assert [each.difficulty for each in found].count(1) == is_held_out("the only one, 16")


def test_what_is_left_out_is_not_drawn():
    task = sums(most=5, difficulties=1)
    every = {training_problem(task, [1], 0, number).problem.prompt for number in range(500)}
    left_out = {normalized(prompt) for prompt in [*every][:10]}
    found = {normalized(training_problem(task, [1], 0, number, left_out).problem.prompt) for number in range(500)}
    assert found == {normalized(prompt) for prompt in every} - left_out


def test_nothing_to_train_on_is_said():
    task = sums(most=1, difficulties=1)
    with pytest.raises(InputError, match=r"task sums, difficulty 1: .* not held out; choose others by --difficulty"):
        training_problem(task, [1], 0, 0, left_out={normalized("1: 0 + 0 =")})


def test_nothing_to_hold_out_is_said():
    number = next(number for number in range(100) if not is_held_out(f"one {number}"))
    task = CheckedTask(
        "one", 1, lambda difficulty, seed: Problem(f"one {number}", "x"), lambda problem, answer: Verdict.RIGHT
    )
    with pytest.raises(InputError, match="no problem to hold out"):
        held_out_problems(task, [1], 5)


def test_prompts_are_the_same_but_for_case_white_space_and_form():
    assert normalized("  Ｗhat  is\n2 + 2？ ") == normalized("what is 2 + 2?")
    assert normalized("2 + 2") != normalized("2 + 3")
