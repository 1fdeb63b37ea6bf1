"""Log-probabilities of continuations, for any model that takes ids and caches, in batches that share prefixes.

An item's sequences begin alike: with the question, most often. That prefix is read once, and its keys and values are
used for each of the rows, which are what follows. Prefixes of a batch all have the same length, cut back by a few
tokens where that makes for fuller batches; rows are padded at their right, where a causal model doesn't look, and
blocks of them have rows alike in length. What all items begin with, such as a task's description, is the stem, and
read once. Where a model's caches cannot go on from a prefix, each row is read whole.

The head, which costs most for small models, sees the positions that are scored and no others. On a CPU batches are
computed two or more at a time, each on a processor of its own: see `Parts`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from elm_mlx import device
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.evaluate.tokens import Scored
from elm_mlx.model import ops
from elm_mlx.model.cache import Arrays, Fetched, KVCache, make_prompt_cache
from elm_mlx.model.kv_prediction import KVPrediction

Ids = npt.NDArray[np.int32]
Items = Sequence[Sequence[Scored]]  # each with the sequences that it is scored by

_STRIDES = (1, 2, 4, 8, 16, 32)  # what the length of a prefix is cut back to a multiple of
_STEM = 8  # tokens that are worth reading apart
_OVERHEAD = 32  # what a batch costs beyond its tokens, in tokens
_TOKENS = 2048  # of a batch, on a CPU; a GPU takes more
_CHUNK_LOGITS = 1 << 21  # logits computed at once
_ATTENDED = 8  # positions that rows may have before them, in multiples of a batch's tokens


@dataclass(frozen=True)
class Span:
    """The places of an item's log-probabilities in `ScoringBatch.where`, one for each of its sequences."""

    item: int
    places: list[slice]


@dataclass(frozen=True)
class RowBlock:
    """Rows that are computed as one array.

    Attributes:
        rows: `(rows, length)`, padded at the right.
        owners: `(rows,)`, the item that each row belongs to, as a row of `ScoringBatch.prefix`.
    """

    rows: Ids
    owners: Ids


@dataclass(frozen=True)
class ScoringBatch:
    """Rows, with their prefixes, that are computed at once.

    Attributes:
        prefix: `(items, length)`, what follows the stem and all rows of an item share; length 0 where there is none.
        blocks: what follows that.
        where: `(n,)`, positions whose next token is scored, into the blocks' rows laid end to end; `targets`: that
            token.
        cost: its tokens, padding included.
    """

    prefix: Ids
    blocks: list[RowBlock]
    where: Ids
    targets: Ids
    spans: list[Span]
    cost: int


@dataclass(frozen=True)
class ScoringPlan:
    """`stem` is what all sequences begin with, or nothing; `batches` come the longest first.

    Attributes:
        parts: where batches have parts of items, of each part its item, and which of that one's sequences it is.
    """

    stem: list[int]
    batches: list[ScoringBatch]
    parts: Sequence[tuple[int, list[int]]] = ()


def plan(
    items: Items, tokens: int, sharing: bool = True, switch: int | None = None, predicted: bool = False
) -> ScoringPlan:
    """Puts all `items` in batches of about `tokens`, padding included.

    Args:
        sharing: whether the model can go on from what it has read; without, each sequence is a row.
        switch: the length past which the model reads all of a text otherwise (LongRoPE): longer ones are not in an
            array with others, and nothing is shared with them.
        predicted: prefixes are all of the context but its last token, for they are not read, but predicted.
    """
    if predicted:
        parts = _parts(items)
        alike = [[items[item][place] for place in places] for item, places in parts]
        shared = [part[0].start - 1 for part in alike]
        _, groups = _groups(alike, shared, 0, 1, tokens, prefixed=True)
        batches = [_batch(alike, members, length, 0, switch) for length, members in groups]
        return ScoringPlan([], sorted(batches, key=lambda batch: -batch.cost), parts)
    if not items:
        return ScoringPlan([], [])
    if switch is not None:
        sharing = sharing and all(len(each.ids) - 1 <= switch for item in items for each in item)
    # The tokens that an item's rows have in common, before the first whose next token is scored.
    shared = [
        min(_common(each.ids[:-1] for each in item), *(each.start - 1 for each in item)) if sharing else 0
        for item in items
    ]
    stem = _common(item[0].ids[:most] for item, most in zip(items, shared, strict=True)) if len(items) > 1 else 0
    stem = stem if stem >= _STEM else 0
    plans = [_groups(items, shared, stem, stride, tokens) for stride in (_STRIDES if sharing else (1,))]
    groups = min(plans, key=lambda plan: plan[0])[1]
    batches = [_batch(items, members, length, stem, switch) for length, members in groups]
    return ScoringPlan(list(items[0][0].ids[:stem]), sorted(batches, key=lambda batch: -batch.cost))


