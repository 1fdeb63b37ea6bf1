"""Which difficulty the next problems have: mostly those that the model solves sometimes.

Problems come in batches of 32. The first batch has the difficulties in turn. After each, a difficulty whose answers so
far were right in one case of eight to seven of eight counts 8, every other one 1, and problems are drawn in this
proportion: from what is never or always right there is little to learn, but a look now and then shows whether that
is still so. One with fewer than 16 answers counts 8 too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from elm_mlx.selfplay.answer_record import RecordedProblem

BATCH = 32  # problems
LEAST, MOST = 1 / 8, 7 / 8  # shares of right answers between which there is something to learn

_OFTEN, _RARE = 8, 1
_KNOWN = 16  # answers, from which on a difficulty's share of right ones counts


def chosen_difficulties(
    difficulties: Sequence[int], before: Sequence[RecordedProblem], seed: int, first: int
) -> list[int]:
    """Returns the difficulties of the batch that begins with problem `first`; the same for the same arguments.

    Args:
        before: the problems of the batches before.
    """
    numbers = range(first, first + BATCH)
    if not before:
        return [difficulties[place % len(difficulties)] for place in range(BATCH)]
    counts = {difficulty: [0, 0] for difficulty in difficulties}
    for problem in before:
        own = counts.get(problem.difficulty, [0, 0])  # which a damaged record may have otherwise
        own[:] = map(sum, zip(own, problem.count, strict=True))
    weights = [
        _OFTEN if answers < _KNOWN or LEAST <= right / answers <= MOST else _RARE for right, answers in counts.values()
    ]
    return [random.Random(f"{seed}/difficulty/{n}").choices([*counts], weights)[0] for n in numbers]
