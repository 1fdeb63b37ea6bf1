"""The tasks by name, those of a user's file, and the difficulties that are asked for."""

from __future__ import annotations

import re
import sys
import traceback
import types
from pathlib import Path

from elm_mlx import reading
from elm_mlx.errors import ElmError, InputError
from elm_mlx.problems.brackets import BRACKETS
from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.countdown import COUNTDOWN
from elm_mlx.problems.json_objects import JSON_OBJECTS
from elm_mlx.problems.number_tasks import ARITHMETIC, COMPARISON, COUNTING, SORTING
from elm_mlx.problems.python_functions import PYTHON
from elm_mlx.problems.quotation import QUOTATION
from elm_mlx.reading import expanded, printable

TASKS = {
    task.name: task
    for task in (ARITHMETIC, COMPARISON, SORTING, COUNTING, BRACKETS, COUNTDOWN, JSON_OBJECTS, QUOTATION, PYTHON)
}

_MOST_DIFFICULTIES = 1000


def load_task(name: str) -> CheckedTask:
    """Returns a built-in task, or that of a Python file.

    The file is run as it stands. It defines `problem(difficulty, seed)`, which returns a `Problem`, and
    `judge(problem, answer)`, which returns a `Verdict`, or True and False; where it has more than one difficulty, also
    `DIFFICULTIES`, their number.

    Args:
        name: of TASKS, or a path that ends in `.py`.

    Raises:
        InputError: there is no such task; or the file defines none that makes the same problem twice and judges its own
            solution right. What it raises later, or returns of the wrong kind, is an ElmError that names the file.
    """
    if name in TASKS:
        return TASKS[name]
    if not name.endswith(".py"):
        raise InputError(f"{printable(name)}: no such task; there are {', '.join(TASKS)}, or give a FILE.py")
    path = expanded(name)
    source = reading.text(path)
    module = types.ModuleType(f"task {path}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for the names of their annotations
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: the task does not load: {_reason(error, path)}") from error
    return _checked(path, module)


def difficulties(text: str | None, task: CheckedTask) -> range:
    """Returns the difficulties that `--difficulty` names, `2` or `1-4`; all where it is None. Raises InputError."""
    if text is None:
        return range(1, task.difficulties + 1)
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text.strip())
    if found is None:
        raise InputError(f"--difficulty {printable(text)}: give a number, or the first and the last, as in 1-4")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last <= task.difficulties:
        known = "has 1 alone" if task.difficulties == 1 else f"has 1 to {task.difficulties}"
        raise InputError(f"--difficulty {text}: the task {task.name} {known}")
    return range(first, last + 1)


def _checked(path: Path, module: types.ModuleType) -> CheckedTask:
    """Returns a file's task, which was tried on one problem of each difficulty."""
    for name, arguments in (("problem", "difficulty, seed"), ("judge", "problem, answer")):
        if not callable(getattr(module, name, None)):
            raise InputError(f"{path}: a task defines {name}({arguments})")
    count = getattr(module, "DIFFICULTIES", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MOST_DIFFICULTIES:
        raise InputError(f"{path}: DIFFICULTIES is a whole number from 1 to {_MOST_DIFFICULTIES}")

    def problem(difficulty: int, seed: int) -> Problem:
        where = f"{path}: problem({difficulty}, {seed})"
        try:
            made = module.problem(difficulty, seed)
        except Exception as error:
            raise ElmError(f"{where} fails: {_reason(error, path)}") from error
        if not isinstance(made, Problem):
            raise ElmError(f"{where} returns {type(made).__name__}, not an elm_mlx.problems.checked_task.Problem")
        return made

    def judge(problem: Problem, answer: str) -> Verdict:
        try:
            verdict = module.judge(problem, answer)
        except Exception as error:
            raise ElmError(f"{path}: judge fails on {printable(answer)!r}: {_reason(error, path)}") from error
        if isinstance(verdict, bool):
            return Verdict.RIGHT if verdict else Verdict.WRONG
        if not isinstance(verdict, Verdict):
            raise ElmError(f"{path}: judge returns {type(verdict).__name__}, not a Verdict, True or False")
        return verdict

    task = CheckedTask(path.stem, count, problem, judge)
    try:
        _try(path, task)
    except ElmError as error:
        raise InputError(str(error)) from error
    return task


def _try(path: Path, task: CheckedTask) -> None:
    for difficulty in range(1, task.difficulties + 1):
        made = task.problem(difficulty, 0)
        if made != task.problem(difficulty, 0):
            raise InputError(
                f"{path}: problem({difficulty}, 0) is another one each time: draw from random.Random(seed) alone"
            )
        if made.solution and task.judge(made, made.solution) is not Verdict.RIGHT:
            raise InputError(f"{path}: judge does not call the solution of problem({difficulty}, 0) right")


def _reason(error: BaseException, path: Path) -> str:
    """Returns what went wrong, and in which line of the file, if it was in one."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f" (line {lines[-1]})" if lines else ""
    return printable(f"{type(error).__name__}: {error}{where}")
