"""Python functions that are judged by what they return."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from elm_mlx.problems import sandbox
from elm_mlx.problems.built_in import TASKS
from elm_mlx.problems.checked_task import Problem, Verdict

RIGHT, WRONG, UNREADABLE = Verdict.RIGHT, Verdict.WRONG, Verdict.UNREADABLE
TASK = TASKS["python"]
LEVELS = range(1, TASK.difficulties + 1)
CHANGES = [
    (" > ", " >= "), (" < ", " <= "), (" [+] ", " - "), ("sum", "max"), ("max", "min"), (r"\[::-1\]", ""),
    (" [*] ", " + "), ("== 0", "== 1"), ("sorted", "list"), ("len", "sum"), (r"\d+", "3"), (r"(\d)$", r"\g<1>1"),
    ("return ", "return 0 and "), (r"\n    numbers = .*", ""),
]  # fmt: skip
SUM = Problem("", "", {"steps": [[0, 3]], "end": 0})  # of the numbers greater than 3
RIGHT_SUM = "def f(numbers):\n    return sum(n for n in numbers if n > 3)"


@pytest.fixture(autouse=True, scope="module")
def ended() -> Iterator[None]:
    yield
    sandbox.stop()


@pytest.mark.parametrize("level", LEVELS)
def test_a_changed_solution_is_wrong_unless_it_returns_the_same(level: int) -> None:
    """Compared here, by values of more inputs than the judge has."""
    tried = 0
    for seed in range(12):
        made = TASK.problem(level, seed)
        for old, new in CHANGES:
            mutant = re.sub(old, new, made.solution, count=1, flags=re.MULTILINE)
            if mutant == made.solution:
                continue
            spaces: list[dict[str, object]] = [{}, {}]
            for space, source in zip(spaces, (made.solution, mutant), strict=True):
                exec(source, space)
            numbers = range(-320, 321)
            mixed = random.Random(1).sample(numbers, len(numbers))
            lists = [[], mixed, [5, 5], *([n] for n in numbers), *([n, 99 - n] for n in numbers)]
            inputs = numbers if level == 1 else lists
            outcomes: list[list[object]] = []
            for space in spaces:
                function = space["f"]
                assert callable(function)
                try:
                    outcomes.append([function(each) for each in inputs])
                except ValueError:  # max of nothing
                    outcomes.append([])
            same = outcomes[0] == outcomes[1]
            tried += not same
            assert TASK.judge(made, mutant) is (RIGHT if same else WRONG), mutant
    assert tried > 30


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT_SUM, f"```python\n{RIGHT_SUM}\n```", f"Here it is:\n\n```py\n{RIGHT_SUM}\n```\n\nIt adds them up.",
        f"```\n{RIGHT_SUM}", f"First this:\n```\ndef f(x): return 0\n```\nNo:\n```\n{RIGHT_SUM}\n```\n",
        f"```python\n{RIGHT_SUM}\n```\nAn example:\n```python\nprint(f([4]))  # 4\n```\nOutput:\n```\n4\n```",
        f"{RIGHT_SUM}\nprint(f([4]))", f" {RIGHT_SUM}", "    " + RIGHT_SUM.replace("\n", "\n    "),
        f"import math\n{RIGHT_SUM.replace('sum(', 'math.fsum(')}",
        "f = lambda numbers: sum(filter((3).__lt__, numbers))",
        "def f(numbers):\n    print(numbers)\n    numbers[:] = [n for n in numbers if n > 3]\n    return sum(numbers)",
    ],
)  # fmt: skip
def test_right_answers(answer: str) -> None:
    assert TASK.judge(SUM, answer) is RIGHT


@pytest.mark.parametrize(
    "answer",
    [
        "def f(numbers): return sum(numbers)", RIGHT_SUM.replace("(numbers)", "(numbers: List[int])", 1),
        RIGHT_SUM.replace("(numbers):", "(numbers) -> Number:", 1), "def f(numbers): return True",
        "def f(numbers): return 0",
        "def f(numbers): pass", f"```\n{RIGHT_SUM}\n```\n```\ndef f(numbers): return 0\n```",
        f"{RIGHT_SUM}\nAnd that is all.", f"{RIGHT_SUM}\nimport os; os._exit(0)",
        "def f(numbers): return float('nan')", "def f(numbers): return str(sum(n for n in numbers if n > 3))",
        "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(numbers): return E()",
        "import builtins, json\nbuiltins.sum = lambda *_: 7\njson.dumps = lambda *_, **__: '{\"values\": 1}'\n"
        "def f(numbers): return 0",
        "import sys, gc\ndef f(numbers):\n    frame = sys._getframe()\n    while frame:\n"
        "        for each in [*frame.f_locals.values()]:\n"
        "            if isinstance(each, dict) and 'expected' in each: return each['expected']\n"
        "        frame = frame.f_back\n"
        "    return [each for each in gc.get_objects() if isinstance(each, dict) and 'solution' in each][0]",
        "def f(numbers):\n    f.calls = getattr(f, 'calls', 0) + 1\n    return [0, 1, 2][f.calls]",
        "def f(numbers):\n" + "    numbers = [n for n in numbers if n > 3]\n" * 5 + "    return numbers",
        "def f(numbers):\n    while True: pass",
    ],
)  # fmt: skip
def test_answers_that_pretend(answer: str) -> None:
    assert TASK.judge(SUM, answer) is WRONG


@pytest.mark.parametrize(
    "answer", ["", "```\n```", "print(3)", "return sum(numbers)", "def g(numbers): pass", "def f", "a" * 10**6]
)
def test_answers_without_a_function(answer: str) -> None:
    assert TASK.judge(SUM, answer) in (UNREADABLE, WRONG)
    assert answer == "def f" or TASK.judge(SUM, answer) is UNREADABLE
