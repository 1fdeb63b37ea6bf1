"""A model that guesses one of three numbers, and the task that it is right at in one case of three, or never."""

from __future__ import annotations

from pathlib import Path

import tiny

from elm_mlx.text.tokenizer import Tokenizer

TASK = """
from random import Random

from elm_mlx.problems.checked_task import Problem, Verdict

DIFFICULTIES = 2  # the second asks for what is never guessed


def problem(difficulty, seed):
    number = Random(f"{difficulty} {seed}").randrange(9000)
    return Problem(f"Which of three is number {number}?\\n", str(number % 3 + (1 if difficulty == 1 else 7)))


def judge(problem, answer):
    if len(answer) != 1:
        return Verdict.UNREADABLE
    return answer == problem.solution
"""


def write(directory: Path, tokenizer_file: Path, ends: float = 0.9) -> tuple[Path, Path]:
    """Writes the model's directory and the task's file; `ends` is the chance that an answer ends after a guess."""
    model = tiny.guessing_model(Tokenizer.load(tokenizer_file), "123", ends)
    task = directory / "guess.py"
    directory.mkdir(parents=True, exist_ok=True)
    task.write_text(TASK)
    return tiny.write_directory(directory / "model", model, tokenizer_file.read_bytes()), task
