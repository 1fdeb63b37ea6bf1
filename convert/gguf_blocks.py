"""GGML's blocks of quantized weights: as MLX's packed weights where MLX has the same grid, and as float32.

A block is some tens of bytes, for 32 or 256 neighbours in a row: a scale or two in float16, and a code of a few bits
for each weight. MLX's affine mode has weight = scale · code + bias, with a scale and a bias for each 32 here. So
Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 are affine as they stand; so is IQ4_NL in 8 bits, whose 16 values are whole multiples of
its scale. Q4_K, Q5_K and IQ4_XS have such grids too, but the scales and biases are products of two numbers, of up to 17
bits: float32 holds them, float16 rounds them. Q2_K, Q3_K and Q6_K change scale every 16 weights, which no affine
grid of MLX does: they have values alone.

Everything here is of whole blocks, `(blocks, bytes)` of uint8, in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

GROUP = 32  # weights that share a scale in what is made here
# The bits of a code for MLX, and its mode.
GRIDS = {
    "Q4_0": (4, "affine"), "Q4_1": (4, "affine"), "Q5_0": (5, "affine"), "Q5_1": (5, "affine"), "Q8_0": (8, "affine"),
    "IQ4_NL": (8, "affine"), "IQ4_XS": (8, "affine"), "Q4_K": (4, "affine"), "Q5_K": (5, "affine"),
    "MXFP4": (4, "mxfp4"),
}  # fmt: skip
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DEQUANTIZED = ("Q2_K", "Q3_K", "Q6_K")
# Those whose scales and biases are products, which float16 rounds.
FINE_SCALES = ("Q4_K", "Q5_K", "IQ4_XS")

Array = np.ndarray[Any, np.dtype[Any]]

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_IQ4_CODES = (_IQ4 + 128).astype(np.uint8)
# Float codes of 4 bits (E2M1): a sign above two bits of exponent and one of fraction.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def codes(kind: str, blocks: Array) -> Array:
    """Returns the code of each weight, `(blocks, weights)` of uint8, of a type in GRIDS."""
    match kind:
        case "Q4_0":
            return _spread(blocks[:, 2:], 4, 16)
        case "Q4_1":
            return _spread(blocks[:, 4:], 4, 16)
        case "Q5_0":
            return _spread(blocks[:, 6:], 4, 16) | _spread(blocks[:, 2:6], 1, 1) << 4
        case "Q5_1":
            return _spread(blocks[:, 8:], 4, 16) | _spread(blocks[:, 4:8], 1, 1) << 4
        case "Q8_0":  # -128 … 127, and MLX's begin at 0
            return blocks[:, 2:] ^ 128
        case "IQ4_NL":
            return _IQ4_CODES[_spread(blocks[:, 2:], 4, 16)]
        case "IQ4_XS":
            return _IQ4_CODES[_spread(blocks[:, 8:], 4, 16)]
        case "Q4_K":
            return _spread(blocks[:, 16:], 4, 32)
        case "Q5_K":
            return _spread(blocks[:, 48:], 4, 32) | _spread(blocks[:, 16:48], 1, 32) << 4
        case _:
            assert kind == "MXFP4", kind
            return _spread(blocks[:, 1:], 4, 16)


def scales(kind: str, blocks: Array) -> Array:
    """Returns the scale of each GROUP, `(blocks, groups)`: float32, and of MXFP4 its exponent plus 127, as uint8."""
    match kind:
        case "MXFP4":
            return blocks[:, :1]
        case "Q4_K" | "Q5_K":
            return _half(blocks, 0) * _six_bits(blocks[:, 4:16])[0]
        case "IQ4_XS":
            return _half(blocks, 0) * _centred(_spread(blocks[:, 4:8], 4, 1), _spread(blocks[:, 2:4], 2, 1))
        case _:
            return _half(blocks, 0)


def biases(kind: str, blocks: Array) -> Array:
    """Returns the bias of each GROUP, `(blocks, groups)` of float32, of an affine type: what code 0 stands for."""
    match kind:
        case "Q4_1" | "Q5_1":
            return _half(blocks, 2)
        case "Q4_K" | "Q5_K":
            return -(_half(blocks, 2) * _six_bits(blocks[:, 4:16])[1])
        case _:
            return scales(kind, blocks) * np.float32({"Q4_0": -8, "Q5_0": -16}.get(kind, -128))


def values(kind: str, blocks: Array) -> Array:
    """Returns each weight, `(blocks, weights)` of float32, of a quantized type: the numbers that llama.cpp has."""
    if kind == "MXFP4":
        # 2**(e - 127), of which float32 has the smallest without a hidden bit.
        scale = np.ldexp(np.float32(1), scales(kind, blocks).astype(np.int32) - 127)
        return scale * _E2M1[codes(kind, blocks)]
    if kind in GRIDS:
        whole = codes(kind, blocks).reshape(len(blocks), -1, GROUP)
        return (scales(kind, blocks)[..., None] * whole + biases(kind, blocks)[..., None]).reshape(len(blocks), -1)
    if kind == "Q2_K":
        steps = _half(blocks, 80) * (blocks[:, :16] & 15)
        lows = _half(blocks, 82) * (blocks[:, :16] >> 4)
        return _by_16(steps, _spread(blocks[:, 16:80], 2, 32), lows)
    if kind == "Q3_K":
        steps = _half(blocks, 108) * _centred(_spread(blocks[:, 96:104], 4, 8), _spread(blocks[:, 104:108], 2, 4))
        whole = _spread(blocks[:, 32:96], 2, 32) | _spread(blocks[:, :32], 1, 32) << 2
        return _by_16(steps, whole.astype(np.int8) - 4)
    assert kind == "Q6_K", kind
    steps = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    whole = _spread(blocks[:, :128], 4, 64) | _spread(blocks[:, 128:192], 2, 32) << 4
    return _by_16(steps, whole.astype(np.int8) - 32)


def packed(whole: Array, bits: int) -> Array:
    """Returns codes `(rows, columns)` of uint8 as MLX packs them, `(rows, columns · bits / 32)` of uint32.

    A row is one number of columns · bits bits, of which the first code has the lowest.
    """
    rows = len(whole)
    if bits == 8:
        data = np.ascontiguousarray(whole)
    elif bits == 4:
        data = whole[:, ::2] | whole[:, 1::2] << 4
    else:
        eights = whole.reshape(rows, -1, 8).astype(np.uint64)
        numbers = np.bitwise_or.reduce(eights << np.arange(0, 8 * bits, bits, dtype=np.uint64), axis=-1)
        data = numbers.astype("<u8").view(np.uint8).reshape(rows, -1, 8)[..., :bits].reshape(rows, -1)
    return data.view("<u4")


def _spread(data: Array, bits: int, run: int) -> Array:
    """Returns `(blocks, bytes)` as `(blocks, bytes · 8 / bits)` numbers of so many bits.

    Of each `run` bytes all lowest bits come first, then all next ones.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = data.reshape(len(data), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return parts.reshape(len(data), -1)


def _half(blocks: Array, at: int) -> Array:
    """Returns the float16 at a byte of each block, `(blocks, 1)` of float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _six_bits(data: Array) -> tuple[Array, Array]:
    """Returns Q4_K's factors of 8 scales and 8 biases, `(blocks, 8)` each, from the 12 bytes that hold them.

    The first four of each are the low six bits of a byte; the last four have their low bits in the third four bytes,
    and their high ones above the others'.
    """
    first, second, low = data[:, :4], data[:, 4:8], data[:, 8:]
    return (
        np.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=1),
        np.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=1),
    )


def _centred(low: Array, high: Array) -> Array:
    """Returns numbers of four low and two high bits, less 32."""
    return (low | high << 4).astype(np.int8) - np.int8(32)


def _by_16(steps: Array, whole: Array, lows: Array | None = None) -> Array:
    """Returns step · code for each weight, of which 16 share a step, less a number that they share too."""
    found = steps[..., None] * whole.reshape(len(whole), -1, 16).astype(np.float32)
    return (found if lows is None else found - lows[..., None]).reshape(len(whole), -1)
