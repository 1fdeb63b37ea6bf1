"""The pace at which prompts are read while answers are decoded: nobody's stream stops for another's long prompt."""

from __future__ import annotations

import math
import time


class ReadingPace:
    """How much of a prompt is computed between two steps: what takes as long as a few of them.

    A piece is one graph, and of a graph MLX computes what it is asked for. So a piece may be long, as a processor likes
    it, and its bits are the same, however it is cut. Work is counted in layers times tokens.
    """

    _STEPS = 2.0  # for each prompt that is read or waits: while many wait, few answers share a step
    _LONGEST = 0.25  # seconds at most, unless two steps take longer: a reader hardly notices
    _MEASURED = 32  # rounds after which the time of a step alone is taken again

    def __init__(self) -> None:
        self._step = self._unit = math.inf  # seconds, about
        self._ended: float | None = None  # when the round before did
        self._done = 0  # work since
        self._left = -1  # rounds until the next measurement; the first step is compiled, so its time means nothing
        self._seconds = 0.0

    def round(self, running: bool, waiting: int) -> None:
        """Begins a round after its step was taken; `waiting` prompts are to be read."""
        now, before, done = time.perf_counter(), self._ended, self._done
        self._ended, self._done = now if running else None, 0
        if before is not None and running:
            if done:
                seconds = now - before  # of which reading took some, even where the step seems to have taken all
                self._unit = _average(self._unit, max(0.2 * seconds, seconds - self._step) / done)
                self._left = max(0, self._left - 1)
            elif self._left < 0:
                self._left += 1
            else:
                self._step = _average(self._step, now - before)
                self._left = self._MEASURED
        self._seconds = max(self._STEPS * self._step, min(self._STEPS * self._step * waiting, self._LONGEST))

    def layers(self, tokens: int) -> int:
        """Returns how many layers of a piece of so many `tokens` to compute in what is left of this round."""
        if self._left <= 0:  # the time of a step is to be taken first
            return 0
        if self._unit == math.inf:
            return 0 if self._done else 1
        return max(0 if self._done else 1, int((self._seconds / max(self._unit, 1e-9) - self._done) / tokens))

    def computed(self, layers: int, tokens: int) -> None:
        """Counts what was asked for."""
        self._done += layers * tokens


def _average(before: float, now: float) -> float:
    """Returns the average with another value, which other programs, or a step that is compiled, may have disturbed."""
    return now if before == math.inf else before + 0.3 * (min(max(now, before / 2), before * 2) - before)
