"""The countdown task: to make a number from others. Finding an answer is hard, checking it is not."""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable
from fractions import Fraction

from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.final_line import said, whole

_LONGEST = 200  # characters of an expression
_HIGHEST = 999  # number to make
_OPERATIONS: dict[type[ast.operator], tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}
_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2}  # how strongly a sign binds
_NUMBER = 3  # stronger than any


def _problem(difficulty: int, seed: int) -> Problem:
    draw = random.Random(f"countdown/{difficulty}/{seed}")
    count, largest, signs = {1: (3, 20, "+-"), 2: (3, 20, "+-*"), 3: (4, 30, "+-*"), 4: (6, 50, "+-*/")}[difficulty]
    while True:
        numbers = [draw.randint(1, largest) for _ in range(count)]
        target, solution = _expression(draw, numbers, signs)
        if 0 < target <= _HIGHEST:
            break
    prompt = (
        f"Make {target} from the numbers {', '.join(map(str, numbers))} with {', '.join(signs[:-1])} and {signs[-1]}. "
        "Use each number once.\n"
    )
    return Problem(prompt, solution, {"numbers": numbers, "target": target, "signs": signs})


def _expression(draw: random.Random, numbers: list[int], signs: str) -> tuple[int, str]:
    """Returns the value and the text of an expression with all the numbers, whose parts are whole and not negative."""
    parts = [(each, str(each), _NUMBER) for each in numbers]
    while len(parts) > 1:
        (a, left, left_strength), (b, right, right_strength) = (parts[i] for i in draw.sample(range(len(parts)), 2))
        sign = draw.choice(signs)
        if (sign == "-" and a < b) or (sign == "/" and (b == 0 or a % b)):
            continue
        strength = _STRENGTH[sign]
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[sign]
        before = f"({left})" if left_strength < strength else left
        after = f"({right})" if right_strength < strength + (sign in "-/") else right
        parts.remove((a, left, left_strength))
        parts.remove((b, right, right_strength))
        parts.append((value, f"{before} {sign} {after}", strength))
    return parts[0][0], parts[0][1]


def _judge(problem: Problem, answer: str) -> Verdict:
    stated = said(answer, equation=True) or ""
    sides = [side.strip(" *`$") for side in stated.split("=")]  # not within: 3**5 is not 35
    if len(sides) == 2 and whole(sides[0]) is not None:
        sides.reverse()
    read = _read(sides[0])
    if read is None or len(sides) > 2 or None in (results := [whole(side) for side in sides[1:]]):
        return Verdict.UNREADABLE
    value, used, signs = read
    facts = problem.facts
    right = (
        value == facts["target"]
        and sorted(used) == sorted(facts["numbers"])
        and signs <= set(facts["signs"])
        and set(results) <= {facts["target"]}
    )
    return Verdict.RIGHT if right else Verdict.WRONG


def _read(text: str) -> tuple[Fraction | None, list[int], set[str]] | None:
    """Returns an expression's value (None where it divides by 0), its numbers and signs; None for any other text."""
    if len(text) > _LONGEST or not re.fullmatch(r"[0-9+*/() -]+", text):
        return None
    used: list[int] = []
    signs: set[str] = set()

    def value(node: ast.expr) -> Fraction | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            used.append(node.value)
            return Fraction(node.value)
        if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATIONS:
            raise ValueError
        sign, operation = _OPERATIONS[type(node.op)]
        signs.add(sign)
        left, right = value(node.left), value(node.right)
        if left is None or right is None or (sign == "/" and right == 0):
            return None
        return operation(left, right)

    try:
        return value(ast.parse(text, mode="eval").body), used, signs
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# The answer is an expression of the numbers, the signs and brackets, with `= the number` after it, `the number =`
# before it, or neither. All numbers are used, each as often as it is there. Difficulties: 1, three numbers to 20 with +
# and -; 2, with * too; 3, four numbers to 30; 4, six to 50 with /. There are tens of thousands of problems of the
# first, of the others more than a million.
COUNTDOWN = CheckedTask("countdown", 4, _problem, _judge)
