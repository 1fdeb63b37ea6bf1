"""Layers with a cache on a CPU, of prompts and decoding: each is three products by `sublayers.c`, and attention.

MLX takes some 3 µs for an operation however small, and a layer has sixty. A `Sublayer` is one: in MLX's eyes a product
with a matrix, of which there is just the beginning, and in it the addresses of the weights.
"""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from elm_mlx import blas
from elm_mlx.model import described, lora_layers
from elm_mlx.model.attention import Mask, attention
from elm_mlx.model.described import FEED, MARK, READ, WRITE
from elm_mlx.model.lora_layers import DoRALinear, LoRALinear
from elm_mlx.model.rope import Rope
from elm_mlx.model.stored_layers import StoredLayer

MOST_ROWS = 16  # whose results have the same bits whatever their number; more want elm_mlx_many_rows
_ABREAST = 3  # columns of a tile, as in cblas.c
_making = threading.Lock()  # or a thread's layers would end those with which another has not computed yet
_NO_NORM, _ROOT_MEAN_SQUARE, _CENTRED = range(3)


class Norm(ctypes.Structure):
    """A norm, as `sublayers.c` has it."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("eps", ctypes.c_float), ("kind", ctypes.c_int), ("n", ctypes.c_int),
    )  # fmt: skip


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("down", ctypes.c_void_p), ("up", ctypes.c_void_p),
        ("ratio", ctypes.c_void_p), ("outputs", ctypes.c_int), ("inputs", ctypes.c_int), ("rank", ctypes.c_int),
        ("low", ctypes.c_int),
    )  # fmt: skip


class _Sublayer(ctypes.Structure):
    _fields_ = (
        ("head", ctypes.c_ubyte * (MARK + 4)), ("width", ctypes.c_int), ("heads", ctypes.c_int),
        ("key_heads", ctypes.c_int), ("head_dim", ctypes.c_int), ("rotated", ctypes.c_int), ("gated", ctypes.c_int),
        ("before", Norm), ("queries", Norm), ("keys", Norm), ("after", Norm),
        ("first", _Linear * 3), ("last", _Linear),
    )  # fmt: skip


@dataclass(frozen=True)
class LayerParts:
    """The modules of a transformer's layer: `x + after(attention(before(x)))`, and the same with the FFN.

    Attributes:
        projections: of queries, keys and values, or of all three.
        query_norm, key_norm: over a head, or over all of them, before RoPE.
        ffn_first: of gates and what they multiply, or of both; where it is not `gated`, of the FFN's inner values.
        window: the positions that it sees at most; None for all.
        rope: layers with the same one share its sines.
    """

    projections: Sequence[nn.Module]
    output: nn.Module
    ffn_first: Sequence[nn.Module]
    ffn_last: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    gated: bool = True
    window: int | None = None
    before: nn.Module | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    after: nn.Module | None = None
    ffn_before: nn.Module | None = None
    ffn_after: nn.Module | None = None

    def modules(self) -> list[nn.Module]:
        norms = (self.before, self.query_norm, self.key_norm, self.after, self.ffn_before, self.ffn_after)
        linears = (*self.projections, self.output, *self.ffn_first, self.ffn_last)
        return [*linears, *(norm for norm in norms if norm is not None)]


class LayersInC:
    """The layers of a transformer.

    Attributes:
        norm: the module behind them.
        last: the same, where `sublayers.c` knows it.
        width: of the residual stream.

    Raises:
        _Other: a part is none that `sublayers.c` knows, or not in float32.
    """

    def __init__(self, layers: Sequence[LayerParts], last: nn.Module) -> None:
        self.layers = [_Layer(parts) for parts in layers]
        self.width = self.layers[0].width
        self.norm = last
        self._weights: list[mx.array] = []
        try:
            self.last: Norm | None = _norm(last, self._weights, self.width)
        except _Other:
            self.last = None
        self._made_of = _made_of(layers, last)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a model makes its own, by the addresses of its own weights."""

    def is_of(self, layers: Sequence[LayerParts], last: nn.Module) -> bool:
        """Returns whether these are the same modules, with the weights that they had."""
        now = _made_of(layers, last)
        return len(now) == len(self._made_of) and all(map(operator.is_, now, self._made_of))

    def __call__(
        self,
        x: mx.array,
        caches: Sequence[Any],
        last: int | None = None,
        on_layer: Callable[[mx.array], None] | None = None,
    ) -> mx.array:
        """`(batch, length, model_dim)` to the same, but for the last norm; keys and values join `caches`.

        `last` of one text's positions may be all that are wanted, `(1, last, model_dim)`. `on_layer` is called with
        what enters each layer, `(batch, length, model_dim)`.
        """
        batch, length, width = x.shape
        x = x.reshape(-1, width)
        offset = caches[0].offset
        if not isinstance(offset, int):
            offset = mx.array(offset)  # a cache may count on in the array itself
        text_length = getattr(caches[0], "text_length", 0)
        turns: dict[int, mx.array] = {}
        masks: dict[int | None, Mask] = {}
        for layer, cache in zip(self.layers, caches, strict=True):
            rope, window = layer.parts.rope, layer.parts.window
            if id(rope) not in turns:
                turns[id(rope)] = mx.broadcast_to(
                    rope.turns(length, offset, text_length), (batch, length, 2 * rope.head_dim)
                ).reshape(-1, 2 * rope.head_dim)
            if window not in masks:
                masks[window] = cache.make_mask(length, return_array=False, window_size=window)
            if on_layer is not None:
                on_layer(x.reshape(batch, length, width))
            wanted = length if last is None or layer is not self.layers[-1] else last
            x = layer(x, batch, length, wanted, masks[window], turns[id(rope)], cache)
        return x.reshape(batch, -1, width)


