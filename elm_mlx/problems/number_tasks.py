"""Tasks about numbers and lists: arithmetic, comparison, sorting, counting.

Each asks for a number or a list of numbers, which is read from an answer's final line (`final_line` has the rule).
"""

from __future__ import annotations

import random

from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.final_line import number, numbers, said


def _verdict(given: object, right: object) -> Verdict:
    if given is None:
        return Verdict.UNREADABLE
    return Verdict.RIGHT if given == right else Verdict.WRONG


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


def _right_number(problem: Problem, answer: str) -> Verdict:
    return _verdict(number(answer), problem.facts["result"])


# Difficulties: 1, sums of numbers below 100 (10,000 problems); 2, their differences too (15,050); 3, both of numbers
# below 1,000 (1.5 million); 4, products of 10 to 999 and one digit (7,920); 5, a sum and a product (153,664).
ARITHMETIC = CheckedTask("arithmetic", 5, _arithmetic, _right_number)


def _comparison(difficulty: int, seed: int) -> Problem:
    draw = random.Random(f"comparison/{difficulty}/{seed}")
    word, choose = draw.choice([("greater", max), ("smaller", min)])
    if difficulty == 1:
        shown = [str(each) for each in draw.sample(range(100), 2)]
    elif difficulty == 2:
        hundreds = draw.randrange(10, 100)
        shown = [f"{hundreds}{each:02}" for each in draw.sample(range(100), 2)]
    elif difficulty == 3:
        before, places = draw.randrange(100), draw.choice([2, 3])
        last = draw.randrange(1, 10)
        longer = draw.randrange(1, 10 ** (places - 1)) * 10 + last  # no 0 at its end
        shown = [f"{before}.{draw.randrange(1, 10)}", f"{before}.{longer:0{places}}"]
        draw.shuffle(shown)
    else:
        shown = [str(each) for each in draw.sample(range(1000), 5)]
        word = {"greater": "the greatest", "smaller": "the smallest"}[word]
    listed = f"{', '.join(shown[:-1])} or {shown[-1]}"
    right = choose(shown, key=float)
    return Problem(f"Which is {word}, {listed}?\n", right, {"right": right, "shown": shown})


def _right_choice(problem: Problem, answer: str) -> Verdict:
    given = said(answer)
    return _verdict(given if given in problem.facts["shown"] else None, problem.facts["right"])


# The answer is one of the numbers as it stands in the question. Difficulties: 1, two numbers below 100 (19,800
# problems, which a guess solves half of, as in 2 and 3); 2, two of four digits that differ in the last two (1.8
# million); 3, two decimals of which one has more places (3.5 million); 4, the greatest or smallest of five below 1,000.
COMPARISON = CheckedTask("comparison", 4, _comparison, _right_choice)


def _sorting(difficulty: int, seed: int) -> Problem:
    draw = random.Random(f"sorting/{difficulty}/{seed}")
    count, below = {1: (3, 100), 2: (5, 100), 3: (8, 1000), 4: (12, 1000)}[difficulty]
    shown = draw.sample(range(below), count)
    descending = difficulty > 2 and draw.random() < 0.5
    right = sorted(shown, reverse=descending)
    while shown == right:  # what is sorted already could be copied
        draw.shuffle(shown)
    order = "largest to smallest" if descending else "smallest to largest"
    return Problem(f"Sort from {order}: {_listed(shown)}\n", _listed(right), {"right": right})


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _right_list(problem: Problem, answer: str) -> Verdict:
    return _verdict(numbers(answer), problem.facts["right"])


# No number stands twice in a list, and no list is in order already. Difficulties: 1, three numbers below 100 (808,500
# problems); 2, five below 100; 3, eight below 1,000, up or down; 4, twelve.
SORTING = CheckedTask("sorting", 4, _sorting, _right_list)


def _counting(difficulty: int, seed: int) -> Problem:
    draw = random.Random(f"counting/{difficulty}/{seed}")
    shortest, longest = {1: (5, 7), 2: (8, 12), 3: (8, 12), 4: (16, 24)}[difficulty]
    length = draw.randint(shortest, longest)
    count = draw.randint(0, length)  # each count as often as another: no constant is a good guess
    letter, *others = draw.sample("abcdefghijklmnopqrstuvwxyz", 4)
    shown = [letter] * count + draw.choices(others, k=length - count)
    draw.shuffle(shown)
    where = f"the word {''.join(shown)}" if difficulty > 2 else f"this list: {' '.join(shown)}"
    return Problem(f"How many times is the letter {letter} in {where}\n", str(count), {"result": count})


# Difficulties: 1, in a list of 5 to 7 letters; 2, of 8 to 12; 3, in a word of 8 to 12, whose letters a tokenizer
# joins; 4, of 16 to 24. There are more than a million problems of each.
COUNTING = CheckedTask("counting", 4, _counting, _right_number)
