"""Examples before each question, drawn as LM Evaluation Harness draws them.

Knows how they are drawn and joined; nothing of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from elm_mlx.errors import InputError
from elm_mlx.evaluate.questions import Question
from elm_mlx.evaluate.tasks import Chosen

_SEED = 1234  # the harness' own
_BETWEEN = "\n\n"


def before(chosen: Chosen, questions: Sequence[Question], pool: Sequence[Question] | None) -> list[str]:
    """What stands before each of a task's first questions: its description, and examples with their answers.

    Draws are made one question after the other from one generator, so the first N questions have the same examples
    whether or not others follow.

    Raises:
        InputError: there are too few to draw from.
    """
    task, shots = chosen.task, chosen.shots
    if not shots:
        return [task.description] * len(questions)
    assert pool is not None
    wanted = shots + task.leaves_out
    if len(pool) < wanted:
        raise InputError(f"{task.name}: {wanted} examples are to be drawn, and there are {len(pool)}")
    draw = random.Random(_SEED)
    texts = []
    for question in questions:
        drawn = list(pool[:shots]) if task.first_examples else [pool[i] for i in draw.sample(range(len(pool)), wanted)]
        if task.leaves_out:
            drawn = [each for each in drawn if each != question]
        texts.append(task.description + "".join(each.example + _BETWEEN for each in drawn[:shots]))
    return texts