def _made_of(layers: Sequence[LayerParts], last: nn.Module) -> list[Any]:
    modules = [last, *(module for parts in layers for module in parts.modules())]
    return [part for module in modules for part in _parts(module)]


def _parts(module: nn.Module) -> list[Any]:
    if isinstance(module, LoRALinear):
        adapter = [module.get(name) for name in lora_layers.PARAMETERS]
        return [module, module.training, module.scale, *adapter, *_parts(module.linear)]
    return [module, module.get("weight"), module.get("bias")]


class _Layer:
    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts
        self._weights: list[mx.array] = []
        heads = parts.heads + 2 * parts.kv_heads
        last = self._linear(parts.ffn_last)
        self.width = width = last.outputs
        self._words: list[mx.array] = []
        read = _Sublayer(
            width=width, heads=parts.heads, key_heads=parts.kv_heads, head_dim=parts.head_dim,
            rotated=parts.rope.config.dims, before=self._norm(parts.before), queries=self._norm(parts.query_norm),
            keys=self._norm(parts.key_norm), first=self._linears(parts.projections),
        )  # fmt: skip
        write = _Sublayer(width=width, after=self._norm(parts.after), last=self._linear(parts.output))
        feed = _Sublayer(
            width=width, gated=parts.gated, before=self._norm(parts.ffn_before),
            after=self._norm(parts.ffn_after), first=self._linears(parts.ffn_first), last=last,
        )  # fmt: skip
        made = zip(
            (READ, WRITE, FEED),
            (read, write, feed),
            (width + 2 * parts.head_dim, parts.heads * parts.head_dim, width),
            (heads * parts.head_dim, width, width),
            strict=True,
        )
        self._read, self._write, self._feed = (self._matrix(*each) for each in made)

    def __call__(
        self, x: mx.array, batch: int, length: int, last: int, mask: Mask, turns: mx.array, cache: Any
    ) -> mx.array:
        """Rows `(batch * length, model_dim)` to the same, of the `last` positions of each text.

        `turns` are the cosines and sines of each.
        """
        parts = self.parts
        heads = self._with_weights(mx.concatenate([x, turns], axis=-1) @ self._read)
        heads = heads.reshape(batch, length, -1, parts.head_dim)
        heads = heads.reshape(batch, -1, 1, parts.head_dim) if length == 1 else heads.swapaxes(1, 2)
        queries, keys, values = mx.split(heads, [parts.heads, parts.heads + parts.kv_heads], axis=1)
        keys, values = cache.update_and_fetch(keys, values)
        out = attention(queries, keys, values, parts.head_dim**-0.5, mask)
        if length > 1:
            out = out.swapaxes(1, 2)
        if last < length:
            x, out = x.reshape(batch, length, -1)[:, -last:].reshape(batch * last, -1), out[:, -last:]
        return self._with_weights(mx.addmm(x, out.reshape(batch * last, -1), self._write) @ self._feed)

    def _with_weights(self, y: mx.array) -> mx.array:
        """Keeps the weights until `y` is computed, as a product of MLX's own would: the layer may be gone by then."""
        return mx.depends([y], self._weights)[0]

    @property
    def addresses(self) -> list[int]:
        """Where the three are described."""
        return [described.address(words) for words in self._words]

    def _norm(self, norm: nn.Module | None) -> Norm:
        return Norm(kind=_NO_NORM) if norm is None else _norm(norm, self._weights)

    def _linear(self, linear: nn.Module) -> _Linear:
        if type(linear) in (LoRALinear, DoRALinear):
            return self._adapted(linear)
        bias = _address(linear, "bias", self._weights) if "bias" in linear else None
        if isinstance(linear, StoredLayer):
            handle = linear.handle()
            if handle is None:
                raise _Other
            self._weights.append(handle)
            address, shape = linear.address, handle.shape
        elif type(linear) is nn.Linear:
            address, shape = _address(linear, "weight", self._weights), linear.weight.shape
        else:
            raise _Other
        return _Linear(weight=address, bias=bias, outputs=shape[0], inputs=shape[1])

    def _adapted(self, module: LoRALinear) -> _Linear:
        """Describes a linear and its adapter, of which it keeps a copy."""
        if module.training:  # with a dropout
            raise _Other
        made = self._linear(module.linear)
        made.rank = rank = module.lora_a.shape[1]
        made.low = rank + -rank % _ABREAST
        made.down = self._copied(mx.pad(module.scale * module.lora_a.T, [(0, made.low - rank), (0, 0)]))
        made.up = self._copied(module.lora_b)
        if isinstance(module, DoRALinear):
            made.ratio = self._copied(module.ratio())
        return made

    def _copied(self, values: mx.array) -> int:
        """Returns where the values are in float32; they are kept."""
        values = mx.contiguous(values.astype(mx.float32))
        mx.eval(values)
        self._weights.append(values)
        return described.address(values)

    def _linears(self, linears: Sequence[nn.Module]) -> Any:
        return (_Linear * 3)(*map(self._linear, linears))

    def _matrix(self, kind: int, spec: _Sublayer, inputs: int, outputs: int) -> mx.array:
        words = described.description(kind, bytes(spec)[len(spec.head) :])
        self._words.append(words)
        return described.matrix(words, inputs, outputs)