def _parts(items: Items) -> list[tuple[int, list[int]]]:
    """Returns the sequences of each item that have one context: the item's number, and theirs."""
    parts: list[tuple[int, list[int]]] = []
    for number, item in enumerate(items):
        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, each in enumerate(item):
            places[tuple(each.ids[: each.start])].append(place)
        parts += [(number, own) for own in places.values()]
    return parts


def _common(lists: Iterable[list[int]]) -> int:
    """Counts the elements that all lists begin with."""
    found = list(lists)
    first, last = min(found), max(found)  # whatever lies between begins with what these have in common
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _groups(
    items: Items, shared: Sequence[int], stem: int, stride: int, tokens: int, prefixed: bool = False
) -> tuple[int, list[tuple[int, list[int]]]]:
    """Groups items alike in length, as many as a batch holds, their prefixes cut back to a multiple of `stride`.

    Returns the cost of all, and each group with the length of its prefixes, stem included. Where they are not
    `prefixed`, one row has no prefix of its own: it needs none.
    """
    alike: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for number, (item, most) in enumerate(zip(items, shared, strict=True)):
        length = stem + (most - stem) // stride * stride
        if not prefixed and len({tuple(each.ids[most:-1]) for each in item}) == 1:
            length = stem
        rows = {tuple(each.ids[length:-1]) for each in item}
        alike[length].append((max(map(len, rows)), len(rows), number))
    groups: list[tuple[int, list[int]]] = []
    cost = 0
    for length, members in alike.items():
        members.sort(reverse=True)
        longest = count = 0
        for size, more, number in members:
            full = max((count + more) * longest, (len(groups[-1][1]) + 1) * (length - stem)) > tokens if count else True
            if full or (count + more) * length > _ATTENDED * tokens:
                cost += _OVERHEAD
                groups.append((length, []))
                longest, count = size, 0
            cost += length - stem + more * longest
            count += more
            groups[-1][1].append(number)
    return cost, groups


def _batch(items: Items, members: Sequence[int], length: int, stem: int, switch: int | None) -> ScoringBatch:
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
    return ScoringBatch(
        prefix.reshape(len(members), length - stem),
        blocks,
        np.array([starts[row] + position for row, position, _ in marks], np.int32),
        np.array([token for _, _, token in marks], np.int32),
        spans,
        prefix.size + sum(block.rows.size for block in blocks),
    )


