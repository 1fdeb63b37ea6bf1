"""Answers to problems: judged, in order, and the same in any company."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import guesses
import pytest

from elm_mlx.inference.solving import SolvedProblem, solve
from elm_mlx.problems.built_in import load_task
from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.drawn_problems import DrawnProblem, training_problem
from elm_mlx.store.loading import load


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> tuple[Path, CheckedTask]:
    model, task = guesses.write(tmp_path_factory.mktemp("guesses"), tiny_tokenizer_file)
    return model, load_task(str(task))


def drawn(task: CheckedTask, count: int) -> list[DrawnProblem]:
    return [training_problem(task, [1], 0, number) for number in range(count)]


def solved(guessing: tuple[Path, CheckedTask], problems: list[DrawnProblem], **more: Any) -> list[SolvedProblem]:
    model, tokenizer = load(guessing[0])
    options = {"samples": 8, "max_tokens": 4, "seed": 3} | more
    return list(solve(model, tokenizer, None, guessing[1], problems, **options))  # type: ignore[arg-type]


def logprobs(found: list[SolvedProblem]) -> list[list[tuple[float, ...]]]:
    return [[answer.rollout.logprobs for answer in each.answers] for each in found]


def test_each_problem_has_its_answers_in_order(guessing: tuple[Path, CheckedTask]) -> None:
    problems = drawn(guessing[1], 20)
    found = solved(guessing, problems)
    assert [each.drawn for each in found] == problems
    assert all([answer.rollout.sample for answer in each.answers] == [*range(8)] for each in found)
    for each in found:
        for answer in each.answers:
            text, wanted = answer.rollout.text, each.drawn.problem.solution
            assert (answer.verdict is Verdict.RIGHT) == (answer.ended and text == wanted)
            assert (answer.verdict is Verdict.WRONG) == (answer.ended and len(text) == 1 and text != wanted)
        assert each.count == (sum(answer.verdict is Verdict.RIGHT for answer in each.answers), 8)
    right = sum(each.count[0] for each in found)
    assert 25 <= right <= 75  # 0.9 / 3 of 160 are 48


def test_an_answer_does_not_depend_on_the_others(guessing: tuple[Path, CheckedTask]) -> None:
    problems = drawn(guessing[1], 9)
    together = logprobs(solved(guessing, problems))
    assert logprobs(solved(guessing, problems[5:7])) == together[5:7]
    assert logprobs(solved(guessing, problems, seed=4)) != together


def test_each_text_is_judged_once_for_a_problem(guessing: tuple[Path, CheckedTask]) -> None:
    model, task = guessing
    judged: list[tuple[str, str]] = []

    def judge(problem: Problem, answer: str) -> Verdict:
        judged.append((problem.prompt, answer))
        return task.judge(problem, answer)

    told: list[int] = []
    noted = CheckedTask("noted", 1, task.problem, judge)
    found = solved((model, noted), drawn(task, 9), on_answer=told.append)
    assert told == [*range(1, 73)]
    assert len({*judged}) == len(judged)
    assert {*judged} == {
        (each.drawn.problem.prompt, answer.rollout.text) for each in found for answer in each.answers if answer.ended
    }


def test_what_has_no_end_is_not_judged(guessing: tuple[Path, CheckedTask], tmp_path: Path) -> None:
    model, task = guessing[0], guessing[1]

    def judge(problem: object, answer: str) -> Verdict:
        return Verdict.RIGHT

    everything = CheckedTask("everything", 1, task.problem, judge)
    found = solved((model, everything), drawn(task, 20), max_tokens=1)
    assert {answer.verdict for each in found for answer in each.answers} == {Verdict.UNREADABLE}
    mixed = Counter(
        (answer.ended, answer.verdict)
        for each in solved((model, everything), drawn(task, 20), max_tokens=2)
        for answer in each.answers
    )
    assert {*mixed} == {(True, Verdict.RIGHT), (False, Verdict.UNREADABLE)}