def _norm(norm: nn.Module, weights: list[mx.array], width: int = 0) -> Norm:
    """Describes a norm, whose weight joins `weights`; `width` is that of what has none. Raises _Other."""
    if isinstance(norm, nn.LayerNorm) and not norm.parameters():
        return Norm(kind=_CENTRED, eps=norm.eps, n=width)
    if not isinstance(norm, nn.Module) or set(norm.parameters()) != {"weight"} or not hasattr(norm, "eps"):
        raise _Other
    if getattr(norm, "written_out", False):  # to be measured as it is
        raise _Other
    return Norm(_address(norm, "weight", weights), norm.eps, _ROOT_MEAN_SQUARE, norm.weight.size)


def _address(module: nn.Module, name: str, weights: list[mx.array]) -> int:
    """Returns where a weight's numbers are; it joins `weights`. Raises _Other."""
    weight = module[name]
    if weight.dtype != mx.float32:
        raise _Other
    mx.eval(weight)
    if not memoryview(weight).c_contiguous:
        raise _Other
    weights.append(weight)
    return described.address(weight)


class _Other(Exception):
    """A layer is not of the parts that `sublayers.c` knows."""


def layers_in_c(
    model: nn.Module, rows: int, layers: Callable[[], Sequence[LayerParts]], last: nn.Module
) -> LayersInC | None:
    """Returns the layers of `model` for so many rows, made once and kept with it; None where they cannot be made.

    `last` is the norm behind them.
    """
    if described.library() is None or (rows > MOST_ROWS and not blas.computes_many_rows()):
        return None
    with _making:
        kept, parts = getattr(model, "_layers_in_c", None), layers()
        if kept is None or not kept.is_of(parts, last):
            try:
                kept = LayersInC(parts, last)
            except _Other:
                kept = None
            object.__setattr__(model, "_layers_in_c", kept)  # beside the model's parts, not one of them
        return kept


def retire(words: mx.array) -> None:
    """Makes a description invalid when products by it that run are done; then what it tells of may be freed."""
    library = blas.own("elm_mlx_retire")
    assert library is not None
    library.elm_mlx_retire(ctypes.c_void_p(described.address(words)))
