"""Problems with the solutions that a task's program knows: data for a first fine-tuning, made without a model."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from elm_mlx.errors import InputError
from elm_mlx.problems.checked_task import CheckedTask
from elm_mlx.problems.drawn_problems import training_problem

_VAIN = 1000  # draws in a row of prompts that are there already, after which a task has no more


def solved_by_program(
    task: CheckedTask, asked: Sequence[int], seed: int, count: int, left_out: Container[str] = ()
) -> list[dict[str, Any]]:
    """Returns examples that the task's program solved, for a first fine-tuning; `count`, or as many as there are.

    No two have the same prompt, and none is of a problem that sampling by the same seed draws, but where there are few.

    Args:
        asked: difficulties, which come in turn.
        left_out: normalized prompts that are not to be among them.

    Raises:
        InputError: the task has no solutions.
    """
    found: list[dict[str, Any]] = []
    seen = set[str]()
    vain = number = 0
    while len(found) < count and vain < _VAIN:
        number -= 1  # sampling counts upwards
        difficulty = asked[(-number - 1) % len(asked)]
        problem = training_problem(task, [difficulty], seed, number, left_out).problem
        if not problem.solution.strip():
            raise InputError(f"task {task.name}: its problems have no solutions to learn from")
        if problem.prompt in seen:
            vain += 1
            continue
        vain = 0
        seen.add(problem.prompt)
        about = {"task": task.name, "seed": seed, "difficulty": difficulty, "problem": number}
        found.append({"prompt": problem.prompt, "completion": problem.solution, "source": about})
    return found
