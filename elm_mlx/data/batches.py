"""Batches of examples, or of pairs of them: packed into rows, or grouped by length; in an order by seed; resumable.

Arrays are NumPy's. The order is a function of the seed, the epoch and the examples.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from elm_mlx.data.draws import Draws, random_bits, shuffled
from elm_mlx.data.encoding import Example
from elm_mlx.errors import InputError

Row = list[int]  # numbers of examples
_WINDOW = 4096  # examples that are packed, or sorted, at once: what the order can move an example by
_LEAST_REACH = 64
_STEP = 32  # grouped batches are padded to a multiple of this, for fewer shapes to compile


@dataclass(frozen=True)
class Batch:
    """Rows of examples. `inputs[b, t]` predicts `targets[b, t]`, the next id of the same example.

    Attributes:
        inputs, targets: (batch, length) int32; 0 in padding.
        trained: (batch, length) bool: which targets the loss counts. A row, and on one of several processes the whole
            batch, may have none.
        segments: (batch, length) int32: 1, 2, … in the order of a row's examples, 0 in padding; None where each row is
            one example, padded at its end.
        tokens: positions that are no padding.
        positions: (batch, length) int32: where a row's examples begin by what they have in common, in segment -1, of
            each position in its example; else None.
    """

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    segments: npt.NDArray[np.int32] | None
    tokens: int
    positions: npt.NDArray[np.int32] | None = field(default=None, kw_only=True)

    def rows(self, at: slice) -> Batch:
        """Returns a batch of some of the rows; its `tokens` are not counted: 0."""
        segments, positions = (None if each is None else each[at] for each in (self.segments, self.positions))
        return Batch(self.inputs[at], self.targets[at], self.trained[at], segments, 0, positions=positions)

    def split(self, count: int) -> list[Batch]:
        """`count` batches with as many of the rows in each as can be; fewer where there are fewer rows."""
        rows = len(self.inputs)
        edges = np.linspace(0, rows, min(count, rows) + 1).round().astype(int)
        return [self.rows(slice(start, stop)) for start, stop in pairwise(edges)] if len(edges) > 2 else [self]

    def lengths(self) -> npt.NDArray[np.int64]:
        """Returns the positions of each text, padding left out."""
        if self.segments is None:  # a row is one text
            filled = (self.inputs != 0) | (self.targets != 0) | self.trained
            return np.where(filled.any(axis=1), filled.shape[1] - filled[:, ::-1].argmax(axis=1), 0)
        numbers = self.segments + (self.segments.max() + 1) * np.arange(len(self.segments))[:, None]
        _, lengths = np.unique(numbers[self.segments > 0], return_counts=True)
        return lengths

    def reach(self) -> int | None:
        """Returns positions that no text exceeds, a power of 2, for few steps to compile; None for all of a row."""
        if self.positions is not None:
            return None
        longest = int(self.lengths().max(initial=_LEAST_REACH))
        reach = 1 << (longest - 1).bit_length()
        return reach if reach < self.inputs.shape[1] else None


class Batches:
    """An endless iterator over the batches of epochs, every example once in each, or as often as weights ask for.

    Args:
        batch_size: rows of one process's batch. The last batch of an epoch is filled up with rows of padding.
        row_length: positions of a packed row, and the most of one that isn't. No example may need more.
        packed: put several examples in a row; otherwise one, and similar lengths together.
        seed: of the order; an epoch's differs from the last one's.
        counts, weights: of several sources, whose units follow one another: how many each has, and the share of its
            tokens, as `Draws` keeps to it. Without weights every unit is in an epoch once.
        rank, world: this process's number, and how many there are. Each takes every `world`th row of batches of
            `world * batch_size`, so that together they see what one process with that `batch_size` would.

    Raises:
        InputError: there is no example, or one is longer than a row.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        row_length: int,
        *,
        packed: bool = True,
        seed: int = 0,
        counts: Sequence[int] = (),
        weights: Sequence[float] = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not examples:
            raise InputError("there are no examples to batch")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        if not 0 <= rank < world:
            raise InputError(f"there is no process {rank} of {world}")
        self._examples = self._units(examples)
        self._needs = np.array([len(example.ids) - 1 for example in self._examples])
        if self._needs.max() > row_length:
            raise InputError(f"an example of {self._needs.max() + 1:,} tokens doesn't fit rows of {row_length:,}")
        self._rows, self._length, self._packed, self._seed = batch_size * world, row_length, packed, seed
        self._rank, self._world = rank, world
        self._weights = list(weights)
        self.draws = Draws(counts, weights, self._needs + 1, seed) if weights else None
        self._epoch = self._position = 0
        self._plan = self._planned(0)
        self._fingerprint: str | None = None

    def state(self) -> dict[str, Any]:
        """Returns the position as JSON's types, which `resume` takes."""
        return {"epoch": self._epoch, "batch": self._position, **self._identity()}

    def resume(self, state: dict[str, Any]) -> None:
        """Moves to where `state` was taken, of batches made by the same arguments.

        `world` may be another, as long as `world * batch_size` is the same.

        Raises:
            InputError: the state is of other examples or other arguments, or is damaged.
        """
        check_identity(state, self._identity())
        epoch, position = state.get("epoch"), state.get("batch")
        if type(epoch) is not int or type(position) is not int or epoch < 0:
            raise InputError("cannot resume: the position in the data is damaged")
        plan = self._planned(epoch)
        if not 0 <= position <= len(plan):
            raise InputError("cannot resume: the position in the data is damaged")
        self._epoch, self._position, self._plan = epoch, position, plan

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self._epoch + (self._position == len(self._plan))

    def steps(self) -> int:
        """Returns the batches of the last batch's epoch; with packing, other epochs may differ by a few."""
        return len(self._plan)

    def tokens(self) -> int:
        """Returns the positions of the last batch's epoch that are no padding."""
        return int(sum(self._needs[row].sum() for rows in self._plan for row in rows))

    def fill(self) -> float:
        """Returns the share of an epoch's positions that are no padding, from 0 to 1."""
        return self.tokens() / sum(self._rows * self._batch_length(rows) for rows in self._plan)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._position == len(self._plan):
            self._epoch, self._position = self._epoch + 1, 0
            self._plan = self._planned(self._epoch)
        self._position += 1
        return self._batch(self._plan[self._position - 1])

    def once(self) -> Iterator[Batch]:
        """Iterates over epoch 0, wherever the iterator stands: for validation, the same each time."""
        return map(self._batch, self._planned(0))

    def _units(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The units that rows are made of."""
        return examples

    def _identity(self) -> dict[str, Any]:
        """The arguments and data that the order depends on."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._examples)
        return {
            "seed": self._seed, "rows_of_a_batch": self._rows, "row_length": self._length, "packed": self._packed,
            "data": self._fingerprint, "weights": [*map(float, self._weights)] or None,
        }  # fmt: skip

    def _planned(self, epoch: int) -> list[list[Row]]:
        """The epoch's batches, of all processes together."""
        bits = random_bits(self._seed, epoch)
        drawn = np.arange(len(self._needs)) if self.draws is None else self.draws(epoch)
        order = drawn[shuffled(bits, len(drawn))]
        rows: list[Row] = []
        for start in range(0, len(order), _WINDOW):
            window = order[start : start + _WINDOW]
            # Longest first; equal ones stay shuffled.
            window = window[np.argsort(-self._needs[window], kind="stable")]
            rows += self._pack(window) if self._packed else [[int(number)] for number in window]
        if self._packed:
            # Or the rows of long examples would come first.
            rows = [rows[i] for i in shuffled(bits, len(rows))]
        plan = [rows[start : start + self._rows] for start in range(0, len(rows), self._rows)]
        return plan if self._packed else [plan[i] for i in shuffled(bits, len(plan))]

    def _pack(self, numbers: npt.NDArray[np.intp]) -> list[Row]:
        """Packs examples into rows, each where it leaves the least room: best fit, and decreasing as they come."""
        rows: list[Row] = []
        room: list[tuple[int, int]] = []  # positions left of a row and its number, least first
        for number in map(int, numbers):
            need = int(self._needs[number])
            at = bisect_left(room, (need, 0))
            if at < len(room):
                left, row = room.pop(at)
                rows[row].append(number)
            else:
                left, row = self._length, len(rows)
                rows.append([number])
            insort(room, (left - need, row))
        return rows

    def _batch_length(self, rows: list[Row]) -> int:
        if self._packed:
            return self._length
        longest = max(int(self._needs[row[0]]) for row in rows)
        return min(self._length, -(-longest // _STEP) * _STEP)

    def _batch(self, rows: list[Row]) -> Batch:
        """This process's part of a batch."""
        shape = (self._rows // self._world, self._batch_length(rows))
        inputs, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
        trained = np.zeros(shape, np.bool_)
        tokens = 0
        for i, row in enumerate(rows[self._rank :: self._world]):
            start = 0
            for segment, example in enumerate((self._examples[number] for number in row), 1):
                end = start + len(example.ids) - 1
                inputs[i, start:end], targets[i, start:end] = example.ids[:-1], example.ids[1:]
                trained[i, start:end], segments[i, start:end] = example.trained[1:], segment
                start = end
            tokens += start
        return Batch(inputs, targets, trained, segments if self._packed else None, tokens)


def check_identity(state: Any, identity: Mapping[str, Any]) -> None:
    """Raises InputError where a state was taken of batches of other data or other arguments than `identity` says."""
    before = state if isinstance(state, dict) else {}
    for name, value in identity.items():
        if before.get(name) != value:
            was = f": {before.get(name)} before, {value} now" if before and isinstance(value, int | float) else ""
            raise InputError(f"cannot resume: the {name.replace('_', ' ')} changed{was}")


def fingerprint(examples: Sequence[Example]) -> str:
    """Returns a hash of every id and mark, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([len(example.ids), *example.ids], "<i8").tobytes())
        digest.update(np.array(example.trained, np.bool_).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class PairBatch(Batch):
    """A batch whose segments are 1 for the chosen and 2 for the rejected answer of a row's first pair, 3 and 4 for
    its second, and so on.

    Attributes:
        pairs: (batch, most) int32: the numbers of each row's pairs; -1 where it has no more. `most` is the same for
            every row, and a power of two.
        reference: (batch, most, 2) float32: the reference's log-probabilities of the answers, 0 where there are none.
    """

    pairs: npt.NDArray[np.int32]
    reference: npt.NDArray[np.float32]

    def rows(self, at: slice) -> PairBatch:
        batch = super().rows(at)
        return PairBatch(**vars(batch), pairs=self.pairs[at], reference=self.reference[at])


class PairBatches(Batches):
    """Batches of pairs, every pair in one row; to `Batches`, in all else, a pair is one example.

    Args:
        examples: two of each pair, as `examples.prepare` makes them.
        row_length: positions of a row, at least as many as the tokens of a pair, less one.
    """

    @cached_property
    def reference(self) -> npt.NDArray[np.float32]:
        """(pairs, 2): the source of the batches' `reference`; noughts, unless it is set."""
        return np.zeros((len(self._examples), 2), np.float32)

    def _units(self, examples: Sequence[Example]) -> Joined:
        self._pairs = examples
        return Joined(examples)

    def _batch(self, rows: list[Row]) -> PairBatch:
        batch = super()._batch(rows)
        own = rows[self._rank :: self._world]
        most = 1 << (max(map(len, own), default=1) - 1).bit_length()
        size = len(batch.inputs)
        segments, pairs = np.zeros(batch.inputs.shape, np.int32), np.full((size, most), -1, np.int32)
        reference = np.zeros((size, most, 2), np.float32)
        for i, row in enumerate(own):
            pairs[i, : len(row)], reference[i, : len(row)] = row, self.reference[row]
            start = 0
            for segment, number in enumerate(row):
                # The chosen answer's last token is read too, and predicts nothing.
                middle = start + len(self._pairs[2 * number].ids)
                end = middle + len(self._pairs[2 * number + 1].ids) - 1
                segments[i, start:middle], segments[i, middle:end] = 2 * segment + 1, 2 * segment + 2
                start = end
        return PairBatch(batch.inputs, batch.targets, batch.trained, segments, batch.tokens, pairs, reference)


class Joined(Sequence[Example]):
    """Pairs as single examples, each made when it is read: prompt, chosen answer, prompt, rejected answer."""

    def __init__(self, pairs: Sequence[Example]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs) // 2

    def __getitem__(self, number: int) -> Example:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(number)
        chosen, rejected = self._pairs[2 * number], self._pairs[2 * number + 1]
        return Example(chosen.ids + rejected.ids, chosen.trained + rejected.trained)
