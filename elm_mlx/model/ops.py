"""Operations whose best form depends on the device: gates, softmax of logits, and the exponential in them.

On a GPU, and for little data anywhere, each is MLX's own. MLX's CPU loops take 9 ns for an exponential and 13 for a
sigmoid, a hundred times as long as a product; before prefill was written with the polynomial below, the FFN's gates and
attention's softmax took more than half of it.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from elm_mlx import device
from elm_mlx.model import described

# 2**f for f in [-1/2, 1/2], constant first: least squares of the relative error at Chebyshev nodes (8e-8).
_POWER_OF_TWO = (1.0000001, 0.69314694, 0.24022122, 0.055507425, 0.009675460, 0.0013266970)
_ROUNDER = 1.5 * 2**23  # adding and taking it off rounds a float32 to the nearest whole number
_DESCRIBED, _EXACT = 16, 1 << 24  # columns whose matrix has room for a description; whole numbers that float32 has
_LITTLE = 1 << 14  # values below which one slow pass is cheaper than twenty fast ones


def mlx_is_best(x: mx.array, size: int) -> bool:
    """Returns whether MLX's own operation is taken for so many values."""
    return device.on_gpu() or x.dtype != mx.float32 or size < _LITTLE


def silu(x: mx.array) -> mx.array:
    """`x * sigmoid(x)`, elementwise."""
    if mlx_is_best(x, math.prod(x.shape[-2:])):  # whatever its company, a row of a batch gets the same function
        return nn.silu(x) if device.on_gpu() else x * mx.sigmoid(x)
    return _silu(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up` (Shazeer, 2020)."""
    return silu(gate) * up if mlx_is_best(gate, math.prod(gate.shape[-2:])) else _swiglu(gate, up)


def exp(x: mx.array) -> mx.array:
    """`exp(x)` elementwise, for `x` up to 87; below -87 it is 1e-38 rather than less."""
    return mx.exp(x) if mlx_is_best(x, x.size) else _derivable_exp(mx.maximum(x, -87.0))


def fast_exp(x: mx.array) -> mx.array:
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


def tanh(x: mx.array) -> mx.array:
    """`tanh(x)` elementwise, whose bits don't depend on what is beside a number."""
    return mx.tanh(x) if device.on_gpu() or x.dtype != mx.float32 else _tanh(x)


def logsumexp(logits: mx.array) -> mx.array:
    """Returns the logarithm of the sum of the last axis' exponentials: `(..., vocab_size)` to `(...)`."""
    if _chooses(logits):
        rows = mx.contiguous(logits.reshape(-1, logits.shape[-1]))
        return (rows @ described.chooser(logits.shape[-1]))[:, 0].reshape(logits.shape[:-1])
    if mlx_is_best(logits, 2 * logits.shape[-1]):  # it depends on no other row
        return mx.logsumexp(logits, axis=-1)
    top = logits.max(axis=-1, keepdims=True)
    return (top + mx.log(fast_exp(mx.maximum(logits - top, -87.0)).sum(axis=-1, keepdims=True))).squeeze(-1)


def likeliest(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Returns of logits `(rows, vocab_size)` the likeliest tokens and the logarithms of their probabilities."""
    if _chooses(logits):
        log_sums, tops, places = mx.split(mx.contiguous(logits) @ described.chooser(logits.shape[-1]), 3, axis=-1)
        return places[:, 0].astype(mx.uint32), (tops - log_sums)[:, 0]
    tokens = mx.argmax(logits, axis=-1)
    return tokens, mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - logsumexp(logits)


def ascending(x: mx.array) -> mx.array:
    """Returns of `(rows, n)` the places of each row's numbers from the least on, equals in their order."""
    if _chooses(x) and _DESCRIBED <= x.shape[-1] < _EXACT:
        return (mx.contiguous(x) @ described.orderer(x.shape[-1])).astype(mx.uint32)
    return mx.argsort(x, axis=-1)


def weights(logits: mx.array) -> mx.array:
    """Returns probabilities but for a factor, of which the largest of logits `(rows, vocab_size)` has 1."""
    below = logits - logits.max(axis=-1, keepdims=True)
    if mlx_is_best(logits, logits.shape[-1]):  # it depends on no other row
        return mx.exp(below)
    return mx.where(below < -87.0, 0.0, fast_exp(mx.maximum(below, -87.0)))


def _chooses(logits: mx.array) -> bool:
    return logits.dtype == mx.float32 and described.library() is not None


def kl_divergences(before: mx.array, after: mx.array) -> mx.array:
    """Returns the Kullback-Leibler divergence of `after` from `before` at each position, in nats.

    Both are log-probabilities, `(length, vocab_size)`.
    """
    return mx.maximum((mx.exp(before) * (before - after)).sum(axis=-1), 0)


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
    return 1 + fast_exp(mx.maximum(x, -87.0))


@mx.custom_function
def _derivable_exp(x: mx.array) -> mx.array:
    return fast_exp(x)


@_derivable_exp.vjp
def _(_: mx.array, cotangent: mx.array, power: mx.array) -> mx.array:
    return cotangent * power


@mx.custom_function
def _tanh(x: mx.array) -> mx.array:
    return 1 - 2 / (fast_exp(mx.clip(2 * x, -87.0, 87.0)) + 1)


@_tanh.vjp
def _(_: mx.array, cotangent: mx.array, found: mx.array) -> mx.array:
    return cotangent * (1 - found * found)
