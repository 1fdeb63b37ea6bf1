"""A changed weight's integers against a search through all of them in NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from elm_mlx.model.lora_layers import dequantize
from elm_mlx.store import fused_weights as module
from elm_mlx.store.fused_weights import ANEW, LOT, NEAREST, WAYS, pack_integers, requantize

BITS = (2, 3, 4, 5, 6, 8)


def quantized(bits: int, group_size: int = 32, dtype: mx.Dtype = mx.bfloat16) -> tuple[mx.array, mx.array, mx.array]:
    weight = mx.random.normal((6, 128), key=mx.random.key(bits)).astype(dtype)
    packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    return packed, scales, biases


def wide(parts: tuple[mx.array, ...], bits: int, group_size: int = 32) -> mx.array:
    return dequantize(*parts[:3], group_size=group_size, bits=bits, mode="affine")


def errors(weight: mx.array, parts: tuple[mx.array, ...], bits: int, group_size: int = 32) -> np.ndarray:
    """Squared, of each group."""
    difference = np.array(weight, np.float64) - np.array(wide(parts, bits, group_size), np.float64)
    return np.asarray((difference**2).reshape(len(difference), -1, group_size).sum(-1))


def nearest(weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int = 32) -> np.ndarray:
    """The smallest squared error of each group on a grid, by trying every integer."""
    groups = np.array(weight, np.float64).reshape(weight.shape[0], -1, group_size, 1)
    scale, bias = (np.array(value.astype(mx.float32), np.float64)[..., None, None] for value in (scales, biases))
    return np.asarray((((np.arange(2**bits) * scale + bias) - groups) ** 2).min(-1).sum(-1))


@pytest.mark.parametrize("bits", BITS)
def test_packed_as_mlx_packs(bits: int) -> None:
    packed, scales, _ = quantized(bits)
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    codes = mx.dequantize(packed, ones, zeros, group_size=32, bits=bits)
    assert mx.array_equal(pack_integers(codes, bits), packed)
    assert codes.min().item() == 0 and codes.max().item() == 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_what_did_not_change_stays_bit_by_bit(bits: int, dtype: mx.Dtype) -> None:
    parts = quantized(bits, dtype=dtype)
    *found, moved = requantize(wide(parts, bits), *parts, group_size=32, bits=bits)
    assert all(mx.array_equal(new, old) and new.dtype == old.dtype for new, old in zip(found, parts, strict=True))
    assert moved == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [0.001, 0.1, 3.0])
def test_each_group_is_as_near_as_either_grid_allows(bits: int, size: float) -> None:
    parts = quantized(bits)
    base = wide(parts, bits)
    weight = base + size * mx.random.normal(base.shape, key=mx.random.key(9))
    *found, moved = requantize(weight, *parts, group_size=32, bits=bits)
    new = tuple(value.astype(mx.bfloat16) for value in mx.quantize(weight, group_size=32, bits=bits)[1:])
    expected = np.minimum(nearest(weight, *parts[1:], bits), nearest(weight, *new, bits))
    np.testing.assert_allclose(errors(weight, tuple(found), bits), expected, rtol=1e-3, atol=1e-6)
    # On a new grid a value may be the old one but for the last bit.
    assert moved == pytest.approx(int((mx.abs(wide(tuple(found), bits) - base) > 1e-6).sum().item()), abs=2)


def learnt(bits: int = 4) -> tuple[mx.array, mx.array, mx.array]:
    """A grid that is no fit of its weights' extremes, as other tools' may be, and as learned quantization's is."""
    packed, scales, biases = quantized(bits)
    return packed, scales * 1.05, biases * 1.02


def test_a_change_below_half_a_step_changes_nothing_and_one_above_it_a_step() -> None:
    parts = learnt()
    base, step = wide(parts, 4), mx.repeat(parts[1].astype(mx.float32), 32, axis=1)
    signs = mx.where(mx.arange(128) % 2 == 0, 1, -1)
    *found, moved = requantize(base + 0.2 * signs * step, *parts, group_size=32, bits=4)
    assert moved == 0 and mx.array_equal(found[0], parts[0])
    codes = mx.dequantize(parts[0], mx.ones(parts[1].shape), mx.zeros(parts[1].shape), group_size=32, bits=4)
    pushed = (mx.arange(128) == 40) & (codes < 15)
    *found, moved = requantize(base + 0.6 * step * pushed, *parts, group_size=32, bits=4)
    assert moved == int(pushed.sum().item()) > 0
    assert mx.allclose(wide(tuple(found), 4), base + step * pushed, atol=1e-5)


