"""Weights into GGML's blocks: MLX's packed weights as they stand where a type has the same grid, and floats rounded.

`gguf_blocks` is the way back, and has the types' layouts. Everything here is of whole rows, in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from elm_mlx_convert.gguf_blocks import GROUP

ROUNDED = ("Q4_0", "Q4_1", "Q8_0")  # what floats are rounded to here

Array = np.ndarray[Any, np.dtype[Any]]


def unpacked(words: Array, bits: int) -> Array:
    """Returns the codes in MLX's packed weights, `(rows, columns · bits / 32)` of uint32: `(rows, columns)` of uint8.

    A row is one number of columns · bits bits, of which the first code has the lowest.
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    if bits == 4:
        return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)
    each = np.unpackbits(data, axis=1, bitorder="little").reshape(len(data), -1, bits)
    return np.bitwise_or.reduce(each << np.arange(bits, dtype=np.uint8), axis=-1)


def affine_rows(kind: str, codes: Array, scales: Array, biases: Array) -> Array:
    """Returns the blocks of affine weights, `(rows, bytes)` of uint8: of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0.

    Args:
        codes: `(rows, columns)` of uint8.
        scales, biases: `(rows, columns / 32)` of float16. Those types that have no bias have the one that `codes` of
            a whole scale below zero need, and `biases` are not read.
    """
    codes = codes.reshape(len(codes), -1, GROUP)
    head = [scales] if kind in ("Q4_0", "Q5_0", "Q8_0") else [scales, biases]
    parts: list[Array] = [np.ascontiguousarray(each, "<f2")[..., None].view(np.uint8) for each in head]
    if kind == "Q8_0":
        parts.append(codes ^ 128)  # 0 … 255 above the bias, to -128 … 127
    else:
        if kind in ("Q5_0", "Q5_1"):
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        parts.append(_halves(codes & 15))
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def mxfp4_rows(codes: Array, exponents: Array) -> Array:
    """Returns the blocks of MLX's mxfp4: codes `(rows, columns)` and exponents `(rows, columns / 32)`, both uint8."""
    codes = codes.reshape(len(codes), -1, GROUP)
    return np.concatenate([exponents[..., None], _halves(codes)], axis=-1).reshape(len(codes), -1)


def rounded_rows(kind: str, values: Array) -> Array:
    """Returns `(rows, columns)` of float32 in the blocks of a type in ROUNDED, `(rows, bytes)` of uint8.

    They are rounded as llama.cpp does it (`ggml-quants.c`): the scale by the value that is farthest from zero, or of
    Q4_1 by the lowest and the highest, before it is itself rounded to float16. Values must be finite, and a scale that
    overflows float16 becomes infinite.
    """
    groups = np.ascontiguousarray(values, np.float32).reshape(len(values), -1, GROUP)
    low: Array = np.zeros((*groups.shape[:2], 1), np.float32)
    if kind == "Q8_0":
        steps = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    elif kind == "Q4_0":
        at = np.abs(groups).argmax(axis=-1)[..., None]
        steps = np.take_along_axis(groups, at, axis=-1) / np.float32(-8)
    else:
        low = groups.min(axis=-1, keepdims=True)
        steps = (groups.max(axis=-1, keepdims=True) - low) / np.float32(15)
    with np.errstate(divide="ignore"):
        inverse = np.where(steps == 0, np.float32(0), np.float32(1) / steps)
    places = (groups - low) * inverse
    if kind == "Q8_0":
        whole = np.trunc(places + np.copysign(np.float32(0.5), places))  # halves away from zero
        codes = (whole.astype(np.int16) + 128).astype(np.uint8)
    else:
        codes = np.minimum(np.trunc(places + np.float32(8.5 if kind == "Q4_0" else 0.5)), 15).astype(np.uint8)
    with np.errstate(over="ignore"):
        half, offset = (each[..., 0].astype(np.float16) for each in (steps, low))
    return affine_rows(kind, codes.reshape(len(codes), -1), half, offset)


def _halves(codes: Array) -> Array:
    """Returns codes of 4 bits, `(…, 32)`, two a byte, of which the low one is 16 places before the high one."""
    return codes[..., :16] | codes[..., 16:] << 4
