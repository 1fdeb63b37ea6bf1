"""Three operations whose best form depends on the device: a gate, attention, and the exponential in both.

Knows arithmetic and nothing of the network. On a GPU, and for little data anywhere, each is MLX's own. MLX's
CPU loops take 9 ns for an exponential and 13 for a sigmoid, a hundred times what a product takes; before
prefill was written with the polynomial below, the FFN's gates and attention's softmax cost more than half of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from elm_mlx import device


@dataclass(frozen=True)
class Segments:
    """A mask for several texts in a row: causal, and each position sees those of its own number alone.

    Attributes:
        numbers: `(batch, length)` integers.
        reach: positions that no text exceeds, so that what lies farther back is not looked at; None for all of a row.
    """

    numbers: mx.array
    reach: int | None = None

    def seen(self) -> mx.array:
        """The same as a boolean `(batch, 1, length, length)`."""
        positions = mx.arange(self.numbers.shape[1])
        same = self.numbers[:, None, :, None] == self.numbers[:, None, None, :]
        return same & (positions <= positions[:, None])


Mask: TypeAlias = mx.array | Segments | str | None

# 2**f for f in [-1/2, 1/2], constant first: least squares of the relative error at Chebyshev nodes (8e-8).
_POWER_OF_TWO = (1.0000001, 0.69314694, 0.24022122, 0.055507425, 0.009675460, 0.0013266970)
_ROUNDER = 1.5 * 2**23  # adding and taking it off rounds a float32 to the nearest whole number
_LITTLE = 1 << 14  # values below which one slow pass is cheaper than twenty fast ones
_BLOCK_SCORES = 1 << 18  # scores computed at once: they should stay in a core's cache


def silu(x: mx.array) -> mx.array:
    """`x * sigmoid(x)`, elementwise."""
    if _mlx_is_best(x, x.size):
        return nn.silu(x) if device.on_gpu() else x * mx.sigmoid(x)
    return _silu(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up` (Shazeer, 2020)."""
    return silu(gate) * up if _mlx_is_best(gate, gate.size) else _swiglu(gate, up)


def exp(x: mx.array) -> mx.array:
    """`exp(x)` elementwise, for `x` up to 87; below -87 it is 1e-38 rather than less."""
    return mx.exp(x) if _mlx_is_best(x, x.size) else _derivable_exp(mx.maximum(x, -87.0))


