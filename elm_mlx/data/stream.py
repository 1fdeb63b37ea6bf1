"""Batches for pretraining: raw text from a mixture of sources, filtered, encoded, packed and shuffled as it is read.

Documents are packed end to end into rows, and rows are shuffled in blocks of a bounded number of tokens: so a document
of any length is spread, and memory doesn't depend on the data. The order is a function of the seed, the epoch, the
files and the number of shards; how many workers encode, and on how many machines, doesn't matter.

A shard is a stream of its own, with its own share of the documents. Shards take turns to give a batch's rows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elm_mlx.data import duplicates
from elm_mlx.data.batches import Batch, check_identity
from elm_mlx.data.draws import random_bits, shuffled
from elm_mlx.data.filters import Filters
from elm_mlx.data.likeness import Ids, Likeness, spread
from elm_mlx.data.mixture import Counts, Feed, Mixture, ahead, ids_of
from elm_mlx.data.text_sources import Position, Raw, TextFiles, TextSource
from elm_mlx.data.workers import Encode, Pool
from elm_mlx.errors import InputError
from elm_mlx.reading import counted
from elm_mlx.text.tokenizer import Tokenizer

_FILES = 1 << 63  # random streams from here on are of files' order, those below of rows'
_SAMPLE_ROW = 1024  # tokens


@dataclass(frozen=True)
class Reading:
    """The way in which a mixture is read.

    Args:
        rows: of one process's batch.
        length: positions of a row.
        seed: of the order.
        window: tokens that are shuffled with one another; at least a batch is.
        segments: let attention keep to a document. Otherwise a row is one text, as in the paper.
        shards: streams that the documents are dealt to; a multiple of the number of processes, which is the default.
            What is read, and in which order, stays the same as long as it and all processes' rows together do.
        workers: processes that encode; 0 to do it in this one.
        max_bad: records, and
        max_broken: files that cannot be read before the run stops, in each process.
    """

    rows: int
    length: int
    seed: int = 0
    window: int = 1 << 20
    segments: bool = False
    shards: int | None = None
    workers: int = 1
    max_bad: int = 100
    max_broken: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "length", "window"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("workers", "max_bad", "max_broken"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, not {getattr(self, name)}")


class TextBatches:
    """An endless iterator of batches of full rows; all targets are trained. To be closed, which ends the workers.

    Args:
        tokenizer: a SentencePiece model, or a model directory.
        rank, world: this process's number, and how many there are. Each takes every `world`th row of batches of
            `world * rows`, so that together they read what one process with that many rows (and as many shards) would.
        cache: where `duplicates` keeps hashes; None for nowhere.
        on_wrong: called with a line for each record and file that cannot be read.
        gather: gives the list of every process's argument; with several of them, so that one's `state` is all's.

    Raises:
        InputError: a source, the tokenizer or a number won't do.
        ElmError: a package that a source needs is not installed.
    """

    def __init__(
        self,
        sources: Sequence[TextSource],
        tokenizer: Path,
        filters: Filters,
        reading: Reading,
        *,
        rank: int = 0,
        world: int = 1,
        cache: Path | None = None,
        on_wrong: Callable[[str], None] = lambda line: None,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ) -> None:
        if not sources:
            raise InputError("the mixture has no sources")
        self._shards = world if reading.shards is None else reading.shards
        self._rows = reading.rows * world
        if not 0 <= rank < world or self._shards < 1 or self._shards % world or self._rows % self._shards:
            raise InputError(
                f"{self._shards} shards won't do: their number is a multiple of the {world} processes, and divides "
                f"the {self._rows} rows of a batch"
            )
        model = Tokenizer.load(tokenizer)
        self._reading, self._world, self._rank = reading, world, rank
        self._on_wrong, self._gather = on_wrong, gather
        self._files = [TextFiles(source) for source in sources]
        trusted = None if filters.like is None else TextFiles(TextSource(filters.like))
        self._trusted = trusted
        self._identity = {
            "seed": reading.seed, "rows of a batch": self._rows, "row length": reading.length, "window": reading.window,
            "segments": reading.segments, "shards": self._shards, "filters": _identity(filters, trusted),
            "tokenizer": hashlib.sha256(model.path.read_bytes()).hexdigest(),
            "weights": [source.weight for source in sources], "data": [files.fingerprint() for files in self._files],
        }  # fmt: skip
        batch = self._rows // self._shards  # rows of a shard's part of a batch
        self._batches = max(1, reading.window // (self._rows * reading.length))  # in a block
        self._block = self._at = 0  # the next batch: its block, and its place there
        self._taken: list[tuple[npt.NDArray[Any], ...]] | None = None  # the block's ids, starts and order, by shard
        self._pool = Pool(reading.workers, model.path, filters)
        try:
            marks = duplicates.find(self._files, self._pool, cache) if filters.duplicates else None
            alike = self._likenesses(trusted, marks, filters.like_share) if trusted else None
            size = self._batches * batch * reading.length + 1
            self._own = range(rank, self._shards, world)
            self._mixtures = [Mixture(self._feeds(shard, marks, alike), size) for shard in self._own]
        except BaseException:
            self.close()
            raise
        self._begun = self._next = self._positions()

    @property
    def fingerprint(self) -> str:
        """A hash of all that the batches depend on, but for `rank` and `world`."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    def sampled_content(self) -> str:
        """A hash of parts of each file, the trusted ones' too: other texts of the same names and sizes have another."""
        files = [*self._files, *([] if self._trusted is None else [self._trusted])]
        return hashlib.sha256("".join(each.sampled_content() for each in files).encode()).hexdigest()[:16]

    @property
    def under_way(self) -> bool:
        """True once a batch has been read, since `resume` if that was called."""
        return self._taken is not None

    def counts(self) -> list[Counts]:
        """Returns each source's counts, in this process, up to the end of the block under way."""
        return _totals(self._counts())

    def first_epochs(self) -> list[Counts]:
        """Returns `counts` of each source's first epoch alone; of batches that were not resumed."""
        shards = zip(self._counts(), self._mixtures, strict=True)
        return _totals(
            [
                [counts if counts.epoch == 0 else feed.first or counts
                 for counts, feed in zip(lane, mixture.feeds, strict=True)]
                for lane, mixture in shards
            ]
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Returns the position as JSON's types, which `resume` takes. All processes call it at once."""
        block, at, lanes = self._block, self._at, self._begun
        if at == self._batches:
            block, at, lanes = block + 1, 0, self._next
        every = {name: lane for part in self._gather(lanes) for name, lane in part.items()}
        return {"block": block, "batch": at, "shards_at": every, **self._identity}

    def resume(self, state: dict[str, Any]) -> None:
        """Moves to where `state` was taken, of batches made by the same arguments but for `workers`.

        `world` may be another if `shards` and `world * rows` are the same.

        Raises:
            InputError: the state is of other data or other arguments, or is damaged.
        """
        check_identity(state, json.loads(json.dumps(self._identity)))
        try:
            block, at = int(state["block"]), int(state["batch"])
            if block < 0 or not 0 <= at < self._batches:
                raise ValueError
            for shard, mixture in zip(self._own, self._mixtures, strict=True):
                mixture.resume(state["shards_at"][str(shard)])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise InputError("cannot resume: the position in the data is damaged") from None
        self._block, self._at, self._taken = block, at, None
        self._begun = self._next = self._positions()

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> TextBatches:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> TextBatches:
        return self

    def __next__(self) -> Batch:
        """Raises InputError when too much cannot be read, ElmError when a worker came to its end."""
        if self._at == self._batches:
            self._block, self._at, self._taken, self._begun = self._block + 1, 0, None, self._next
        if self._taken is None:
            self._taken = [self._take(*each) for each in zip(self._own, self._mixtures, strict=True)]
            self._next = self._positions()
        self._at += 1
        batch = self._batch(self._at - 1, self._taken)
        for mixture in self._mixtures:
            mixture.fill(wait=False)
        return batch

    def _feeds(self, shard: int, marks: list[duplicates.Marks] | None, alike: list[Likeness] | None) -> list[Feed]:
        weights = sum(files.source.weight for files in self._files)
        feeds = []
        for number, files in enumerate(self._files):
            read = partial(self._read, number, marks, shard=shard, shards=self._shards)
            run_ahead = ahead(self._reading.workers, files.source.weight, weights)
            likeness = alike[number] if alike else None
            feeds.append(Feed(files.source, read, self._pool, run_ahead, self._wrong, likeness))
        return feeds

    def _read(
        self, number: int, marks: list[duplicates.Marks] | None, start: Position, shard: int = 0, shards: int = 1
    ) -> Iterator[Raw]:
        """Reads a source's documents from `start` on, without end."""
        order = partial(_file_order, self._reading.seed, number)
        skipped = partial(_is_marked, marks[number] if marks else [])
        return self._files[number].read(start, order, shard, shards, skipped)

    def _likenesses(self, trusted: TextFiles, marks: list[duplicates.Marks] | None, share: float) -> list[Likeness]:
        """Returns each source's likeness to the trusted texts, by a sample of what is read of it first."""
        wanted = self._sample(trusted, trusted.read(Position(), lambda epoch, count: range(count)), 1)
        corpora = [self._sample(files, self._read(i, marks, Position()), 2) for i, files in enumerate(self._files)]
        return [Likeness(wanted, corpus, share) for corpus in corpora]

    def _sample(self, files: TextFiles, documents: Iterator[Raw], least: int) -> list[Ids]:
        """Returns the ids of documents that the other filters keep. Raises InputError for fewer than `least`."""
        first = itertools.takewhile(lambda raw: raw.position.epoch == 0, documents)
        contents = spread(raw.content for raw in first if isinstance(raw.content, bytes | str))
        outcomes = self._pool.submit(Encode(contents, files.source.key)).result()
        kept = [ids_of(outcome) for outcome in outcomes if isinstance(outcome, bytes)]
        if len(kept) < least:
            many = f"{len(kept)} of {counted(len(contents), 'document')}"
            raise InputError(f"{files.source.name}: the other filters keep {many}, and filters.like needs {least}")
        return kept

    def _counts(self) -> list[list[Counts]]:
        """Returns the counts of each shard's sources."""
        return [[Counts(**each["counts"]) for each in lane["sources"]] for lane in self._next.values()]

    def _positions(self) -> dict[str, Any]:
        return {str(shard): mixture.state() for shard, mixture in zip(self._own, self._mixtures, strict=True)}

    def _take(self, shard: int, mixture: Mixture) -> tuple[npt.NDArray[Any], ...]:
        mixture.fill(wait=True)
        ids, starts = mixture.take()
        length = self._reading.length
        rows, begins = (np.lib.stride_tricks.sliding_window_view(each, length + 1)[::length] for each in (ids, starts))
        bits = random_bits(self._reading.seed, self._block * self._shards + shard)
        return rows, begins, shuffled(bits, len(rows))

    def _batch(self, at: int, taken: list[tuple[npt.NDArray[Any], ...]]) -> Batch:
        """Rows of the shards in turn."""
        each = self._rows // self._shards
        shape = (each * len(taken), self._reading.length + 1)
        rows, starts = np.empty(shape, np.int32), np.empty(shape, np.bool_)
        for number, (ids, begins, order) in enumerate(taken):
            chosen = order[at * each : (at + 1) * each]
            rows[number :: len(taken)], starts[number :: len(taken)] = ids[chosen], begins[chosen]
        inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        segments = None
        if self._reading.segments:
            starts[:, 0] = True
            segments = np.cumsum(starts[:, :-1], axis=1, dtype=np.int32)
        return Batch(inputs, targets, np.ones(inputs.shape, np.bool_), segments, inputs.size)

    def _wrong(self, line: str) -> None:
        self._on_wrong(line)
        counts = _totals([[feed.counts for feed in mixture.feeds] for mixture in self._mixtures])
        bad, broken = sum(each.bad for each in counts), sum(len(each.broken) for each in counts)
        for number, limit, what in ((broken, self._reading.max_broken, "file"), (bad, self._reading.max_bad, "record")):
            if number > limit:
                many = counted(number, what)
                raise InputError(f"{line}; that makes {many} that cannot be read, and {limit:,} are allowed")


def _identity(filters: Filters, trusted: TextFiles | None) -> dict[str, Any]:
    """Returns what the filters are; without trusted texts, as it was before there could be any."""
    fields = asdict(filters)
    if trusted is None:
        return {name: value for name, value in fields.items() if name not in ("like", "like_share")}
    return fields | {"like": trusted.fingerprint()}


def _file_order(seed: int, source: int, epoch: int, count: int) -> Sequence[int]:
    return [int(number) for number in shuffled(random_bits(seed, _FILES + (source << 32) + epoch), count)]


def _is_marked(marks: duplicates.Marks, file: int, number: int) -> bool:
    return file < len(marks) and number < len(marks[file]) and bool(marks[file][number])


def _totals(shards: Sequence[Sequence[Counts]]) -> list[Counts]:
    """Sums each source's counts over shards."""
    totals = []
    for parts in zip(*shards, strict=True):
        total = Counts(epoch=max(part.epoch for part in parts))
        for part in parts:
            total.read, total.kept = total.read + part.read, total.kept + part.kept
            total.tokens, total.bad = total.tokens + part.tokens, total.bad + part.bad
            total.dropped = {reason: number + part.dropped[reason] for reason, number in total.dropped.items()}
            total.broken += [line for line in part.broken if line not in total.broken]
        totals.append(total)
    return totals


@dataclass(frozen=True)
class SourceSample:
    """One source in a sample.

    Attributes:
        counts: of its first epoch.
        wanted, share: of the mixture's tokens, from 0 to 1: as the weights say, and as it was. A source that ended
            before others began again, and its every token counts here.
    """

    source: TextSource
    counts: Counts
    wanted: float
    share: float


@dataclass(frozen=True)
class MixtureSample:
    """A mixture's figures before a run: what the filters drop, how the sources mix, how fast it is prepared.

    Attributes:
        tokens: that were found, from its beginning, each once.
        seconds: that took, with all workers; without their start, and without looking for duplicates.
        opening_seconds: what came before: finding files, looking for duplicates, starting the workers.
        whole: whether it was every source's every document, at least once.
    """

    parts: list[SourceSample]
    tokens: int
    seconds: float
    opening_seconds: float
    whole: bool

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def sample(
    sources: Sequence[TextSource],
    tokenizer: Path,
    filters: Filters,
    reading: Reading,
    tokens: int = 1 << 20,
    *,
    cache: Path | None = None,
    on_wrong: Callable[[str], None] = lambda line: None,
) -> MixtureSample:
    """Prepares `tokens` of the mixture as a run would; fewer if that is all there is.

    Args:
        reading: of the run. What can't be read is counted, and never stops a look.

    Raises:
        InputError, ElmError: as `TextBatches`.
    """
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, not {tokens}")
    look = replace(
        reading, rows=1, length=_SAMPLE_ROW, window=_SAMPLE_ROW, shards=1, segments=False, max_bad=1 << 60,
        max_broken=1 << 60,
    )  # fmt: skip
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
        SourceSample(source, counts, source.weight / weights, repeated.tokens / prepared)
        for source, counts, repeated in zip(sources, once, mixed, strict=True)
    ]
    total = sum(counts.tokens for counts in once)
    return MixtureSample(parts, total, seconds * total / max(1, prepared - first), started - begun, whole)
