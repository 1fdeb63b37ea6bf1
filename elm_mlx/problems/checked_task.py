"""A task whose answers a program checks: it makes problems at a difficulty from a seed, and judges a model's answers.

Judging needs no model and no network. The built-in tasks are `built_in.TASKS`; `load_task` also takes a user's file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Verdict(Enum):
    """What a task says of an answer."""

    RIGHT = "right"
    WRONG = "wrong"
    UNREADABLE = "unreadable"  # there is no answer in it that could be right or wrong


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        prompt: what the model is asked, as a user's message or, for a model without a chat template, the text before
            the answer. It ends with a line's end, so that an answer begins a line.
        solution: one right answer, as a model should write it; what a first fine-tuning trains on. Empty where none is
            known.
        facts: what `judge` needs beyond the prompt, of JSON's kinds.
    """

    prompt: str
    solution: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckedTask:
    """A task: problems and their judge.

    Attributes:
        name: as it is given to `--task`.
        difficulties: they run from 1 to this.
        problem: makes one of a difficulty and a seed; the same two give the same problem on every machine.
        judge: says whether an answer to a problem is right. It gets the model's text as it was generated, without the
            tokens that end it, and has a verdict on any text, after a bounded time.
    """

    name: str
    difficulties: int
    problem: Callable[[int, int], Problem]
    judge: Callable[[Problem, str], Verdict]
