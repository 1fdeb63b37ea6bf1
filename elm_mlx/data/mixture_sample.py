"""A look at a mixture before a run: what the filters drop, how the sources mix, how fast it is prepared.

Knows nothing of how that is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from elm_mlx.data.filters import Filters
from elm_mlx.data.mixture import Counts
from elm_mlx.data.stream import Reading, TextBatches
from elm_mlx.data.text_sources import Source
from elm_mlx.errors import InputError

_ROW = 1024


@dataclass(frozen=True)
class Part:
    """One source in a sample.

    Attributes:
        counts: of its first epoch.
        wanted, share: of the mixture's tokens, from 0 to 1: as the weights say, and as it was. A source that ended
            before others began again, and its every token counts here.
    """

    source: Source
    counts: Counts
    wanted: float
    share: float


@dataclass(frozen=True)
class Sample:
    """What a look at a mixture found.

    Attributes:
        tokens: that were found, from its beginning, each once.
        seconds: that took, with all workers; without their start, and without looking for duplicates.
        opening_seconds: what came before: finding files, looking for duplicates, starting the workers.
        whole: whether it was every source's every document, at least once.
    """

    parts: list[Part]
    tokens: int
    seconds: float
    opening_seconds: float
    whole: bool

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def sample(
    sources: Sequence[Source],
    tokenizer: Path,
    filters: Filters,
    reading: Reading,
    tokens: int = 1 << 20,
    *,
    cache: Path | None = None,
    on_wrong: Callable[[str], None] = lambda line: None,
) -> Sample:
    """Prepares `tokens` of the mixture as a run would; fewer if that is all there is.

    Args:
        reading: of the run. What can't be read is counted, and never stops a look.

    Raises:
        InputError, ElmError: as `TextBatches`.
    """
    if tokens < 1:
        raise InputError(f"a sample has at least 1 token, not {tokens}")
    look = replace(
        reading, rows=1, length=_ROW, window=_ROW, shards=1, segments=False, max_bad=1 << 60, max_broken=1 << 60
    )
    begun = time.perf_counter()
    with TextBatches(sources, tokenizer, filters, look, cache=cache, on_wrong=on_wrong) as batches:
        next(batches)
        started = time.perf_counter()
        first = sum(counts.tokens for counts in batches.counts())
        while not (whole := all(counts.epoch > 0 for counts in batches.counts())):
            if sum(counts.tokens for counts in batches.counts()) >= tokens:
                break
            next(batches)
        seconds = time.perf_counter() - started
        mixed, once = batches.counts(), batches.first_epochs()
    prepared, weights = sum(counts.tokens for counts in mixed), sum(source.weight for source in sources)
    parts = [
        Part(source, counts, source.weight / weights, repeated.tokens / prepared)
        for source, counts, repeated in zip(sources, once, mixed, strict=True)
    ]
    total = sum(counts.tokens for counts in once)
    return Sample(parts, total, seconds * total / max(1, prepared - first), started - begun, whole)
