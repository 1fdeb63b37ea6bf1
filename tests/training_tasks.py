"""A task for tiny models of random weights: an answer is right with a vowel in it, which is often."""

from __future__ import annotations

from pathlib import Path

LETTER_TASK = """
import random

from elm_mlx.problems.checked_task import Problem

WORDS = "the quick brown fox jumps over lazy dogs while an old king told stories of cafes".split()
DIFFICULTIES = 2


def problem(difficulty, seed):
    draw = random.Random(seed)
    return Problem(" ".join(draw.choices(WORDS, k=2 + difficulty)), "e")


def judge(problem, answer):
    return any(vowel in answer for vowel in "aeiou")
"""


def write_task(path: Path) -> Path:
    path.write_text(LETTER_TASK)
    return path
