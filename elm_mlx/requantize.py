"""A changed weight back into the integers of a quantized one.

Knows MLX's affine format: groups of a row, each with a scale and a bias, and the integers one after another in words
of 32 bits. What was quantized before lies on that grid exactly. A fit to the new extremes moves the grid under every
weight of a group, which costs far more than a small change gives; so a group keeps its grid wherever that comes nearer.
"""

from __future__ import annotations

import mlx.core as mx

_ROWS = 1024  # at once: a few float32 copies of so many are in memory together


def requantize(
    weight: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> tuple[mx.array, mx.array, mx.array, int]:
    """`weight` on the grid of what it was, group by group, or on a new one where that is nearer to it.

    Args:
        weight: `(rows, columns)`, float32.
        packed, scales, biases: of what it was, `(rows, columns * bits / 32)` and `(rows, columns / group_size)`.

    Returns:
        The same three of `weight`, and how many of its values are other ones than before.
    """
    made: list[tuple[mx.array, ...]] = []
    moved = 0
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        *parts, changed = _rows(weight[rows], packed[rows], scales[rows], biases[rows], group_size, bits)
        mx.eval(parts, changed)
        made.append(tuple(parts))
        moved += int(changed.item())
        mx.clear_cache()
    words, new_scales, new_biases = (mx.concatenate(parts) for parts in zip(*made, strict=True))
    return words, new_scales, new_biases, moved


def pack(codes: mx.array, bits: int) -> mx.array:
    """Integers `(rows, columns)` below 2 ** bits as MLX's words, `(rows, columns * bits / 32)`, the first lowest."""
    runs = codes.astype(mx.uint32).reshape(codes.shape[0], -1, 32)  # of so many integers as many words as bits
    words = [mx.zeros(runs.shape[:2], mx.uint32)] * bits
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (runs[..., i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (runs[..., i] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(codes.shape[0], -1)


def _rows(
    weight: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    groups = weight.reshape(weight.shape[0], -1, group_size)
    kept, kept_values = _nearest(groups, scales, biases, bits)
    fit = mx.quantize(weight, group_size=group_size, bits=bits)[1:]
    new_scales, new_biases = (value.astype(scales.dtype) for value in fit)
    fitted, fitted_values = _nearest(groups, new_scales, new_biases, bits)
    moves = _error(fitted_values, groups) < _error(kept_values, groups)
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    before = mx.dequantize(packed, ones, zeros, group_size=group_size, bits=bits).reshape(groups.shape)
    values = mx.where(moves[..., None], fitted_values, kept_values)
    return (
        pack(mx.where(moves[..., None], fitted, kept).reshape(weight.shape), bits),
        mx.where(moves, new_scales, scales),
        mx.where(moves, new_biases, biases),
        (values != _values(before, scales, biases)).sum(),
    )


def _nearest(groups: mx.array, scales: mx.array, biases: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """The integers whose values stand nearest to `groups`, `(rows, groups, group_size)`, and those values."""
    scale, bias = scales.astype(mx.float32)[..., None], biases.astype(mx.float32)[..., None]
    step = mx.where(scale == 0, 1, scale)  # of a group whose weights are all alike, the bias
    codes = mx.clip(mx.round((groups - bias) / step), 0, 2**bits - 1)
    return codes, _values(codes, scales, biases)


def _values(codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    return codes * scales.astype(mx.float32)[..., None] + biases.astype(mx.float32)[..., None]


def _error(values: mx.array, groups: mx.array) -> mx.array:
    return mx.square(values - groups).sum(axis=-1)
