"""Three operations whose best form depends on the device: a gate, attention, and the exponential in both.

Knows arithmetic and nothing of the network. On a GPU, and for little data anywhere, each is MLX's own. MLX's
CPU loops take 9 ns for an exponential and 13 for a sigmoid, a hundred times what a product takes; before
prefill was written with the polynomial below, the FFN's gates and attention's softmax cost more than half of it.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn

from elm_mlx import device

Mask: TypeAlias = mx.array | str | None

# 2**f for f in [-1/2, 1/2], constant first: least squares of the relative error at Chebyshev nodes (8e-8).
_POWER_OF_TWO = (1.0000001, 0.69314694, 0.24022122, 0.055507425, 0.009675460, 0.0013266970)
_ROUNDER = 1.5 * 2**23  # adding and taking it off rounds a float32 to the nearest whole number
_LITTLE = 1 << 14  # values below which one slow pass is cheaper than twenty fast ones
_BLOCK_SCORES = 1 << 18  # scores computed at once: they should stay in a core's cache


def silu(x: mx.array) -> mx.array:
    """`x * sigmoid(x)`, elementwise."""
    if _mlx_is_best(x, x.size):
        return nn.silu(x) if device.on_gpu() else x * mx.sigmoid(x)
    x = mx.maximum(x, -87.0)  # where it is 1e-36 from 0
    return x / (1 + _exp(mx.maximum(-x, -87.0)))


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up` (Shazeer, 2020)."""
    return silu(gate) * up


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """Softmax attention of `(batch, heads, length, head_dim)` on `(batch, kv_heads, positions, head_dim)`.

    `mask` is None, "causal" (the last query sees all positions), or boolean `(…, length, positions)`.
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads, positions = keys.shape[1], keys.shape[2]
    if length == 1 and not device.on_gpu():  # the queries that share a head are rows of one product
        grouped = queries.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        out = mx.fast.scaled_dot_product_attention(grouped, keys, values, scale=scale, mask=mask)
        return out.reshape(batch, heads, 1, head_dim)
    if mask != "causal" or _mlx_is_best(queries, batch * heads * length * positions):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    rows = max(32, _BLOCK_SCORES // (batch * heads * positions))
    blocks = [
        _attend_block(queries[:, :, start : start + rows], keys, values, scale, start - length)
        for start in range(0, length, rows)
    ]
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _attend_block(queries: mx.array, keys: mx.array, values: mx.array, scale: float, start: int) -> mx.array:
    """Causal attention of a run of queries, the first of which stands `-start` positions before the end.

    Positions after the last query are not computed at all.
    """
    batch, heads, rows, head_dim = queries.shape
    kv_heads, end = keys.shape[1], keys.shape[2]
    seen = end + start + rows
    grouped = (queries * scale).reshape(batch, kv_heads, -1, head_dim)
    scores = (grouped @ keys[:, :, :seen].swapaxes(2, 3)).reshape(batch, heads, rows, seen)
    later = mx.arange(seen) > mx.arange(seen - rows, seen)[:, None]
    scores = mx.where(later, -1e30, scores)
    weights = _exp(mx.maximum(scores - scores.max(axis=-1, keepdims=True), -87.0))
    out = (weights.reshape(batch, kv_heads, -1, seen) @ values[:, :, :seen]).reshape(batch, heads, rows, head_dim)
    return out / weights.sum(axis=-1, keepdims=True)


def _exp(x: mx.array) -> mx.array:
    """`exp(x)` of float32 within [-87, 87], in passes that vectorise; to 3e-7 of its value near 0, 4e-6 at the ends."""
    x = x * math.log2(math.e)
    whole = mx.stop_gradient((x + _ROUNDER) - _ROUNDER)  # or it would take all of the derivative
    part = x - whole
    power = mx.array(_POWER_OF_TWO[-1])
    for coefficient in reversed(_POWER_OF_TWO[:-1]):
        power = power * part + coefficient
    return power * ((whole.astype(mx.int32) + 127) << 23).view(mx.float32)


def _mlx_is_best(x: mx.array, size: int) -> bool:
    return device.on_gpu() or x.dtype != mx.float32 or size < _LITTLE