def _blocks(
    rows: Sequence[tuple[int, ...]], owners: Sequence[int], switch: int | None
) -> tuple[list[RowBlock], dict[int, int]]:
    """Puts rows in blocks by length; returns also where each begins when all blocks are laid end to end."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    lengths = np.array([len(rows[row]) for row in order])
    blocks, starts, laid = [], {}, 0
    longer = 0 if switch is None else int((lengths > switch).sum())
    for first, last in _cuts(lengths, 0, longer) + _cuts(lengths, longer, len(order)):
        padded = np.zeros((last - first, lengths[first]), np.int32)
        for at, row in enumerate(order[first:last]):
            padded[at, : len(rows[row])] = rows[row]
            starts[row] = laid + at * int(lengths[first])
        blocks.append(RowBlock(padded, np.array([owners[row] for row in order[first:last]], np.int32)))
        laid += padded.size
    return blocks, starts


def _cuts(lengths: npt.NDArray[np.int64], first: int, last: int) -> list[tuple[int, int]]:
    """Cuts rows of falling `lengths` in runs where the padding saved is worth another block."""
    if first == last:
        return []
    below = np.arange(first + 1, last)
    saved = (lengths[first] - lengths[below]) * (last - below)
    if not len(saved) or saved.max() <= _OVERHEAD:
        return [(first, last)]
    cut = first + 1 + int(saved.argmax())
    return _cuts(lengths, first, cut) + _cuts(lengths, cut, last)


@dataclass(frozen=True)
class ItemScores:
    """One item's scores, a value for each of its sequences.

    Attributes:
        logprobs: sums over the scored tokens, in nats.
        greedy: whether each scored token is the likeliest.
    """

    item: int
    logprobs: list[float]
    greedy: list[bool]


class Scorer:
    """Scores sequences with a model.

    Args:
        tokens: of a batch, padding included; by default what suits the device.
        kv_bits: of quantized keys and values, as generation has them; None leaves them as they are.
        kvp: predicts the keys and values of contexts, but for their last token, as it does of prompts.
    """

    def __init__(
        self, model: Any, tokens: int | None = None, kv_bits: int | None = None, kvp: KVPrediction | None = None
    ):
        self._model = model
        self._tokens = tokens or (8 * _TOKENS if device.on_gpu() else _TOKENS)
        self._ours = hasattr(model, "transformer") and hasattr(model, "head")
        self._parts = device.Parts(device.most_parts())
        self._kinds, self._quantized = make_prompt_cache(model, kv_bits), kv_bits is not None
        self.sharing = all(isinstance(kind, KVCache) for kind in self._kinds)
        self._switch = self._kinds[0].switch if self.sharing else None
        self._kvp = kvp

    def plan(self, items: Items) -> ScoringPlan:
        """Puts `items` in batches."""
        return plan(items, self._tokens, self.sharing, self._switch, self._kvp is not None)

    def run(self, planned: ScoringPlan) -> Iterator[tuple[list[ItemScores], int]]:
        """Yields scores as they come, in no particular order, with the cost of their batches."""
        if not planned.parts:
            yield from self._run(planned)
            return
        sizes = Counter(item for item, places in planned.parts for _ in places)
        known: dict[int, dict[int, tuple[float, bool]]] = defaultdict(dict)
        for scores, cost in self._run(planned):
            for part in scores:
                item, places = planned.parts[part.item]
                known[item].update(zip(places, zip(part.logprobs, part.greedy, strict=True), strict=True))
            whole = [item for item, found in known.items() if len(found) == sizes[item]]
            made = [(item, [found for _, found in sorted(known.pop(item).items())]) for item in whole]
            yield [ItemScores(item, [one for one, _ in each], [one for _, one in each]) for item, each in made], cost

    def _run(self, planned: ScoringPlan) -> Iterator[tuple[list[ItemScores], int]]:
        stem = self._stem(planned.stem)
        predicting = [] if self._kvp is None else self._kvp.parameters()
        at_once = self._parts.most if self._ours else 1
        for start in range(0, len(planned.batches), at_once):
            batches = planned.batches[start : start + at_once]
            found = []
            streams = self._parts.streams(len(batches), (self._model.parameters(), predicting, stem))
            for batch, stream in zip(batches, streams, strict=True):
                with stream:
                    found.append(self._graph(batch, stem))
            self._parts.evaluate(found)
            scores = []
            for batch, (logprobs, greedy) in zip(batches, found, strict=True):
                values, likeliest = np.array(logprobs, np.float64), np.array(greedy)
                for span in batch.spans:
                    sums = [float(values[place].sum()) for place in span.places]
                    scores.append(ItemScores(span.item, sums, [bool(likeliest[place].all()) for place in span.places]))
            device.trim_cache()
            yield scores, sum(batch.cost for batch in batches)

    def score(self, items: Items, on_progress: OnProgress = no_progress) -> list[ItemScores]:
        """Scores `items`, in their order."""
        planned = self.plan(items)
        found, done, total = list[ItemScores](), 0, sum(batch.cost for batch in planned.batches)
        for scores, cost in self.run(planned):
            found, done = found + scores, done + cost
            on_progress("scoring", done, total)
        return sorted(found, key=lambda scores: scores.item)

    def _after(self, read: Sequence[Arrays], owners: list[int]) -> list[_PrefixCache] | None:
        """Caches for rows, each of which goes on from row `owners` of what was read; None where nothing was.

        Then rows are computed as in training, but for keys that are quantized.
        """
        if not read:
            return [_PrefixCache(kind) for kind in self._kinds] if self._quantized else None
        rows = mx.array(owners)
        return [_PrefixCache(kind, [array[rows] for array in own]) for kind, own in zip(self._kinds, read, strict=True)]

    def _stem(self, ids: list[int]) -> Sequence[Arrays]:
        """Keys and values, by layer, of what all rows begin with."""
        return self._prefill(mx.array([ids]), None) if ids else []

    def _prefill(self, ids: mx.array, past: list[_PrefixCache] | None) -> Sequence[Arrays]:
        """Keys and values, by layer, of `ids` and what was read before them."""
        layers = past or [_PrefixCache(kind) for kind in self._kinds]
        if self._kvp is None:
            self._hidden(ids, layers)
        else:
            self._kvp.read(ids, make_prompt_cache(self._kvp.auxiliary), layers)
        return [layer.held_arrays() for layer in layers]

    def _graph(self, batch: ScoringBatch, stem: Sequence[Arrays]) -> tuple[mx.array, mx.array]:
        """Log-probabilities `(n,)` of a batch's targets, and whether each is the likeliest; not yet computed."""
        read = stem
        if batch.prefix.size:
            read = self._prefill(mx.array(batch.prefix), self._after(stem, [0] * len(batch.prefix)))
        blocks = []
        for block in batch.blocks:
            owners = block.owners.tolist() if batch.prefix.size else [0] * len(block.rows)
            out = self._hidden(mx.array(block.rows), self._after(read, owners))
            blocks.append(out.reshape(-1, out.shape[-1]))
        out = (mx.concatenate(blocks) if len(blocks) > 1 else blocks[0])[mx.array(batch.where)]
        targets = mx.array(batch.targets)
        chunk = max(1, _CHUNK_LOGITS // (self._model.config.vocab_size if self._ours else out.shape[-1]))
        parts = [self._logprobs(out[at : at + chunk], targets[at : at + chunk]) for at in range(0, len(targets), chunk)]
        logprobs, greedy = zip(*parts, strict=True)
        return parts[0] if len(parts) == 1 else (mx.concatenate(logprobs), mx.concatenate(greedy))

    def _hidden(self, ids: mx.array, cache: list[_PrefixCache] | None) -> mx.array:
        """Hidden states of our own model, another's logits: `(batch, length, …)`."""
        return self._model.transformer(ids, cache) if self._ours else self._model(ids, cache=cache)

    def _logprobs(self, out: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        logits = (self._model.head(out) if self._ours else out).astype(mx.float32)
        largest = logits.max(axis=-1)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        total = ops.exp(logits - largest[:, None]).sum(axis=-1)
        return picked - largest - mx.log(total), picked >= largest


class _PrefixCache(KVCache):
    """One layer's cache for rows that go on from a prefix. Holds just that, and copies nothing to make room.

    Its arrays are those of `kind`.
    """

    def __init__(self, kind: KVCache, read: Arrays = ()) -> None:
        super().__init__()
        self._kind = kind
        self.state = read
        self.offset = read[0].shape[2] if read else 0

    def held_arrays(self) -> Arrays:
        return self._arrays

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Fetched, Fetched]:
        new = self._kind.held(keys, values)
        joined = [mx.concatenate(pair, axis=2) for pair in zip(self._arrays, new, strict=True)] if self._arrays else new
        self.state, self.offset = joined, joined[0].shape[2]
        return self._kind.fetched(joined)