def test_a_small_change_costs_less_than_a_new_fit() -> None:
    parts = learnt()
    base = wide(parts, 4)
    weight = base + 0.01 * mx.random.normal(base.shape, key=mx.random.key(1))
    *found, _ = requantize(weight, *parts, group_size=32, bits=4)
    anew = mx.quantize(weight.astype(mx.bfloat16), group_size=32, bits=4)
    assert errors(weight, tuple(found), 4).sum() < 0.1 * errors(weight, tuple(anew), 4).sum()


def test_groups_that_are_all_alike() -> None:
    parts = tuple(mx.quantize(mx.zeros((2, 64)), group_size=32, bits=4))
    *found, moved = requantize(mx.zeros((2, 64)), *parts, group_size=32, bits=4)
    assert moved == 0 and mx.array_equal(wide(tuple(found), 4), mx.zeros((2, 64)))
    weight = mx.random.normal((2, 64), key=mx.random.key(0))
    assert errors(weight, requantize(weight, *parts, group_size=32, bits=4)[:3], 4).max() < 1


def test_many_rows_are_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = quantized(4)
    weight = wide(parts, 4) + 0.1 * mx.random.normal((6, 128), key=mx.random.key(3))
    whole = requantize(weight, *parts, group_size=32, bits=4)
    monkeypatch.setattr(module, "_ROWS", 4)
    again = requantize(weight, *parts, group_size=32, bits=4)
    assert all(mx.array_equal(a, b) for a, b in zip(whole[:3], again[:3], strict=True)) and whole[3] == again[3]


@pytest.mark.parametrize("bits", BITS)
def test_by_lot_each_value_is_one_of_its_two_neighbours_and_their_mean_is_the_value(bits: int) -> None:
    """Within the grid: what lies past its ends is cut off there."""
    packed, scales, biases = quantized(bits)
    steps = np.repeat(np.abs(np.array(scales.astype(mx.float32))), 32, axis=1)
    before = np.array(wide((packed, scales, biases), bits))
    change = np.random.default_rng(bits).uniform(-0.9, 0.9, before.shape).astype(np.float32) * steps
    made = []
    for seed in range(200):
        *parts, moved = requantize(
            mx.array(before + change), packed, scales, biases, group_size=32, bits=bits, way=LOT, seed=seed
        )
        assert mx.array_equal(parts[1], scales) and mx.array_equal(parts[2], biases)
        found = np.array(wide(tuple(parts), bits))
        off = np.abs(found - before) / steps
        assert np.all((off < 1e-3) | (np.abs(off - 1) < 1e-3)) and moved == (off > 0.5).sum()
        made.append(found)
    groups, wanted = before.reshape(6, -1, 32), (before + change).reshape(6, -1, 32)
    inner = (wanted > groups.min(-1, keepdims=True)) & (wanted < groups.max(-1, keepdims=True))
    inner = inner.reshape(before.shape)
    error = (np.mean(made, axis=0) - before - change) / steps
    assert np.abs(error[inner]).max() < 0.16 and abs(error[inner].mean()) < 0.01  # 4.5 standard errors of 200 lots
    *again, _ = requantize(mx.array(before + change), packed, scales, biases, group_size=32, bits=bits, way=LOT, seed=7)
    assert np.array_equal(np.array(wide(tuple(again), bits)), made[7])


@pytest.mark.parametrize("bits", BITS)
def test_lots_leave_alone_what_did_not_change(bits: int) -> None:
    parts = quantized(bits)
    *found, moved = requantize(wide(parts, bits), *parts, group_size=32, bits=bits, way=LOT)
    assert moved == 0 and all(mx.array_equal(new, old) for new, old in zip(found, parts, strict=True))


def test_a_small_change_of_low_rank_comes_through_by_lot_alone() -> None:
    """A tenth of a step of every weight, along one direction: seen in the product, as a layer would."""
    rows, columns = 64, 1024
    parts = mx.quantize(mx.random.normal((rows, columns), key=mx.random.key(0)), group_size=32, bits=4)
    before = wide(tuple(parts), 4)
    direction = mx.sign(mx.random.normal((columns,), key=mx.random.key(1)))
    change = 0.02 * mx.random.normal((rows, 1), key=mx.random.key(2)) * direction
    wanted = change @ direction
    left = {}
    for way in WAYS:
        *made, _ = requantize(before + change, *parts, group_size=32, bits=4, way=way)
        lost = (wide(tuple(made), 4) - before) @ direction - wanted
        left[way] = 1 - (mx.square(lost).sum() / mx.square(wanted).sum()).item()
    assert left[LOT] > 0.9 > left[ANEW] and left[LOT] > left[NEAREST] + 0.5
