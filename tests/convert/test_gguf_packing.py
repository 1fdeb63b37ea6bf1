"""Blocks that are made, as the `gguf` package makes and reads them."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest

from elm_mlx_convert.gguf_packing import affine_rows, mxfp4_rows, rounded_rows, unpacked

VALUES = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
VALUES[1, :32] = 0
VALUES[2, 5], VALUES[3] = -40.0, np.abs(VALUES[3])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_floats_are_rounded_as_llama_cpp_rounds_them(kind: str) -> None:
    expected = gguf.quants.quantize(VALUES, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(rounded_rows(kind, VALUES), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_those_of_mlx(bits: int) -> None:
    words, scales, biases = (np.array(each) for each in mx.quantize(mx.array(VALUES), group_size=32, bits=bits))
    codes = unpacked(words, bits).reshape(6, -1, 32)
    assert codes.max() < 1 << bits
    found = scales[..., None] * codes + biases[..., None]
    expected = mx.dequantize(*map(mx.array, (words, scales, biases)), group_size=32, bits=bits)
    np.testing.assert_allclose(found.reshape(6, -1), np.array(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "zero"), [("Q4_0", -8), ("Q4_1", None), ("Q5_0", -16), ("Q5_1", None), ("Q8_0", -128)]
)
def test_affine_blocks_have_the_values_of_their_codes(kind: str, zero: int | None) -> None:
    draw = np.random.default_rng(1)
    bits = int(kind[1])
    codes = draw.integers(0, 1 << bits, (6, 128), np.uint8)
    scales, biases = (draw.standard_normal((6, 4)).astype(np.float16) for _ in "sb")
    lows = biases.astype(np.float32) if zero is None else zero * scales.astype(np.float32)
    expected = scales.astype(np.float32)[..., None] * codes.reshape(6, 4, 32) + lows[..., None]
    found = gguf.quants.dequantize(affine_rows(kind, codes, scales, biases), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(found, expected.reshape(6, 128))


def test_blocks_of_mxfp4_have_mlx_s_values() -> None:
    words, scales = mx.quantize(mx.array(VALUES), mode="mxfp4", group_size=32, bits=4)
    data = mxfp4_rows(unpacked(np.array(words), 4), np.array(scales))
    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.MXFP4)
    expected = mx.dequantize(words, scales, mode="mxfp4", group_size=32, bits=4)
    np.testing.assert_array_equal(found, np.array(expected.astype(mx.float32)))
