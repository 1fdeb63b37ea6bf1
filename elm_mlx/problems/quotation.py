"""The task to quote a sentence of a passage word by word, as an answer that cites its source must.

The sentences are those of the excerpts that models are calibrated on, so no loss is measured on them.
"""

from __future__ import annotations

import functools
import random
import re

from elm_mlx.problems.checked_task import CheckedTask, Problem, Verdict
from elm_mlx.problems.final_line import denied, final_line
from elm_mlx.text import excerpts

_QUOTES = str.maketrans("“”", '""')
_SENTENCE = re.compile(r"[A-Z][a-z, ;:A-Z'-]{20,120}[a-z]{3}[.!?]")  # which does not end with `Mr.`


@functools.cache
def _sentences() -> tuple[str, ...]:
    """Returns every sentence that is one by itself, without what is quoted or in brackets."""
    parts = (
        part
        for line in excerpts.calibration(None).content.split("\n")
        for part in re.split(r"(?<=[a-z]{3}[.!?])\s+(?=[A-Z])", line.strip())
    )
    return tuple(dict.fromkeys(part for part in parts if _SENTENCE.fullmatch(part)))


def _words(sentence: str) -> set[str]:
    return {word for word in re.findall(r"[a-z]+", sentence.lower()) if len(word) > 3}


def _problem(difficulty: int, seed: int) -> Problem:
    draw = random.Random(f"quotation/{difficulty}/{seed}")
    count = {1: 2, 2: 4, 3: 8, 4: 8}[difficulty]
    while True:
        passage = draw.sample(_sentences(), count)
        marked = draw.randrange(count - (difficulty == 4))
        others = " ".join(passage[:marked] + passage[marked + 1 :]).lower()
        own = sorted(word for word in _words(passage[marked]) if word not in others)
        if own:
            break
    word = draw.choice(own)
    which = (
        f"the sentence after the one with the word {word}" if difficulty == 4 else f"the sentence with the word {word}"
    )
    right = passage[marked + (difficulty == 4)]
    return Problem(f"{' '.join(passage)}\nQuote {which}.\n", right, {"right": right})


def _judge(problem: Problem, answer: str) -> Verdict:
    line = " ".join((final_line(answer) or "").translate(_QUOTES).split()).strip("'")
    if not line:
        return Verdict.UNREADABLE
    before, begun, quoted = line.partition('"')
    if not (begun and line.endswith('"')):
        before, quoted = "", line
    given, right = quoted.removesuffix('"').removesuffix("."), problem.facts["right"].removesuffix(".")
    if given.endswith(f": {right}"):
        before, given = f"{before}{given.removesuffix(right)}", right
    return Verdict.RIGHT if given == right and not denied(before) else Verdict.WRONG


# The answer is its final line: all of it, what is in quotation marks at its end, or what follows a colon.
# Difficulties: 1, of two sentences the one with a word (75,974 problems); 2, of four; 3, of eight; 4, of eight the one
# after that. The passages are drawn from 76 sentences, so what can be learned from them is to quote, not what is said
# there.
QUOTATION = CheckedTask("quotation", 4, _problem, _judge)
