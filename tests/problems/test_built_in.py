"""Tasks by name and from files, the difficulties asked for, and what every built-in task promises."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from elm_mlx.errors import ElmError, InputError
from elm_mlx.problems.built_in import TASKS, difficulties, load_task
from elm_mlx.problems.checked_task import Problem, Verdict

LEVELS = [(name, level) for name, task in TASKS.items() for level in range(1, task.difficulties + 1)]

REVERSED = """
from __future__ import annotations
import random
from dataclasses import dataclass
from string import ascii_lowercase
from elm_mlx.problems.checked_task import Problem, Verdict

DIFFICULTIES = 3

@dataclass
class Word:
    letters: str

def problem(difficulty, seed):
    draw = random.Random(f"reversed {difficulty} {seed}")
    word = Word("".join(draw.choices(ascii_lowercase, k=difficulty + 9)))
    return Problem(f"Write {word.letters} backwards.\\n", word.letters[::-1], {"right": word.letters[::-1]})

def judge(problem, answer):
    return answer.strip() == problem.facts["right"]
"""


def task_file(folder: Path, text: str) -> str:
    path = folder / "words.py"
    path.write_text(text, "utf-8")
    return str(path)


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_solution_is_right_and_a_seed_gives_one_problem(name: str, level: int) -> None:
    task = TASKS[name]
    prompts = set()
    for seed in range(200):
        made = task.problem(level, seed)
        assert made == task.problem(level, seed)
        assert made.prompt.endswith("\n") and made.prompt.isascii() and made.solution
        for answer in (made.solution, f"\n {made.solution} \n\n"):
            assert seed > 30 or task.judge(made, answer) is Verdict.RIGHT, (made, answer)
        prompts.add(made.prompt)
    assert len(prompts) > 180


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_no_answer_and_the_prompt_itself_are_not_right(name: str, level: int) -> None:
    task = TASKS[name]
    for seed in range(50):
        made = task.problem(level, seed)
        for answer in ("", " \n", ".", made.prompt, made.prompt * 3, "\0", "\ud800"):
            assert task.judge(made, answer) is not Verdict.RIGHT, (made, answer)


DIGESTS = {
    "arithmetic": "4cc665a2854d5f4e",
    "comparison": "e1f1c2baa3a5fa68",
    "sorting": "d8ee7e24a6a28903",
    "counting": "28f304959221b24d",
    "brackets": "70aa6fdc767bd848",
    "countdown": "d3e39bd99d9b4f75",
    "json": "2d5096933fca434a",
    "quotation": "04067cc3661790b2",
    "python": "1406481cc427e419",
}


@pytest.mark.parametrize("name", TASKS)
def test_problems_are_the_same_on_every_machine(name: str) -> None:
    task = TASKS[name]
    made = [task.problem(level, seed) for level in range(1, task.difficulties + 1) for seed in (0, 1, 2**40)]
    digest = hashlib.sha256("".join(each.prompt + each.solution for each in made).encode()).hexdigest()
    assert digest[:16] == DIGESTS[name]


def test_difficulties_of_an_option() -> None:
    task = TASKS["arithmetic"]
    assert difficulties(None, task) == range(1, 6)
    assert difficulties("2", task) == range(2, 3)
    assert difficulties("1-4", task) == range(1, 5)


@pytest.mark.parametrize("text", ["", "0", "6", "4-2", "1-6", "-1", "1-", "a", "1,2", "²", "1" * 5000])
def test_difficulties_that_a_task_does_not_have(text: str) -> None:
    with pytest.raises(InputError, match=r"^--difficulty "):
        difficulties(text, TASKS["arithmetic"])


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    task = load_task(task_file(tmp_path, REVERSED))
    assert (task.name, task.difficulties) == ("words", 3)
    made = task.problem(2, 7)
    assert task.judge(made, made.solution) is Verdict.RIGHT
    assert task.judge(made, "d") is Verdict.WRONG


def test_a_name_that_is_no_task() -> None:
    with pytest.raises(InputError, match=r"aritmetic: no such task; there are arithmetic"):
        load_task("aritmetic")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("def judge", "def guess", r"words.py: a task defines judge\(problem, answer\)"),
        ("def problem", "def problems", r"words.py: a task defines problem\(difficulty, seed\)"),
        ("DIFFICULTIES = 3", "DIFFICULTIES = 0", "DIFFICULTIES is a whole number"),
        ("DIFFICULTIES = 3", "DIFFICULTIES = True", "DIFFICULTIES is a whole number"),
        ("DIFFICULTIES = 3", "DIFFICULTIES = ", r"words.py: the task does not load: SyntaxError: .*line 8"),
        ("DIFFICULTIES = 3", "raise SystemExit", r"the task does not load: SystemExit: .*\(line 8\)"),
        ('random.Random(f"reversed {difficulty} {seed}")', "random.SystemRandom()", "is another one each time"),
        ("return Problem(", "return (", r"problem\(1, 0\) returns tuple, not an elm_mlx.problems"),
        ("k=difficulty", "k=difficulty // 0", r"problem\(1, 0\) fails: ZeroDivisionError: .*\(line 16\)"),
        ("answer.strip() ==", "answer.strip() !=", r"judge does not call the solution of problem\(1, 0\) right"),
        ("return answer.strip() ==", "return answer.strip(),", "judge returns tuple, not a Verdict, True or False"),
        ('problem.facts["right"]', "problem.rights", "words.py: judge fails on '[a-z]{10}': AttributeError"),
    ],
)
def test_files_that_are_no_tasks(before: str, after: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_task(task_file(tmp_path, REVERSED.replace(before, after)))


def test_a_task_that_fails_later_names_its_file(tmp_path: Path) -> None:
    task = load_task(
        task_file(tmp_path, REVERSED.replace("return answer", "1 // (len(answer) < 19)\n    return answer"))
    )
    with pytest.raises(ElmError, match=r"words.py: judge fails on 'aaaaaaaaaaaaaaaaaaaa': ZeroDivisionError"):
        task.judge(Problem("", "", {"right": ""}), "a" * 20)
