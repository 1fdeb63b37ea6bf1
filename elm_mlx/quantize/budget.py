"""Which of several choices each item gets, so that all costs fit a budget and the losses' sum is least.

Knows integers and floats, and nothing of what they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STEPS = 50_000  # units that a budget is cut into


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """The choice of each item, by the multiple-choice knapsack's dynamic programme; None where nothing fits.

    Costs are counted in units of a `STEPS`th of what the budget leaves over the cheapest choices, rounded up: it is
    never exceeded, and the sum is the least but for what those roundings keep out. Takes items x choices x STEPS steps.

    Args:
        costs: of each item, of each of its choices.
        losses: in the same order.
        budget: what the chosen costs may sum to.
    """
    least = [min(of_item) for of_item in costs]
    spare = budget - sum(least)
    if spare < 0:
        return None
    unit = max(1, -(-spare // STEPS))
    room = spare // unit
    best = np.zeros(room + 1)  # the least loss of the items so far, within each room
    chosen = np.zeros((len(costs), room + 1), np.uint8)
    for i, (of_item, loss) in enumerate(zip(costs, losses, strict=True)):
        units = [-(-(cost - least[i]) // unit) for cost in of_item]
        after = np.full(room + 1, np.inf)
        for choice, (needed, lost) in enumerate(zip(units, loss, strict=True)):
            if needed > room:
                continue
            total = best[: room + 1 - needed] + lost
            better = total < after[needed:]
            after[needed:][better] = total[better]
            chosen[i, needed:][better] = choice
        best = after
    return _read_back(chosen, costs, least, unit)


def _read_back(chosen: np.ndarray, costs: Sequence[Sequence[int]], least: Sequence[int], unit: int) -> list[int]:
    room, choices = chosen.shape[1] - 1, []
    for i in reversed(range(len(costs))):
        choice = int(chosen[i, room])
        choices.append(choice)
        room -= -(-(costs[i][choice] - least[i]) // unit)
    return choices[::-1]
