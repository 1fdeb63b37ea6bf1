"""docs/tasks.md: its examples are the tasks' own, and its files work as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from elm_mlx.problems import sandbox
from elm_mlx.problems.built_in import TASKS, load_task
from elm_mlx.problems.checked_task import Problem, Verdict

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text("utf-8")
FILES = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def examples(name: str) -> str:
    """A problem of each difficulty, and its solution below it: what the page has."""
    task = TASKS[name]
    made = [task.problem(level, 1) for level in range(1, task.difficulties + 1)]
    shown = "\n".join(f"{level}  {each.prompt}{each.solution}\n" for level, each in enumerate(made, 1))
    return f"```text\n{shown}```\n"


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_its_examples(name: str) -> None:
    assert examples(name) in PAGE, examples(name)
    assert f"### {name}\n" in PAGE


def test_the_first_file_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "roman.py"
    path.write_text(FILES[0], "utf-8")
    task = load_task(str(path))
    assert (task.name, task.difficulties) == ("roman", 3)
    solutions = set()
    for level in range(1, 4):
        for seed in range(30):
            made = task.problem(level, seed)
            solutions.add(made.solution)
            assert task.judge(made, f"{made.solution}\n") is Verdict.RIGHT
            assert task.judge(made, made.solution + "I") is Verdict.WRONG
            assert task.judge(made, made.prompt) is Verdict.UNREADABLE
    assert {"I", "IX", "XL"} & {each[:2] for each in solutions} and len(solutions) > 40


def test_the_second_runs_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    sandbox.stop()
    space: dict[str, Any] = {}
    exec("\n".join(FILES), space)
    judge = space["judge_of_squares"]
    try:
        made = Problem("Write a Python function f(n) that returns the square of n.\n", "")
        assert judge(made, "def f(n): return n * n") is True
        for answer in ("def f(n): return n * abs(n)", "while True: pass", ""):
            assert judge(made, answer) is False
    finally:
        sandbox.stop()
