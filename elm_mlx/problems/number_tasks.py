"""Tasks about whole numbers: arithmetic.

An answer is what `final_line` reads: the last line counts.
"""

from __future__ import annotations

import random

from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.final_line import number


def _sum_or_difference(draw: random.Random, below: int, signs: str) -> tuple[str, int]:
    a, b, sign = draw.randrange(below), draw.randrange(below), draw.choice(signs)
    if sign == "+":
        return f"{a} + {b}", a + b
    a, b = max(a, b), min(a, b)
    return f"{a} - {b}", a - b


def _arithmetic(difficulty: int, seed: int) -> Problem:
    draw = random.Random(f"arithmetic/{difficulty}/{seed}")
    if difficulty == 1:
        asked, result = _sum_or_difference(draw, 100, "+")
    elif difficulty == 2:
        asked, result = _sum_or_difference(draw, 100, "+-")
    elif difficulty == 3:
        asked, result = _sum_or_difference(draw, 1000, "+-")
    elif difficulty == 4:
        a, b = draw.randrange(10, 1000), draw.randrange(2, 10)
        asked, result = f"{a} * {b}", a * b
    else:
        a, b, c = draw.randrange(2, 100), draw.randrange(2, 100), draw.randrange(2, 10)
        asked, result = draw.choice([(f"{a} + {b} * {c}", a + b * c), (f"({a} + {b}) * {c}", (a + b) * c)])
    return Problem(f"What is {asked}?\n", str(result), {"result": result})


def _same_number(problem: Problem, answer: str) -> Verdict:
    given = number(answer)
    if given is None:
        return Verdict.UNREADABLE
    return Verdict.RIGHT if given == problem.facts["result"] else Verdict.WRONG


# Difficulties: 1, sums of numbers below 100 (10,000 problems); 2, their differences too (15,050); 3, both of numbers
# below 1,000 (1.5 million); 4, products of a number below 1,000 and one digit (7,920); 5, three numbers with a sum and
# a product (153,664).
ARITHMETIC = CheckedTask("arithmetic", 5, _arithmetic, _same_number)
