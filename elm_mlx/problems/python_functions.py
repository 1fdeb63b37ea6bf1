"""The task to write a small Python function, which is run on inputs that the prompt does not show.

An answer is its last block between lines of ``` that defines `f`, for many a model shows how to call it in another
after that; or all of it where it has none. It runs in the sandbox, and its values are compared here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from elm_mlx.problems import sandbox
from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.final_line import blocks

_Number = Callable[[int, int, int], int]
_Step = Callable[[list[int], int], list[int]]

_DEFINES = re.compile(r"^(def f\b|f *=(?!=))", re.MULTILINE)

# For each, how a prompt says it, how a solution writes it, and what it is.
_OF_NUMBER: list[tuple[str, str, _Number]] = [
    ("x times {a}, plus {b}", "x * {a} + {b}", lambda x, a, b: x * a + b),
    ("x plus {a}, times {b}", "(x + {a}) * {b}", lambda x, a, b: (x + a) * b),
    ("x times {a}, minus {b}", "x * {a} - {b}", lambda x, a, b: x * a - b),
    ("x squared, plus {a}", "x * x + {a}", lambda x, a, b: x * x + a),
    ("{a} minus x", "{a} - x", lambda x, a, b: a - x),
    ("the larger of x and {a}", "max(x, {a})", lambda x, a, b: max(x, a)),
    ("the smaller of x and {a}", "min(x, {a})", lambda x, a, b: min(x, a)),
]
_STEPS: list[tuple[str, str, _Step]] = [
    ("keeps those greater than {k}", "[n for n in numbers if n > {k}]", lambda ns, k: [n for n in ns if n > k]),
    ("keeps those less than {k}", "[n for n in numbers if n < {k}]", lambda ns, k: [n for n in ns if n < k]),
    ("keeps the even ones", "[n for n in numbers if n % 2 == 0]", lambda ns, k: [n for n in ns if n % 2 == 0]),
    ("keeps the odd ones", "[n for n in numbers if n % 2 == 1]", lambda ns, k: [n for n in ns if n % 2 == 1]),
    ("leaves out {k}", "[n for n in numbers if n != {k}]", lambda ns, k: [n for n in ns if n != k]),
    ("adds {k} to each", "[n + {k} for n in numbers]", lambda ns, k: [n + k for n in ns]),
    ("subtracts {k} from each", "[n - {k} for n in numbers]", lambda ns, k: [n - k for n in ns]),
    ("multiplies each by {k}", "[n * {k} for n in numbers]", lambda ns, k: [n * k for n in ns]),
    ("squares each", "[n * n for n in numbers]", lambda ns, k: [n * n for n in ns]),
]
_WEIGHTS = [4 if "{k}" in words else 1 for words, _, _ in _STEPS]  # of which there are more problems
_ENDS: list[tuple[str, str, Callable[[list[int]], Any]]] = [
    ("their sum", "sum(numbers)", sum),
    ("how many there are", "len(numbers)", len),
    ("the largest, or 0 if there is none", "max(numbers, default=0)", lambda ns: max(ns, default=0)),
    ("the smallest, or 0 if there is none", "min(numbers, default=0)", lambda ns: min(ns, default=0)),
    ("them as a list", "numbers", list),
    ("them as a list, sorted", "sorted(numbers)", sorted),
    ("them as a list, in reverse order", "numbers[::-1]", lambda ns: ns[::-1]),
]

# Each number by itself shows what a step does to it; lists, what the end does to several.
_NUMBERS = [*range(-310, 311)]  # more than three steps move a number
_MIXED = [_NUMBERS[i * 71 % len(_NUMBERS)] for i in range(len(_NUMBERS))]
_LISTS = [[], *([n] for n in _NUMBERS), _NUMBERS, _MIXED, [7, 7, 7], [90, -3, 44, 17, 0, 58], [-8, -50, -21]]


def _problem(difficulty: int, seed: int) -> Problem:
    draw = random.Random(f"python/{difficulty}/{seed}")
    if difficulty == 1:
        form, a, b = draw.randrange(len(_OF_NUMBER)), draw.randint(2, 99), draw.randint(2, 99)
        words, code, _ = _OF_NUMBER[form]
        prompt = f"Write a Python function f(x) that returns {words.format(a=a, b=b)}.\n"
        return Problem(prompt, f"def f(x):\n    return {code.format(a=a, b=b)}", {"of_number": [form, a, b]})
    steps = [(each, draw.randint(2, 99)) for each in draw.choices(range(len(_STEPS)), _WEIGHTS, k=difficulty - 1)]
    end = draw.randrange(len(_ENDS))
    words = ", ".join(_STEPS[step][0].format(k=k) for step, k in steps)
    lines = [f"numbers = {_STEPS[step][1].format(k=k)}" for step, k in steps]
    prompt = f"Write a Python function f(numbers) that takes a list, {words}, and returns {_ENDS[end][0]}.\n"
    solution = "\n    ".join(["def f(numbers):", *lines, f"return {_ENDS[end][1]}"])
    return Problem(prompt, solution, {"steps": [list(step) for step in steps], "end": end})


def _expected(facts: dict[str, Any]) -> tuple[list[list[Any]], list[Any]]:
    """Returns the arguments of each call, and what it should return."""
    if "of_number" in facts:
        form, a, b = facts["of_number"]
        return [[x] for x in _NUMBERS], [_OF_NUMBER[form][2](x, a, b) for x in _NUMBERS]
    values = []
    for numbers in _LISTS:
        for step, k in facts["steps"]:
            numbers = _STEPS[step][2](numbers, k)
        values.append(_ENDS[facts["end"]][2](numbers))
    return [[numbers] for numbers in _LISTS], values


def _judge(problem: Problem, answer: str) -> Verdict:
    source = next((each for each in reversed(blocks(answer)) if _DEFINES.search(each)), None)
    if source is None:
        return Verdict.UNREADABLE
    inputs, expected = _expected(problem.facts)
    try:
        given = sandbox.values(source, "f", inputs)
    except sandbox.CodeError:
        return Verdict.WRONG
    return Verdict.RIGHT if _same(expected, given) else Verdict.WRONG


def _same(expected: Any, given: Any) -> bool:
    """As `==`, but that True is not 1."""
    if isinstance(expected, list):
        return isinstance(given, list) and len(given) == len(expected) and all(map(_same, expected, given))
    return not isinstance(given, bool) and bool(given == expected)


# Difficulties: 1, a formula of one number (29,204 problems); 2, a list, to which one thing is done (4,137); 3, two
# things (2.4 million); 4, three.
PYTHON = CheckedTask("python", 4, _problem, _judge)
