"""The task to close brackets: what a stack does, and a language model must do without one."""

from __future__ import annotations

import random

from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.final_line import said

_CLOSES = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _problem(difficulty: int, seed: int) -> Problem:
    draw = random.Random(f"brackets/{difficulty}/{seed}")
    kinds, shortest, longest, deepest = {
        1: ("([", 6, 10, 4),
        2: ("([{", 8, 16, 5),
        3: ("([{<", 16, 32, 8),
        4: ("([{<", 32, 64, 12),
    }[difficulty]
    length = draw.randint(shortest, longest)
    shown: list[str] = []
    still_open: list[str] = []
    while len(shown) < length or not still_open:  # one more where all are closed
        if not still_open or (len(still_open) < deepest and draw.random() < 0.6):
            still_open.append(draw.choice(kinds))
            shown.append(still_open[-1])
        else:
            shown.append(_CLOSES[still_open.pop()])
    right = [_CLOSES[each] for each in reversed(still_open)]
    prompt = f"Write the brackets that close these: {' '.join(shown)}\n"
    return Problem(prompt, " ".join(right), {"right": "".join(right)})


def _judge(problem: Problem, answer: str) -> Verdict:
    # `=` is no part of an answer: the arrow `=>` has a bracket in it that was not given.
    given = "".join((said(answer, equation=True) or "").split())
    if not given or set(given) - {*_CLOSES, *_CLOSES.values()}:
        return Verdict.UNREADABLE
    return Verdict.RIGHT if given == problem.facts["right"] else Verdict.WRONG


# The answer has nothing but the brackets that are missing, with spaces or without.
# Difficulties: 1, 6 to 11 brackets of two kinds, at most four open (19,408 problems); 2, 8 to 17 of three kinds, five
# open; 3, 16 to 33 of four kinds, eight open; 4, 32 to 65, twelve open.
BRACKETS = CheckedTask("brackets", 4, _problem, _judge)
