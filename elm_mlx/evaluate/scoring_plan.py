"""Items in batches: what many share is read once, what few share once for them, and the rest side by side.

An item's sequences begin alike: with the question, most often. That prefix is read once, and its keys and values are
used for each of the rows, which are what follows. Prefixes of a batch all have the same length, cut back by a few
tokens where that makes for fuller batches; rows are padded at their right, where a causal model doesn't look, and
blocks of them have rows alike in length. What all items begin with, such as a task's description, is the stem, and
read once.

Knows ids and lengths; nothing of models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elm_mlx.evaluate.tokens import Scored

Ids = npt.NDArray[np.int32]

_STRIDES = (1, 2, 4, 8, 16, 32)  # what the length of a prefix is cut back to a multiple of
_STEM = 8  # tokens that are worth reading apart
_OVERHEAD = 32  # what a batch costs beyond its tokens, in tokens
_ATTENDED = 8  # positions that rows may have before them, in multiples of a batch's tokens


@dataclass(frozen=True)
class Span:
    """Where an item's logarithms are in a batch: for each of its sequences, places in `Batch.where`."""

    item: int
    places: list[slice]


@dataclass(frozen=True)
class Block:
    """Rows that are computed as one array.

    Attributes:
        rows: `(rows, length)`, padded at the right.
        owners: `(rows,)`, the item that each row belongs to, as a row of `Batch.prefix`.
    """

    rows: Ids
    owners: Ids


@dataclass(frozen=True)
class Batch:
    """What is computed at once.

    Attributes:
        prefix: `(items, length)`, what follows the stem and all rows of an item share; length 0 where there is none.
        blocks: what follows that.
        where: `(n,)`, positions whose next token is scored, into the blocks' rows laid end to end; `targets`: that
            token.
        cost: its tokens, padding included.
    """

    prefix: Ids
    blocks: list[Block]
    where: Ids
    targets: Ids
    spans: list[Span]
    cost: int


@dataclass(frozen=True)
class Plan:
    """`stem` is what all sequences begin with, or nothing; `batches` come the longest first."""

    stem: list[int]
    batches: list[Batch]


def make(items: Sequence[Sequence[Scored]], tokens: int, sharing: bool = True, switch: int | None = None) -> Plan:
    """All `items` in batches of about `tokens`, padding included.

    Args:
        items: each with the sequences that it is scored by.
        sharing: whether the model can go on from what it has read; without, each sequence is a row.
        switch: the length past which the model reads all of a text otherwise (LongRoPE): longer ones are not in an
            array with others, and nothing is shared with them.
    """
    if not items:
        return Plan([], [])
    if switch is not None:
        sharing = sharing and all(len(each.ids) - 1 <= switch for item in items for each in item)
    shared = [_shared(item) if sharing else 0 for item in items]
    stem = _stem(items, shared)
    best: tuple[int, list[tuple[int, list[int]]]] | None = None
    for stride in _STRIDES if sharing else (1,):
        lengths = [_cut_back(item, most, stem, stride) for item, most in zip(items, shared, strict=True)]
        groups = _groups(items, lengths, stem, tokens)
        cost = sum(_cost(items, members, length, stem) + _OVERHEAD for length, members in groups)
        if best is None or cost < best[0]:
            best = cost, groups
    assert best is not None
    batches = [_batch(items, members, length, stem, switch) for length, members in best[1]]
    return Plan(list(items[0][0].ids[:stem]), sorted(batches, key=lambda batch: -batch.cost))


def _shared(item: Sequence[Scored]) -> int:
    """How many tokens an item's rows have in common, before any that is scored is to be told from the next."""
    return min(_common(each.ids[:-1] for each in item), *(each.start - 1 for each in item))


def _stem(items: Sequence[Sequence[Scored]], shared: Sequence[int]) -> int:
    if len(items) < 2:
        return 0
    common = _common(item[0].ids[:most] for item, most in zip(items, shared, strict=True))
    return common if common >= _STEM else 0