def kl_divergences(before: mx.array, after: mx.array) -> mx.array:
    """Kullback-Leibler divergence of `after` from `before`, both `(length, vocab_size)` log-probabilities, at each
    position in nats."""
    return mx.maximum((mx.exp(before) * (before - after)).sum(axis=-1), 0)


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """Softmax attention of `(batch, heads, length, head_dim)` on `(batch, kv_heads, positions, head_dim)`.

    `mask` is None, "causal" (the last query sees all positions), `Segments` (as many queries as positions), or
    boolean `(…, length, positions)`.
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads, positions = keys.shape[1], keys.shape[2]
    segments = mask if isinstance(mask, Segments) else None
    if segments and (length == 1 or _mlx_is_best(queries, batch * heads * length * positions)):
        mask = segments.seen()
    if length == 1 and not device.on_gpu():  # the queries that share a head are rows of one product
        grouped = queries.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        out = mx.fast.scaled_dot_product_attention(grouped, keys, values, scale=scale, mask=mask)
        return out.reshape(batch, heads, 1, head_dim)
    if isinstance(mask, mx.array) or mask is None or _mlx_is_best(queries, batch * heads * length * positions):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    return _causal_attention(queries, keys, values, scale, segments)


def _causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, segments: Segments | None
) -> mx.array:
    """In blocks of queries, with derivatives that compute each block's weights again rather than keep them.

    Kept, they and what they were made of would be most of what a training step holds in memory.
    """
    batch, heads, length, _ = queries.shape
    blocks = _blocks(batch * heads, length, keys.shape[2], segments.reach if segments else None)

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        parts = []
        for start, stop, seen in blocks:
            scores = _block_scores(queries[:, :, start:stop] * scale, keys, seen, segments)
            parts.append(_attend_block(scores, values[:, :, seen]))
        if len(parts) == 1:
            return parts[0]
        return tuple(mx.concatenate(part, axis=2) for part in zip(*parts, strict=True))

    @attend.vjp
    def derive(primals: tuple[mx.array, ...], cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        queries, keys, values = primals
        out, log_sums = outputs
        along = (cotangents[0] * out).sum(axis=-1, keepdims=True)
        query_grads: list[mx.array] = []
        key_grad, value_grad = mx.zeros_like(keys), mx.zeros_like(values)
        for start, stop, seen in blocks:
            part = queries[:, :, start:stop] * scale
            if query_grads:  # one block after the other, or all blocks' scores would be in memory together
                part = mx.depends([part], [query_grads[-1], key_grad, value_grad])[0]
            scores = _block_scores(part, keys, seen, segments)
            weights = _exp(mx.maximum(scores - log_sums[:, :, start:stop], -87.0))
            query_part, key_part, value_part = _derive_block(
                part, keys[:, :, seen], values[:, :, seen], weights, cotangents[0][:, :, start:stop],
                along[:, :, start:stop],
            )  # fmt: skip
            query_grads.append(query_part * scale)
            key_grad[:, :, seen] += key_part
            value_grad[:, :, seen] += value_part
        return mx.concatenate(query_grads, axis=2), key_grad, value_grad

    return attend(queries, keys, values)[0]


def _blocks(heads: int, length: int, positions: int, reach: int | None) -> list[tuple[int, int, slice]]:
    """Runs of the last `length` positions' queries: the first, the one after the last, and the positions they see."""
    if reach is None:
        rows, back = _BLOCK_SCORES // (heads * positions), positions
    else:  # a block of `rows` queries sees `rows + reach` positions
        rows, back = (math.isqrt(reach * reach + 4 * _BLOCK_SCORES // heads) - reach) // 2, reach - 1
    rows, before = max(32, rows), positions - length
    runs = ((start, min(start + rows, length)) for start in range(0, length, rows))
    return [(start, stop, slice(max(0, before + start - back), before + stop)) for start, stop in runs]


def _block_scores(queries: mx.array, keys: mx.array, seen: slice, segments: Segments | None) -> mx.array:
    """Scores of a run of queries, the last of which stands at the end of the positions `seen`.

    Others are not computed at all.
    """
    batch, heads, rows, head_dim = queries.shape
    kv_heads, count = keys.shape[1], seen.stop - seen.start
    grouped = queries.reshape(batch, kv_heads, -1, head_dim)
    scores = (grouped @ keys[:, :, seen].swapaxes(2, 3)).reshape(batch, heads, rows, count)
    hidden = mx.arange(count) > mx.arange(count - rows, count)[:, None]
    if segments is not None:
        numbers = segments.numbers[:, None, None, seen]
        hidden = hidden | (numbers.swapaxes(2, 3)[:, :, count - rows :] != numbers)
    return mx.where(hidden, -1e30, scores)


def _attend_block(scores: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """Attention by `scores`, and the logarithm of what each row's exponentials sum to."""
    batch, heads, rows, seen = scores.shape  # of `values` as many positions
    kv_heads, head_dim = values.shape[1], values.shape[3]
    largest = scores.max(axis=-1, keepdims=True)
    weights = _exp(mx.maximum(scores - largest, -87.0))
    sums = weights.sum(axis=-1, keepdims=True)
    out = (weights.reshape(batch, kv_heads, -1, seen) @ values).reshape(batch, heads, rows, head_dim)
    return out / sums, largest + mx.log(sums)


def _derive_block(
    queries: mx.array, keys: mx.array, values: mx.array, weights: mx.array, cotangent: mx.array, along: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Cotangents of scaled queries, keys and values, the latter two of the positions that the block sees.

    `along` is the cotangent's product with the output, row by row: what the softmax takes off each score's.
    """
    batch, kv_heads = keys.shape[:2]

    def grouped(x: mx.array) -> mx.array:
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    value_grad = grouped(weights).swapaxes(2, 3) @ grouped(cotangent)
    weight_grad = (grouped(cotangent) @ values.swapaxes(2, 3)).reshape(weights.shape)
    score_grad = grouped(weights * (weight_grad - along))
    query_grad = (score_grad @ keys).reshape(queries.shape)
    return query_grad, score_grad.swapaxes(2, 3) @ grouped(queries), value_grad


@mx.custom_function
def _silu(x: mx.array) -> mx.array:
    x = mx.maximum(x, -87.0)  # where it is 1e-36 from 0
    return x / _one_and_exp(-x)


@_silu.vjp
def _(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    x = mx.maximum(x, -87.0)
    share = 1 / _one_and_exp(-x)
    return cotangent * share * (1 + x * (1 - share))


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    gate = mx.maximum(gate, -87.0)
    return gate / _one_and_exp(-gate) * up


@_swiglu.vjp
def _(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    gate = mx.maximum(gate, -87.0)
    share = 1 / _one_and_exp(-gate)  # again, rather than kept: gate and up are in memory anyway
    return cotangent * up * share * (1 + gate * (1 - share)), cotangent * gate * share


def _one_and_exp(x: mx.array) -> mx.array:
    return 1 + _exp(mx.maximum(x, -87.0))


def _exp(x: mx.array) -> mx.array:
    """`exp(x)` of float32 within [-87, 87], in passes that vectorise; to 3e-7 of its value near 0, 4e-6 at the ends.

    Only for functions that say what their derivatives are: this one's would be nonsense, for the rounding in it. One
    that is custom holds on to what it is given, which could else be overwritten, and prefill would be slower for it.
    """
    x = x * math.log2(math.e)
    whole = (x + _ROUNDER) - _ROUNDER
    part = x - whole
    power = mx.array(_POWER_OF_TWO[-1])
    for coefficient in reversed(_POWER_OF_TWO[:-1]):
        power = power * part + coefficient
    return power * ((whole.astype(mx.int32) + 127) << 23).view(mx.float32)


@mx.custom_function
def _derivable_exp(x: mx.array) -> mx.array:
    return _exp(x)


@_derivable_exp.vjp
def _(_: mx.array, cotangent: mx.array, power: mx.array) -> mx.array:
    return cotangent * power


def _mlx_is_best(x: mx.array, size: int) -> bool:
    return device.on_gpu() or x.dtype != mx.float32 or size < _LITTLE
