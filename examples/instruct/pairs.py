"""Answers to pairs: of two answers to one question, the one that passes is chosen and the one that doesn't is rejected.

Knows answers and their verdicts; knows nothing of the model that gave them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice

from scores import Answer

PAIRS = 3  # of one question, so that the middling ones don't crowd out the others


def pairs(answers: Iterable[Answer], seed: int) -> Iterator[dict[str, str]]:
    """Records for `elm-mlx dpo`, of each question that was answered both ways; no answer is in two pairs."""
    draw, by_question = random.Random(seed), defaultdict[str, dict[str, bool]](dict)
    for answer in answers:
        if answer.text:
            by_question[answer.prompt][answer.text] = answer.verdict.passes
    for question, verdicts in by_question.items():
        chosen = [text for text, passes in verdicts.items() if passes]
        rejected = [text for text, passes in verdicts.items() if not passes]
        draw.shuffle(chosen)
        draw.shuffle(rejected)
        for good, bad in islice(zip(chosen, rejected, strict=False), PAIRS):
            yield {"prompt": question, "chosen": good, "rejected": bad}
