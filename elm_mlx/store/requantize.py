"""A changed weight back into the integers of a quantized one.

Knows MLX's affine format: groups of a row, each with a scale and a bias, and the integers one after another in words
of 32 bits. What was quantized before lies on that grid exactly. Knows three ways, none of which is always best:

- NEAREST: the integer that comes nearest, on the grid that was there, or on a new one where that comes nearer for the
  group. Adds the least error to each weight, but a change of less than half a step is lost, of a small adapter all.
- LOT: on the grid that was there, one of the two integers around the new value, drawn so that its mean is that value
  (stochastic rounding; Croci et al., 2022, section 2). What is lost of one weight another has too much of: a change of
  low rank, which speaks in the sum over thousands of weights, comes through.
- ANEW: a new grid for every group. Moves it under every weight, however small the change.
"""

from __future__ import annotations

import mlx.core as mx

WAYS = LOT, NEAREST, ANEW = "lot", "nearest", "anew"
_SAME = 1e-5  # of a step: what float32 makes of a value that lies on its grid
_ROWS = 1024  # at once: a few float32 copies of so many are in memory together


def requantize(
    weight: mx.array,
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group_size: int,
    bits: int,
    way: str = NEAREST,
    seed: int = 0,
) -> tuple[mx.array, mx.array, mx.array, int]:
    """`weight` in the format of what it was.

    Args:
        way: one of the three.
        seed: draws the lots: equal ones, equal bytes.
        weight: `(rows, columns)`, float32.
        packed, scales, biases: of what it was, `(rows, columns * bits / 32)` and `(rows, columns / group_size)`.

    Returns:
        The same three of `weight`, and how many of its values are other ones than before.
    """
    made: list[tuple[mx.array, ...]] = []
    moved = 0
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        before = (packed[rows], scales[rows], biases[rows])
        if way == LOT:
            key = mx.random.key((seed + start) % 2**32)
            *parts, changed = _by_lot(weight[rows], *before, group_size, bits, key)
        else:
            *parts, changed = _rows(weight[rows], *before, group_size, bits, anew=way == ANEW)
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
    weight: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, *, anew: bool
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    groups = weight.reshape(weight.shape[0], -1, group_size)
    kept, kept_values = _nearest(groups, scales, biases, bits)
    fit = mx.quantize(weight, group_size=group_size, bits=bits)[1:]
    new_scales, new_biases = (value.astype(scales.dtype) for value in fit)
    fitted, fitted_values = _nearest(groups, new_scales, new_biases, bits)
    moves = mx.ones(scales.shape, mx.bool_) if anew else _error(fitted_values, groups) < _error(kept_values, groups)
    before = _codes(packed, groups.shape, bits)
    values = mx.where(moves[..., None], fitted_values, kept_values)
    return (
        pack(mx.where(moves[..., None], fitted, kept).reshape(weight.shape), bits),
        mx.where(moves, new_scales, scales),
        mx.where(moves, new_biases, biases),
        (values != _values(before, scales, biases)).sum(),
    )


def _by_lot(
    weight: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, key: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    groups = weight.reshape(weight.shape[0], -1, group_size)
    before = _codes(packed, groups.shape, bits)
    steps = mx.abs(scales.astype(mx.float32)[..., None])
    change = (groups - _values(before, scales, biases)) / mx.where(steps == 0, mx.inf, steps)
    change = mx.where(mx.abs(change) < _SAME, 0, change) * mx.where(scales < 0, -1, 1)[..., None]
    codes = mx.clip(before + mx.floor(change + mx.random.uniform(shape=groups.shape, key=key)), 0, 2**bits - 1)
    return pack(codes.reshape(weight.shape), bits), scales, biases, (codes != before).sum()


def _codes(packed: mx.array, shape: tuple[int, ...], bits: int) -> mx.array:
    """The integers in `packed`, as float32 in groups: `(rows, groups, group_size)`."""
    ones, zeros = mx.ones(shape[:2]), mx.zeros(shape[:2])
    return mx.dequantize(packed, ones, zeros, group_size=shape[2], bits=bits).reshape(shape)


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
