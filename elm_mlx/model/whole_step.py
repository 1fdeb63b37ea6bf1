"""A step of few rows, or a piece of a prompt, through all layers of a transformer, as one call of C (`whole_step.c`).

A layer is three products and attention (`sublayers`). For so little work MLX takes as long to dispatch as it takes to
compute, so a step of texts whose caches grow by a token each is one product, and so is a prompt's next piece. It writes
keys and values where the caches have them, behind MLX's back: it has that memory for itself, and a cache that is used
otherwise ends that first.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from elm_mlx import blas
from elm_mlx.model import described, sublayers
from elm_mlx.model.attention import fits_one_call
from elm_mlx.model.cache import KVCache, QuantizedCache, StreamingCache, row_capacity
from elm_mlx.model.described import MARK, STEP
from elm_mlx.model.rope import Rope
from elm_mlx.model.sublayers import MOST_ROWS, LayerParts, LayersInC, Norm

_ALL = 1 << 24  # positions that a window shows at most
_MOST = 511  # rows that are computed together, as in cblas.c


class _Cached(ctypes.Structure):
    """Keys or values, as `cached_heads.c` has them."""

    _fields_ = (
        ("rows", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("biases", ctypes.c_void_p),
        ("head_dim", ctypes.c_int), ("bits", ctypes.c_int), ("group", ctypes.c_int),
    )  # fmt: skip


class _PlacedLayer(ctypes.Structure):
    _fields_ = (
        ("read", ctypes.c_void_p), ("write", ctypes.c_void_p), ("feed", ctypes.c_void_p), ("keys", _Cached),
        ("values", _Cached), ("stored_heads", ctypes.c_int), ("scale", ctypes.c_float), ("window", ctypes.c_int),
        ("turns", ctypes.c_int),
    )  # fmt: skip


class _StepDescription(ctypes.Structure):
    _fields_ = (
        ("head", ctypes.c_ubyte * (MARK + 4)), ("layers", ctypes.c_int), ("slots", ctypes.c_int),
        ("capacity", ctypes.c_int), ("last", Norm),
    )  # fmt: skip


class WholeStep:
    """Steps and pieces of a model's layers over caches whose memory it has for itself, until `end`.

    Args:
        in_c: the layers.
        caches: one for each; they have room for what is to come, from position `at` on in each row.
    """

    def __init__(self, in_c: LayersInC, caches: Sequence[KVCache], at: int) -> None:
        self._in_c = in_c
        self.capacity = caches[0].capacity
        self._ropes: list[Rope] = []
        arrays = [cache.lend(at) for cache in caches]
        layers = (_PlacedLayer * len(arrays))()
        for made, layer, own in zip(layers, in_c.layers, arrays, strict=True):
            parts = layer.parts
            if parts.rope not in self._ropes:
                self._ropes.append(parts.rope)
            made.read, made.write, made.feed = layer.addresses
            made.keys, made.values = _cached(own, parts.kv_heads, parts.head_dim)
            made.stored_heads = own[0].shape[1]
            made.scale, made.window = parts.head_dim**-0.5, parts.window or _ALL
            made.turns = self._ropes.index(parts.rope)
        assert in_c.last is not None
        numbers = in_c.width + 1 + sum(2 * rope.head_dim for rope in self._ropes)
        descriptions, matrices = [], []
        for norm in (in_c.last, Norm()):  # a piece's norm is MLX's, as where its layers come one by one
            step = _StepDescription(layers=len(arrays), slots=arrays[0][0].shape[0], capacity=self.capacity, last=norm)
            descriptions.append(described.description(STEP, bytes(step)[MARK + 4 :] + bytes(layers)))
            matrices.append(described.matrix(descriptions[-1], numbers, in_c.width))
        self._step, self._piece = matrices
        self._running: list[mx.array] = []
        self._slots: dict[int, mx.array] = {}  # where each text's begins, by their number
        self.end = weakref.finalize(self, _end, os.getpid(), descriptions, arrays, self._running)
        for cache in caches:  # now that it can be ended
            cache.writer = self

    def is_of(self, in_c: LayersInC, caches: Sequence[KVCache]) -> bool:
        """Returns whether this is the step of these layers and caches, as they are now."""
        return self._in_c is in_c and self.end.alive and all(cache.writer is self for cache in caches)

    def __call__(self, x: mx.array, position: mx.array) -> mx.array:
        """Launches the step of rows `(rows, model_dim)`, which there is room for.

        `position` is `(rows,)`, of a row for each text, or `(texts, n)`, of n rows for each that follow each other.
        Returns the hidden states `(rows, model_dim)`, normed. The keys and values will be in the caches with them.
        """
        texts, flat = position.shape[0], position.reshape(-1)
        if texts not in self._slots:
            self._slots[texts] = mx.arange(0, texts * self.capacity, self.capacity)[:, None]
        places = flat if texts == 1 else (position.reshape(texts, -1) + self._slots[texts]).reshape(-1)
        return self._launch(self._step, x, places, [self._turns(rope, flat) for rope in self._ropes])

    def read(self, x: mx.array, offset: int, text_length: int, last: int) -> mx.array:
        """Launches a piece of a text `(rows, model_dim)`, from position `offset` on, which there is room for.

        Returns hidden states `(rows, model_dim)`, not normed, of which only those of the `last` rows are computed.
        `text_length` is that of the whole text, where it is known: LongRoPE depends on it.
        """
        rows = x.shape[0]
        unwanted = mx.where(mx.arange(rows) < rows - last, -1, 0)  # whose complement is the place of such a row
        turns = [self._table(rope, offset, rows, text_length) for rope in self._ropes]
        return self._launch(self._piece, x, mx.arange(offset, offset + rows) ^ unwanted, turns)

    def _table(self, rope: Rope, offset: int, rows: int, text_length: int) -> mx.array:
        table = rope.table(self.capacity)
        return rope.turns(rows, offset, text_length)[0] if table is None else table[offset : offset + rows]

    def _launch(self, matrix: mx.array, x: mx.array, places: mx.array, turns: list[mx.array]) -> mx.array:
        hidden = mx.concatenate([x, places.view(mx.float32)[:, None], *turns], axis=1) @ matrix
        mx.async_eval(hidden)
        self._running[:] = [hidden]
        return hidden

    def _turns(self, rope: Rope, position: mx.array) -> mx.array:
        table = rope.table(self.capacity)
        return rope.turns(1, position)[:, 0] if table is None else table[position]


def whole_step(in_c: LayersInC, caches: Sequence[Any], rows: int, at: int) -> WholeStep | None:
    """Returns the step of `rows` rows over these caches, whose memory it has from now on; None where there is none.

    Args:
        at: a position that no row has written, and there is room for.
    """
    many = blas.computes_many_rows()
    return None if rows > (_MOST if many else MOST_ROWS) or not _is_known(in_c, caches) else _made(in_c, caches, at)


def whole_piece(in_c: LayersInC, caches: Sequence[Any], rows: int) -> WholeStep | None:
    """Returns the step for the next `rows` tokens of one text, for which the caches get room; None as of `whole_step`.

    Args:
        in_c: the layers for so many rows.
    """
    start = caches[0].offset
    if not _is_known(in_c, caches) or any(_is_mlxs(layer.parts, rows, start + rows) for layer in in_c.layers):
        return None
    for cache, layer in zip(caches, in_c.layers, strict=True):
        if cache.capacity == 0:
            like = cache.held(*[mx.zeros((1, layer.parts.kv_heads, 1, layer.parts.head_dim))] * 2)  # not computed
            room = row_capacity(start + rows)
            cache.state = [mx.zeros((*array.shape[:2], room, array.shape[3]), array.dtype) for array in like]
        elif cache.capacity < start + rows:
            cache.reserve(start + rows)
    return _made(in_c, caches, start)


def _is_known(in_c: LayersInC, caches: Sequence[Any]) -> bool:
    """Returns whether whole steps of these layers write into caches of this kind."""
    return in_c.last is not None and type(caches[0]) in (KVCache, StreamingCache, QuantizedCache)


def _is_mlxs(parts: LayerParts, rows: int, positions: int) -> bool:
    """Returns whether attention is MLX's where layers come one by one, and so elsewhere: a text has one set of bits."""
    return not fits_one_call(parts.heads // parts.kv_heads * rows, positions, parts.head_dim)


def _made(in_c: LayersInC, caches: Sequence[Any], at: int) -> WholeStep | None:
    """Returns the step that has these caches, or makes one; None where they are not in float32."""
    writer = caches[0].writer
    if isinstance(writer, WholeStep) and writer.is_of(in_c, caches):
        return writer
    if any(array is None or array.dtype != mx.float32 for array in (cache.state[-1] for cache in caches)):
        return None
    room = max(cache.capacity for cache in caches)
    for cache in caches:  # an interrupt may have come between one that grew and the next
        if cache.capacity < room:
            cache.reserve(room)
    alike = {(cache.capacity, cache.state[0].shape[0]) for cache in caches}
    return WholeStep(in_c, caches, at) if len(alike) == 1 else None


def _cached(arrays: Sequence[mx.array], kv_heads: int, head_dim: int) -> tuple[_Cached, _Cached]:
    """Describes the keys and values that a cache's arrays hold."""
    if len(arrays) == 2:
        keys, values = (_Cached(rows=described.address(array), head_dim=head_dim, bits=32) for array in arrays)
        return keys, values
    codes, scales, _ = arrays
    bits, group = codes.shape[3] * 32 // head_dim, head_dim // scales.shape[3]
    starts = [
        [described.address(a) + head * a.nbytes // (a.shape[0] * a.shape[1]) for a in arrays] for head in (0, kv_heads)
    ]
    keys, values = (_Cached(*start, head_dim, bits, group) for start in starts)
    return keys, values


def _end(process: int, descriptions: Sequence[mx.array], arrays: list[list[mx.array]], running: list[mx.array]) -> None:
    """Waits for the last step; from now on a step would give no numbers, and touch no memory."""
    if os.getpid() != process:  # forked, without the thread that would end the step
        return
    mx.eval(running)
    for words in descriptions:
        sublayers.retire(words)
    arrays.clear()
