"""pass@k: the probability that at least one of k answers to a problem is right, estimated from n sampled answers each.

The estimate is the unbiased one of Chen et al., 2021 (arXiv 2107.03374, section 2.1): the share of all choices of k
among the n answers that hold a right one. 1 - (1 - c/n)^k would be too low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # of a normal distribution, 95 % lie within so many standard deviations

Count = tuple[int, int]  # of a problem: right answers, and all answers


@dataclass(frozen=True)
class PassRate:
    """pass@k over problems.

    Attributes:
        rate: the mean of the problems' estimates, between 0 and 1.
        low, high: the 95 % interval of what the mean over all problems of this kind would be.
        problems: how many it is the mean of.
    """

    k: int
    rate: float
    low: float
    high: float
    problems: int

    def __str__(self) -> str:
        return f"pass@{self.k} {self.rate:.1%} ({self.low:.1%} to {self.high:.1%})"


def pass_at_k(right: int, answers: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k for one problem, of whose `answers` so many are right.

    Raises:
        ValueError: k is not from 1 to `answers`, or `right` not from 0 to `answers`.
    """
    if not (1 <= k <= answers and 0 <= right <= answers):
        raise ValueError(f"pass@{k} of {answers} answers, {right} of them right")
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def pass_rate(counts: Sequence[Count], k: int) -> PassRate:
    """Returns pass@k over problems, each with its right answers and all of them.

    The interval is Wilson's with the effective number of problems (Korn and Graubard, 1998): as many as would make a
    share of right and wrong problems vary as much as the estimates do. So it needs no resampling, stays between 0 and
    1, has a width where all problems are solved or none is, and for one answer to a problem is Wilson's own. It is at
    most as narrow as if all answers were to different problems.

    Raises:
        ValueError: there is no problem, or as `pass_at_k`.
    """
    if not counts:
        raise ValueError("pass@k of no problems")
    estimates = [pass_at_k(right, answers, k) for right, answers in counts]
    number = len(estimates)
    rate = math.fsum(estimates) / number
    variance = math.fsum((each - rate) ** 2 for each in estimates) / number
    most = sum(answers for _, answers in counts)
    even = rate * (1 - rate)  # the variance if each problem were solved for certain, or never
    size = number if even == 0 else min(most, number * even / variance) if variance > 0 else most
    middle = (rate + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z * math.sqrt(even / size + _Z**2 / (4 * size**2)) / (1 + _Z**2 / size)
    return PassRate(k, rate, max(0.0, middle - half), min(1.0, middle + half), number)
