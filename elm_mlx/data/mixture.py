"""Sources mixed into one stream of tokens, from which blocks of rows are cut.

The next document is always of the source that is furthest behind its share of the tokens so far. That is known once
documents are encoded, so encoding runs ahead in each source by itself, and what it finds is put together here, in an
order that doesn't depend on how fast anything was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from elm_mlx.data import filters
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.likeness import Likeness
from elm_mlx.data.text_sources import Broken, Position, Raw, TextSource
from elm_mlx.data.workers import Encode, Outcome, Pool
from elm_mlx.errors import ElmError, InputError

_TASK = 1 << 17  # bytes of documents for a worker at once, some 0.05 s of its time
_TASK_DOCUMENTS = 1024
_AHEAD = 3  # tasks for each worker, waiting or done

Ids = npt.NDArray[np.int32]


@dataclass
class Counts:
    """Counts of a source's documents so far.

    Attributes:
        epoch: that the last document was of, from 0.
        read: documents, those that cannot be read included.
        kept, tokens: that were put into rows, with their BOS and EOS.
        dropped: how many each filter left out, of `filters.REASONS`.
        bad: records that cannot be read, each counted in its first epoch alone.
        broken: files of which a part cannot be read.
    """

    epoch: int = 0
    read: int = 0
    kept: int = 0
    tokens: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(filters.REASONS, 0))
    bad: int = 0
    broken: list[str] = field(default_factory=list)


class Feed:
    """One source's documents as token ids.

    Args:
        read: its documents from a position on, without end.
        ahead: tasks to be encoded ahead of need.
        on_wrong: called with a line for each record and file that cannot be read.
        likeness: says which documents are kept of those that the other filters keep; None for all.
    """

    def __init__(
        self,
        source: TextSource,
        read: Callable[[Position], Iterator[Raw]],
        pool: Pool,
        ahead: int,
        on_wrong: Callable[[str], None],
        likeness: Likeness | None = None,
    ) -> None:
        self.source, self.counts = source, Counts()
        self.first: Counts | None = None  # of the first epoch, once it has ended here
        self.position = Position()  # of the document after the last
        self.last = Position()  # of the last that was kept
        self._from, self._pool, self._ahead, self._on_wrong = read, pool, ahead, on_wrong
        self._likeness = likeness
        self._kept = 0  # in this epoch
        self._current: deque[tuple[Raw, Outcome | Broken]] = deque()
        self._begin()

    def ready(self) -> bool:
        """Has work done ahead; tells whether `advance` would not have to wait."""
        while self._pool.workers and len(self._tasks) < self._ahead:
            self._tasks.append(self._pool.read(partial(self._read, self._raws)))
        first = self._tasks[0] if self._tasks else None
        return bool(self._current) or bool(first and first.done() and first.result()[1].done())

    def advance(self) -> Ids | None:
        """Returns the next document's ids; None if it isn't kept.

        Raises:
            InputError: none was in a whole epoch.
        """
        while not self._current:
            self.ready()
            task = self._tasks.popleft() if self._tasks else self._pool.read(partial(self._read, self._raws))
            raws, answer = task.result()
            encoded = iter(answer.result())
            for raw in raws:
                unread = filters.DUPLICATE if raw.content is None else raw.content
                self._current.append((raw, next(encoded) if isinstance(raw.content, bytes | str) else unread))
        raw, outcome = self._current.popleft()
        self._step(raw.position)
        if isinstance(outcome, bytes):
            ids = ids_of(outcome)
            if self._likeness is None or self._likeness.accepts(ids):
                self.last = raw.position
                self._kept += 1
                self.counts.kept += 1
                self.counts.tokens += len(ids)
                return ids
            outcome = filters.UNLIKE
        if isinstance(outcome, str):
            self.counts.dropped[outcome] += 1
        else:
            self._note(raw, outcome)
        return None

    def again(self, position: Position) -> Ids:
        """Returns the ids of the document at a position once more. Raises InputError for another document."""
        raw = next(self._from(position))
        if raw.position == position and isinstance(raw.content, str | bytes):
            (outcome,) = self._pool.submit(Encode((raw.content,), self.source.key)).result()
            if isinstance(outcome, bytes):
                return ids_of(outcome)
        raise InputError(f"cannot resume: {raw.where} is another document than before")

    def state(self) -> dict[str, Any]:
        return {"next": list(vars(self.position).values()), "kept": self._kept, "counts": asdict(self.counts)}

    def resume(self, state: dict[str, Any]) -> None:
        self.position = Position(*map(int, state["next"]))
        self._kept = int(state["kept"])
        self.counts, self.first = Counts(**state["counts"]), None
        # A run that was saved before there was a filter has no count of it.
        self.counts.dropped = dict.fromkeys(filters.REASONS, 0) | self.counts.dropped
        self.counts.broken = list(self.counts.broken)
        counts = self.counts
        numbers = [*state["next"], counts.epoch, counts.read, counts.kept, counts.tokens, counts.bad]
        if any(type(number) is not int or number < 0 for number in (*numbers, *counts.dropped.values())):
            raise ValueError
        if counts.dropped.keys() != {*filters.REASONS}:
            raise ValueError
        self._begin()

    def _begin(self) -> None:
        self._raws = self._from(self.position)
        self._tasks: deque[Future[Any]] = deque()
        self._current.clear()

    def _read(self, documents: Iterator[Raw]) -> tuple[list[Raw], Future[Any]]:
        """Reads some documents and has them encoded."""
        raws: list[Raw] = []
        contents: list[bytes | str] = []
        size = 0
        for raw in documents:
            raws.append(raw)
            if isinstance(raw.content, bytes | str):
                contents.append(raw.content)
                size += len(raw.content)
            if size >= _TASK or len(raws) == _TASK_DOCUMENTS:
                break
        if not raws:
            raise ElmError(f"{self.source.name}: cannot be read on after an error")
        return raws, self._pool.submit(Encode(contents, self.source.key))

    def _step(self, position: Position) -> None:
        counts = self.counts
        if position.epoch > self.position.epoch:
            if not self._kept:
                dropped = ", ".join(f"{number:,} {reason}" for reason, number in counts.dropped.items() if number)
                bad = f"{counts.bad:,} bad" if counts.bad else ""
                left = "; ".join(filter(None, (dropped, bad, *counts.broken)))
                raise InputError(f"{self.source.name}: none of its {counts.read:,} documents is kept: {left}")
            if self.position.epoch == 0:
                self.first = deepcopy(counts)
            self._kept = 0
        self.position = Position(position.epoch, position.file, position.number + 1)
        counts.epoch, counts.read = position.epoch, counts.read + 1

    def _note(self, raw: Raw, wrong: BadRecord | Broken) -> None:
        if isinstance(wrong, Broken):
            self.counts.read -= 1
            if str(wrong) not in self.counts.broken:
                self.counts.broken.append(str(wrong))
                self._on_wrong(str(wrong))
        elif raw.position.epoch == 0:
            self.counts.bad += 1
            self._on_wrong(f"{raw.where}: {wrong}")


class Mixture:
    """Feeds as one stream of ids, which is cut into blocks.

    Args:
        size: ids of a block. Its last is the next one's first.
    """

    def __init__(self, feeds: Sequence[Feed], size: int) -> None:
        self.feeds, self._size = feeds, size
        self._parts: list[Ids] = []
        self._starts: list[int] = []  # where in the parts, put together, documents begin
        self._length = 0
        self._newest = 0  # which feed the last document was of

    def fill(self, wait: bool) -> None:
        """Gathers documents until the block is whole; without `wait`, as many as there are now."""
        ready = [feed.ready() for feed in self.feeds]  # of all, to have each run ahead
        while self._length < self._size:
            behind = min(
                range(len(self.feeds)), key=lambda i: self.feeds[i].counts.tokens / self.feeds[i].source.weight
            )
            if not (wait or ready[behind] or self.feeds[behind].ready()):
                return
            ready[behind] = False
            ids = self.feeds[behind].advance()
            if ids is not None:
                self._newest = behind
                self._add(ids, True)

    def take(self) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Returns the ids of the whole block, and marks where documents begin."""
        ids = np.concatenate(self._parts)
        starts = np.zeros(len(ids), np.bool_)
        starts[self._starts] = True
        rest, begins = ids[self._size - 1 :].copy(), bool(starts[self._size - 1])
        self._parts, self._starts, self._length = [], [], 0
        self._add(rest, begins)  # of the last document: the block was not whole before it
        return ids[: self._size], starts[: self._size]

    def state(self) -> dict[str, Any]:
        """Returns the position of the next block, right after `take` or at the beginning."""
        rest = [self._newest, *vars(self.feeds[self._newest].last).values(), self._length] if self._length else None
        return {"sources": [feed.state() for feed in self.feeds], "rest": rest}

    def resume(self, state: dict[str, Any]) -> None:
        """Raises InputError for other data; KeyError, TypeError or ValueError for what is no state."""
        for feed, saved in zip(self.feeds, state["sources"], strict=True):
            feed.resume(saved)
        self._parts, self._starts, self._length = [], [], 0
        if state["rest"] is None:
            return
        self._newest, *place, length = map(int, state["rest"])
        feed = self.feeds[self._newest]
        feed.last = Position(*place)
        ids = feed.again(feed.last)
        if not 0 < length <= len(ids):
            raise ValueError
        self._add(ids[-length:], length == len(ids))

    def _add(self, ids: Ids, begins: bool) -> None:
        if begins:
            self._starts.append(self._length)
        self._parts.append(ids)
        self._length += len(ids)


def ids_of(outcome: bytes) -> Ids:
    """Returns a document's ids of a worker's answer."""
    return np.frombuffer(outcome, np.uint32).astype(np.int32)


def ahead(workers: int, weight: float, weights: float) -> int:
    """Returns the tasks of a source to encode ahead of need: the more, the larger its share."""
    return 1 + round(_AHEAD * workers * weight / weights)
