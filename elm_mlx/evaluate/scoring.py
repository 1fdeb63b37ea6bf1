"""Log-probabilities of texts after texts, for any model that takes ids and caches.

Knows models as functions of ids; where their caches are ours, or like ours, rows go on from what was read for many of
them, else each row is read whole. The head, which costs most for small models, sees the positions that are scored and
no others. Batches are computed two or more at a time on a CPU, each on a processor of its own: see `train.parts`.

Knows nothing of tasks and of text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from elm_mlx import device
from elm_mlx.data.parallel import Parts
from elm_mlx.evaluate.tokens import Scored
from elm_mlx.model import ops
from elm_mlx.model.cache import KVCache, make_prompt_cache

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


_TOKENS = 2048  # of a batch, on a CPU; a GPU takes more
_CHUNK_LOGITS = 1 << 21  # logits computed at once


@dataclass(frozen=True)
class Result:
    """One item's scores, a value for each of its sequences.

    Attributes:
        logprobs: sums over what is scored, in nats.
        greedy: whether each token of it is the likeliest.
    """

    item: int
    logprobs: list[float]
    greedy: list[bool]


class Scorer:
    """Scores sequences with a model.

    Args:
        tokens: of a batch, padding included; by default what suits the device.
    """

    def __init__(self, model: Any, tokens: int | None = None):
        self._model = model
        self._tokens = tokens or (8 * _TOKENS if device.on_gpu() else _TOKENS)
        self._ours = hasattr(model, "transformer") and hasattr(model, "head")
        self._parts = Parts(0)
        caches = make_prompt_cache(model)
        self.sharing = all(type(cache) is KVCache for cache in caches)
        self._switch = caches[0].switch if self.sharing else None

    def plan(self, items: Sequence[Sequence[Scored]]) -> Plan:
        """How `items` are to be computed."""
        return make(items, self._tokens, self.sharing, self._switch)

    def run(self, planned: Plan) -> Iterator[tuple[list[Result], int]]:
        """Results as they come, in no order that is told, with the cost of the batches that they were in."""
        stem = self._stem(planned.stem)
        at_once = self._parts.most if self._ours else 1
        for start in range(0, len(planned.batches), at_once):
            batches = planned.batches[start : start + at_once]
            builds = [partial(self._graph, batch, stem) for batch in batches]
            found = self._parts.each(builds, (self._model.parameters(), stem))
            results = [
                result for batch, graph in zip(batches, found, strict=True) for result in _results(batch, *graph)
            ]
            device.trim_cache()
            yield results, sum(batch.cost for batch in batches)

    def score(self, items: Sequence[Sequence[Scored]]) -> list[Result]:
        """Results in the order of `items`."""
        found = [result for results, _ in self.run(self.plan(items)) for result in results]
        return sorted(found, key=lambda result: result.item)

    def _stem(self, ids: list[int]) -> list[tuple[mx.array, mx.array]]:
        """Keys and values, by layer, of what all rows begin with."""
        layers = [_Read() for _ in make_prompt_cache(self._model)]
        if ids:
            self._hidden(mx.array([ids]), layers)
        return _read(layers)

    def _graph(self, batch: Batch, stem: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
        """Log-probabilities `(n,)` of a batch's targets, and whether each is the likeliest; not yet computed."""
        read = stem
        if batch.prefix.size:
            layers = _after(stem, [0] * len(batch.prefix)) or [_Read() for _ in make_prompt_cache(self._model)]
            self._hidden(mx.array(batch.prefix), layers)
            read = _read(layers)
        blocks = []
        for block in batch.blocks:
            owners = block.owners.tolist() if batch.prefix.size else [0] * len(block.rows)
            out = self._hidden(mx.array(block.rows), _after(read, owners) or None)
            blocks.append(out.reshape(-1, out.shape[-1]))
        out = (mx.concatenate(blocks) if len(blocks) > 1 else blocks[0])[mx.array(batch.where)]
        return _scores(self._model.head if self._ours else _as_it_is, out, mx.array(batch.targets), self._chunk(out))

    def _hidden(self, ids: mx.array, cache: list[_Read] | None) -> mx.array:
        """Hidden states of our own model, another's logits: `(batch, length, …)`."""
        return self._model.transformer(ids, cache) if self._ours else self._model(ids, cache=cache)

    def _chunk(self, out: mx.array) -> int:
        size = self._model.config.vocab_size if self._ours else out.shape[-1]
        return max(1, _CHUNK_LOGITS // size)


class _Read(KVCache):
    """One layer's cache for rows that go on from what was read. Holds just that, and copies nothing to make room."""

    def __init__(self, read: tuple[mx.array, mx.array] | None = None) -> None:
        super().__init__()
        if read is not None:
            self.keys, self.values = read
            self.offset = read[0].shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None and self.values is not None:
            keys, values = mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)
        self.keys, self.values, self.offset = keys, values, keys.shape[2]
        return keys, values


def _read(layers: list[_Read]) -> list[tuple[mx.array, mx.array]]:
    """What each has read; nothing where nothing was."""
    return [(layer.keys, layer.values) for layer in layers if layer.keys is not None and layer.values is not None]


def _after(read: list[tuple[mx.array, mx.array]], owners: list[int]) -> list[_Read]:
    """Caches for rows, each of which goes on from row `owners` of what was read; none where nothing was."""
    rows = mx.array(owners)
    return [_Read((keys[rows], values[rows])) for keys, values in read]


def _as_it_is(logits: mx.array) -> mx.array:
    return logits


def _scores(
    head: Callable[[mx.array], mx.array], out: mx.array, targets: mx.array, chunk: int
) -> tuple[mx.array, mx.array]:
    parts = [_some(head(out[at : at + chunk]), targets[at : at + chunk]) for at in range(0, len(targets), chunk)]
    if len(parts) == 1:
        return parts[0]
    return mx.concatenate([part[0] for part in parts]), mx.concatenate([part[1] for part in parts])


def _some(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    logits = logits.astype(mx.float32)
    largest = logits.max(axis=-1)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    total = ops.exp(logits - largest[:, None]).sum(axis=-1)
    return picked - largest - mx.log(total), picked >= largest


def _results(batch: Batch, logprobs: mx.array, greedy: mx.array) -> list[Result]:
    values, likeliest = np.array(logprobs, np.float64), np.array(greedy)
    return [
        Result(
            span.item,
            [float(values[place].sum()) for place in span.places],
            [bool(likeliest[place].all()) for place in span.places],
        )
        for span in batch.spans
    ]
