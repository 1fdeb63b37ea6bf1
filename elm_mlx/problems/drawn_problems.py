"""Problems drawn from a task: endless ones to train on, and the held-out ones that training never sees.

Which side a problem is on, its own prompt says: one prompt in eight is held out, by its hash. So no seed, run, command
or order of difficulties brings a held-out problem into training, and all that is measured on a task's held-out problems
can be compared.
"""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Container, Sequence
from dataclasses import dataclass

from elm_mlx.errors import InputError
from elm_mlx.problems.checked_task import CheckedTask, Problem

_HELD_OUT = 8  # one prompt in so many
_TRIES = 1000  # draws in a row without a problem that will do, after which a difficulty has none left


@dataclass(frozen=True)
class DrawnProblem:
    """A problem, its number among those drawn, and its difficulty.

    Attributes:
        passed_over: of one to train on, how many were drawn before it in vain, for they are held out.
    """

    number: int
    difficulty: int
    problem: Problem
    passed_over: int = 0


def normalized(prompt: str) -> str:
    """Returns what two prompts have in common that differ in case, white space or compatible characters alone."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def is_held_out(prompt: str) -> bool:
    """Tells whether a prompt is on the held-out side."""
    return hashlib.sha256(normalized(prompt).encode("utf-8", "surrogatepass")).digest()[0] < 256 // _HELD_OUT


def training_problem(
    task: CheckedTask, difficulties: Sequence[int], seed: int, number: int, left_out: Container[str] = ()
) -> DrawnProblem:
    """Returns problem `number` of a seed: the same at each call, whichever were drawn before.

    Args:
        difficulties: to choose one of.
        left_out: normalized prompts that are not to be trained on either.

    Raises:
        InputError: a difficulty has no problem to train on.
    """
    stream = random.Random(f"{seed}/train/{number}")
    difficulty = stream.choice(difficulties)
    for passed_over in range(_TRIES):
        problem = task.problem(difficulty, stream.getrandbits(32))
        if not is_held_out(problem.prompt) and normalized(problem.prompt) not in left_out:
            return DrawnProblem(number, difficulty, problem, passed_over)
    raise InputError(
        f"task {task.name}, difficulty {difficulty}: {_TRIES:,} draws gave no problem that is not held out; "
        "choose others by --difficulty"
    )


def held_out_problems(task: CheckedTask, difficulties: Sequence[int], count: int) -> list[DrawnProblem]:
    """Returns up to `count` held-out problems with different prompts, the difficulties in turn.

    They depend on the task and difficulties alone, and the first ones are the same for any count, so that two runs are
    measured on the same problems. There are fewer where a difficulty has no more of them.

    Raises:
        InputError: there is none.
    """
    streams = {difficulty: random.Random(f"held out/{difficulty}") for difficulty in difficulties}
    drawn: list[DrawnProblem] = []
    seen = set[str]()
    while streams and len(drawn) < count:
        for difficulty, stream in [*streams.items()][: count - len(drawn)]:
            found = _unseen(task, difficulty, stream, seen)
            if found is None:
                del streams[difficulty]
            else:
                drawn.append(DrawnProblem(len(drawn), difficulty, found))
    if not drawn:
        raise InputError(
            f"task {task.name}: has no problem to hold out among the difficulties asked for; "
            "choose more of them by --difficulty"
        )
    return drawn


def _unseen(task: CheckedTask, difficulty: int, stream: random.Random, seen: set[str]) -> Problem | None:
    """Draws a held-out problem whose prompt is not in `seen`, and puts it there; None where none comes."""
    for _ in range(_TRIES):
        problem = task.problem(difficulty, stream.getrandbits(32))
        prompt = normalized(problem.prompt)
        if is_held_out(problem.prompt) and prompt not in seen:
            seen.add(prompt)
            return problem
    return None
