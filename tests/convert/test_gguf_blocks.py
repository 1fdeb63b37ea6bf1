"""GGML's blocks against the `gguf` package's dequantization and MLX's own packing, number for number."""

from __future__ import annotations

from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from elm_mlx_convert import gguf_blocks
from elm_mlx_convert.gguf_file import TYPES

QUANTIZED = [*gguf_blocks.GRIDS, *gguf_blocks.DEQUANTIZED]
HALVES = {  # where float16 numbers stand in a block
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "IQ4_XS": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "MXFP4": [], "Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208],
}  # fmt: skip


def random_blocks(kind: str, count: int = 4000) -> Any:
    """Blocks of random bytes, whose scales are finite, subnormal ones and zeros among them."""
    random = np.random.default_rng(QUANTIZED.index(kind))
    blocks = random.integers(0, 256, (count, TYPES[kind].nbytes), np.uint8)
    for at in HALVES[kind]:
        scales = (random.standard_normal(count) * 10.0 ** random.integers(-7, 2, count)).astype(np.float16)
        scales[:8] = 0
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = random.integers(0, 200, count)
        blocks[:3, 0] = (0, 1, 2)
    return blocks


def theirs(kind: str, blocks: Any) -> Any:
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_are_those_of_gguf(kind: str) -> None:
    blocks = random_blocks(kind)
    found = gguf_blocks.values(kind, blocks)
    assert found.dtype == np.float32 and found.shape == (len(blocks), TYPES[kind].block)
    assert np.array_equal(found, theirs(kind, blocks))


@pytest.mark.parametrize("kind", gguf_blocks.GRIDS)
@pytest.mark.parametrize("columns", [256, 1280])
def test_mlx_reads_the_same_weights(kind: str, columns: int) -> None:
    """MLX's dequantization of the packed weights, in float32, is the file's values."""
    bits, mode = gguf_blocks.GRIDS[kind]
    per_row = columns // TYPES[kind].block
    blocks = random_blocks(kind, 48 * per_row)
    weight = gguf_blocks.packed(gguf_blocks.codes(kind, blocks).reshape(48, columns), bits)
    assert weight.shape == (48, columns * bits // 32) and weight.dtype == np.uint32
    scales = mx.array(gguf_blocks.scales(kind, blocks).reshape(48, -1))
    biases = mx.array(gguf_blocks.biases(kind, blocks).reshape(48, -1)) if mode == "affine" else None
    made = mx.dequantize(mx.array(weight), scales, biases, group_size=32, bits=bits, mode=mode, dtype=mx.float32)
    expected = theirs(kind, blocks).reshape(48, columns)
    if mode == "mxfp4":  # of which MLX makes bfloat16's numbers on the way
        assert np.array_equal(np.array(made), expected)
    else:  # MLX may multiply and add with one rounding
        assert np.allclose(np.array(made), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("kind", sorted({*gguf_blocks.GRIDS} - {*gguf_blocks.FINE_SCALES} - {"MXFP4"}))
def test_scales_and_biases_of_the_simple_types_are_float16(kind: str) -> None:
    blocks = random_blocks(kind)
    for part in (gguf_blocks.scales(kind, blocks), gguf_blocks.biases(kind, blocks)):
        assert np.array_equal(part.astype(np.float16).astype(np.float32), part)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_is_mlx_s(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (16, 96), np.uint8)
    ones, zeros = mx.ones((16, 3)), mx.zeros((16, 3))
    packed = mx.array(gguf_blocks.packed(codes, bits))
    assert np.array_equal(np.array(mx.dequantize(packed, ones, zeros, group_size=32, bits=bits)), codes)
