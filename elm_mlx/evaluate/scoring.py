"""Log-probabilities of texts after texts, for any model that takes ids and caches.

Knows models as functions of ids; where their caches are ours, or like ours, rows go on from what was read for many of
them, else each row is read whole. The head, which costs most for small models, sees the positions that are scored and
no others. Batches are computed two or more at a time on a CPU, each on a processor of its own: see `train.parts`.

Knows nothing of tasks and of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from elm_mlx import device
from elm_mlx.data.parallel import Parts
from elm_mlx.evaluate import scoring_plan
from elm_mlx.evaluate.scoring_plan import Batch, Plan
from elm_mlx.evaluate.tokens import Scored
from elm_mlx.model import ops
from elm_mlx.model.cache import KVCache, make_prompt_cache

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
        return scoring_plan.make(items, self._tokens, self.sharing, self._switch)

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
