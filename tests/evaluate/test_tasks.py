"""Examples: the harness' draws, from Python's own generator."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from elm_mlx.errors import InputError
from elm_mlx.evaluate.questions import Question, choices
from elm_mlx.evaluate.tasks import GROUPS, SUITES, TASKS, Chosen, named, suite

POOL = [choices(f"Q{number}:", ["no", "yes"], number % 2) for number in range(30)]


def test_without_examples_only_the_description_stands_there() -> None:
    assert Chosen(TASKS["arc_easy"]).contexts(POOL[:2], None) == ["", ""]
    about = Chosen(TASKS["mmlu_us_foreign_policy"]).contexts(POOL[:1], None)[0]
    assert about == "The following are multiple choice questions (with answers) about us foreign policy.\n\n"


def test_draws_are_the_generators_of_seed_1234_one_question_after_the_other() -> None:
    asked = [choices("asked", ["a"], 0)] * 3
    found = Chosen(TASKS["arc_easy"], 4).contexts(asked, POOL)
    draw = random.Random(1234)
    expected = ["".join(f"{each.example}\n\n" for each in draw.sample(POOL, 4)) for _ in asked]
    assert found == expected
    assert Chosen(TASKS["arc_easy"], 4).contexts(asked[:1], POOL) == expected[:1]


def test_one_more_is_drawn_where_the_question_itself_could_be_among_them() -> None:
    draw = random.Random(1234)
    drawn = draw.sample(POOL, 5)
    first, rest = Chosen(TASKS["hellaswag"], 4).contexts([drawn[2], choices("other", ["a"], 0)], POOL)
    assert first == "".join(f"{each.example}\n\n" for each in drawn if each != drawn[2])
    assert rest == "".join(f"{each.example}\n\n" for each in draw.sample(POOL, 5)[:4])


def test_mmlu_shows_the_first() -> None:
    found = Chosen(TASKS["mmlu_anatomy"], 2).contexts(POOL[5:7], POOL)
    assert found[0] == found[1]
    assert found[0].endswith("about anatomy.\n\nQ0: no\n\nQ1: yes\n\n")


def test_too_few_to_draw_from_is_said() -> None:
    with pytest.raises(InputError, match="needs 31 few-shot examples, and there are 30"):
        Chosen(TASKS["arc_easy"], 31).contexts(POOL[:1], POOL)


def test_suites_are_the_papers() -> None:
    assert {each.key for each in suite("zero-shot")} == set(SUITES["zero-shot"])
    leaderboard = suite("openllm")
    assert {"arc_challenge@25", "hellaswag@10", "truthfulqa_mc2", "winogrande@5"} < {each.key for each in leaderboard}
    assert len(leaderboard) == 4 + len(GROUPS["mmlu"]) == 61
    assert all(each.shots == 5 for each in leaderboard if each.task.group == "mmlu")
    with pytest.raises(InputError, match="zero-shot, openllm, llm360"):
        suite("glue")


def test_a_task_that_brings_its_examples_takes_no_others() -> None:
    assert named("truthfulqa_mc2", 5)[0].shots == 0
    with pytest.raises(InputError, match=r"task 'arc' is not one of arc_challenge, .*, mmlu, .*--harness"):
        named("arc")


def test_keys_tell_numbers_of_examples_apart() -> None:
    task = replace(TASKS["piqa"], name="x")
    assert [Chosen(task).key, Chosen(task, 3).key] == ["x", "x@3"]
    assert isinstance(POOL[0], Question)
