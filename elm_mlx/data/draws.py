"""Random order, and draws: which examples of several sources an epoch has, so that shares of tokens are as weights ask.

Random bits come from Philox, whose stream is fixed for all versions of NumPy, and sorting by them shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from elm_mlx.errors import InputError

_LAPS = 1 << 48  # streams of random bits, beyond those of epochs

Numbers = npt.NDArray[np.intp]


def random_bits(seed: int, stream: int) -> np.random.Philox:
    """Returns a generator of bits that are the same for all versions of NumPy."""
    return np.random.Philox(key=np.array([seed & (2**64 - 1), stream], np.uint64))


def shuffled(bits: np.random.Philox, count: int) -> npt.NDArray[np.intp]:
    """Returns the numbers below `count` in random order."""
    return np.argsort(bits.random_raw(count), kind="stable")


class Draws:
    """The examples of each epoch, by the weights of the sources that they are of.

    An epoch has as many tokens of a source as its weight asks for where the source that is the longest for its weight
    is in it once. The others are in it whole as often as that goes, and with some more examples, in each epoch those
    that follow on the last one's, in an order by the seed. So every example is in every epoch, and over epochs none of
    a source is more often there than another, but for one time.

    Args:
        counts: examples of each source; those of one follow one another.
        weights: the share of a source's tokens, in relation to the others' weights.
        tokens: of each example.
        seed: of the order of what more there is.

    Raises:
        InputError: there is not a weight above 0 for each source.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], tokens: Numbers, seed: int) -> None:
        if len(weights) != len(counts):
            raise InputError(f"--weight: {len(weights)} for {len(counts)} of --data: give as many, in the same order")
        if not all(0 < weight < float("inf") for weight in weights):
            raise InputError(f"--weight: must be above 0, not {min(weights):g}")
        ends = [0, *accumulate(counts)]
        self._parts = [range(start, end) for start, end in pairwise(ends)]
        self._tokens, self._seed = tokens, seed
        self.totals = [int(tokens[part.start : part.stop].sum()) for part in self._parts]
        most = max(total / weight for total, weight in zip(self.totals, weights, strict=True))
        self.wanted = [max(total, round(most * w)) for total, w in zip(self.totals, weights, strict=True)]

    def __call__(self, epoch: int) -> Numbers:
        """Returns the numbers of an epoch's examples, source by source."""
        return np.concatenate([self._of(source, epoch) for source in range(len(self._parts))])

    def _of(self, source: int, epoch: int) -> Numbers:
        part, total = self._parts[source], self.totals[source]
        whole, more = divmod(self.wanted[source], total)
        found = [np.arange(part.start, part.stop)] * whole
        begin, end = epoch * more, (epoch + 1) * more  # of the tokens of all laps through the source, one after another
        for lap in range(begin // total, -(-end // total)):
            order = part.start + shuffled(random_bits(self._seed, _LAPS + (source << 32) + lap), len(part))
            starts = lap * total + np.cumsum(self._tokens[order]) - self._tokens[order]
            found.append(order[(begin <= starts) & (starts < end)])
        return np.concatenate(found)