def _common(lists: Iterable[list[int]]) -> int:
    """How many elements all of them begin with."""
    found = list(lists)
    first, last = min(found), max(found)  # whatever lies between begins with what these have in common
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _cut_back(item: Sequence[Scored], most: int, stem: int, stride: int) -> int:
    """The length of an item's prefix, stem included. An item of one row needs none but the stem."""
    if len({tuple(each.ids[most:-1]) for each in item}) == 1:
        return stem
    return stem + (most - stem) // stride * stride


def _groups(
    items: Sequence[Sequence[Scored]], lengths: Sequence[int], stem: int, tokens: int
) -> list[tuple[int, list[int]]]:
    """Length of the prefix, and which items: as many as a batch holds, those alike in length together."""
    alike: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for number, (item, length) in enumerate(zip(items, lengths, strict=True)):
        rows = {tuple(each.ids[length:-1]) for each in item}
        alike[length].append((max(map(len, rows)), len(rows), number))
    groups = []
    for length, members in alike.items():
        members.sort(reverse=True)
        group: list[int] = []
        longest = count = 0
        for size, more, number in members:
            full = max((count + more) * longest, (len(group) + 1) * (length - stem)) > tokens
            if group and (full or (count + more) * length > _ATTENDED * tokens):
                groups.append((length, group))
                group, longest, count = [], 0, 0
            longest, count = max(longest, size), count + more
            group.append(number)
        groups.append((length, group))
    return groups


def _cost(items: Sequence[Sequence[Scored]], members: Sequence[int], length: int, stem: int) -> int:
    """Tokens of a batch, padding included."""
    rows = [{tuple(each.ids[length:-1]) for each in items[number]} for number in members]
    return len(members) * (length - stem) + sum(map(len, rows)) * max(len(row) for own in rows for row in own)


def _batch(
    items: Sequence[Sequence[Scored]], members: Sequence[int], length: int, stem: int, switch: int | None
) -> Batch:
    rows: list[tuple[int, ...]] = []
    owners: list[int] = []
    marks: list[tuple[int, int, int]] = []  # row, position in it, token after it
    spans = []
    for owner, number in enumerate(members):
        known: dict[tuple[int, ...], int] = {}
        places = []
        for each in items[number]:
            row = tuple(each.ids[length:-1])
            if row not in known:
                known[row] = len(rows)
                rows.append(row)
                owners.append(owner)
            first = len(marks)
            marks += [(known[row], at - 1 - length, each.ids[at]) for at in range(each.start, len(each.ids))]
            places.append(slice(first, len(marks)))
        spans.append(Span(number, places))
    blocks, starts = _blocks(rows, owners, switch)
    prefix = np.array([items[number][0].ids[stem:length] for number in members], np.int32)
    return Batch(
        prefix.reshape(len(members), length - stem),
        blocks,
        np.array([starts[row] + position for row, position, _ in marks], np.int32),
        np.array([token for _, _, token in marks], np.int32),
        spans,
        prefix.size + sum(block.rows.size for block in blocks),
    )


def _blocks(
    rows: Sequence[tuple[int, ...]], owners: Sequence[int], switch: int | None
) -> tuple[list[Block], dict[int, int]]:
    """Rows by length in blocks, and where each begins when all are laid end to end."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    lengths = np.array([len(rows[row]) for row in order])
    blocks, starts, laid = [], {}, 0
    longer = 0 if switch is None else int((lengths > switch).sum())
    for first, last in _cuts(lengths, 0, longer) + _cuts(lengths, longer, len(order)):
        padded = np.zeros((last - first, lengths[first]), np.int32)
        for at, row in enumerate(order[first:last]):
            padded[at, : len(rows[row])] = rows[row]
            starts[row] = laid + at * int(lengths[first])
        blocks.append(Block(padded, np.array([owners[row] for row in order[first:last]], np.int32)))
        laid += padded.size
    return blocks, starts


def _cuts(lengths: npt.NDArray[np.int64], first: int, last: int) -> list[tuple[int, int]]:
    """Where to cut rows of falling `lengths` so that what padding is saved is worth another block."""
    if first == last:
        return []
    below = np.arange(first + 1, last)
    saved = (lengths[first] - lengths[below]) * (last - below)
    if not len(saved) or saved.max() <= _OVERHEAD:
        return [(first, last)]
    cut = first + 1 + int(saved.argmax())
    return _cuts(lengths, first, cut) + _cuts(lengths, cut, last)
