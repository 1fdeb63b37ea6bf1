"""Rotation against complex numbers in float64, on both devices' branches."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import reference

from elm_mlx import device
from elm_mlx.model.rope import Rope
from elm_mlx.model.rope_config import RopeConfig

BASES = (10_000.0, 500_000.0)


def rotated(x: mx.array, offsets: list[int], base: float) -> np.ndarray:
    """Row by row, in float64."""
    values = np.array(x.astype(mx.float32), np.float64)
    rows = [
        reference.rope(row, offset + np.arange(x.shape[2]), base) for row, offset in zip(values, offsets, strict=True)
    ]
    return np.stack(rows)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("head_dim", [2, 64, 128])
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("offset", [0, 1, 511, 2047, 4095])
def test_positions_are_angles(length: int, head_dim: int, base: float, offset: int) -> None:
    x = mx.random.normal((2, 3, length, head_dim), key=mx.random.key(0))
    expected = rotated(x, [offset] * 2, base)
    for given in (offset, mx.array([offset])):
        np.testing.assert_allclose(np.array(Rope(head_dim, base)(length, given)(x)), expected, atol=2e-3)
    if offset < 512:  # an angle in float32 is exact to one part in 10**7
        np.testing.assert_allclose(np.array(Rope(head_dim, base)(length, offset)(x)), expected, atol=2e-4)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("length", [1, 5])
def test_each_row_may_have_its_own_position(length: int) -> None:
    x = mx.random.normal((3, 2, length, 16), key=mx.random.key(1))
    result = Rope(16, 10_000.0)(length, mx.array([0, 30, 200]))(x)
    np.testing.assert_allclose(np.array(result), rotated(x, [0, 30, 200], 10_000.0), atol=1e-4)


@pytest.mark.usefixtures("branch")
def test_one_function_serves_queries_and_keys_of_any_number_of_heads() -> None:
    rotate = Rope(16, 10_000.0)(1, 9)
    for heads in (1, 3, 8):
        x = mx.random.normal((1, heads, 1, 16), key=mx.random.key(heads))
        np.testing.assert_allclose(np.array(rotate(x)), rotated(x, [9], 10_000.0), atol=1e-5)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("length", [1, 4])
def test_the_type_stays(dtype: mx.Dtype, length: int) -> None:
    x = mx.random.normal((1, 2, length, 16), key=mx.random.key(2)).astype(dtype)
    result = Rope(16, 10_000.0)(length, 100)(x)
    assert result.dtype == dtype
    np.testing.assert_allclose(np.array(result.astype(mx.float32)), rotated(x, [100], 10_000.0), atol=0.03)


@pytest.mark.usefixtures("branch")
def test_only_the_distance_between_two_positions_counts() -> None:
    q, k = mx.random.normal((2, 1, 1, 1, 64), key=mx.random.key(3))
    rope = Rope(64, 10_000.0)
    scores = [float((rope(1, start + 5)(q) * rope(1, start)(k)).sum()) for start in (0, 10, 1000)]
    np.testing.assert_allclose(scores, scores[0], atol=5e-3)


def test_the_branches_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = mx.random.normal((2, 4, 1, 64), key=mx.random.key(4))
    results = []
    for gpu in (False, True):
        monkeypatch.setattr(device, "on_gpu", lambda gpu=gpu: gpu)
        results.append(np.array(Rope(64, 10_000.0)(1, mx.array([1234]))(x)))
    np.testing.assert_allclose(*results, atol=1e-3)


def test_a_gpu_uses_the_fused_rotation_for_one_position_and_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    calls = []
    fused = mx.fast.rope
    monkeypatch.setattr(mx.fast, "rope", lambda *args, **options: (calls.append(1), fused(*args, **options))[1])
    for length in (1, 6):
        Rope(16, 10_000.0)(length, 3)(mx.zeros((1, 2, length, 16)))
    assert len(calls) == 2


@pytest.mark.parametrize("offset", [0, 77, mx.array([77])])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_derivative_of_many_positions_is_that_of_the_fused_rotation(
    monkeypatch: pytest.MonkeyPatch, offset: int | mx.array, compiled: bool
) -> None:
    x, weights = mx.random.normal((2, 2, 3, 40, 32), key=mx.random.key(5))

    def scalar(x: mx.array) -> mx.array:
        return (mx.sin(Rope(32, 10_000.0)(40, offset)(x)) * weights).sum()

    grads = []
    for gpu in (False, True):
        monkeypatch.setattr(device, "on_gpu", lambda gpu=gpu: gpu)
        grad = mx.grad(scalar)
        grads.append(np.array((mx.compile(grad) if compiled else grad)(x)))
    np.testing.assert_allclose(*grads, atol=1e-4)


def test_the_derivative_turns_back() -> None:
    """Against finite differences, in the direction of a random vector."""
    x, weights, direction = np.random.default_rng(0).normal(size=(3, 1, 2, 9, 16))
    rotate = Rope(16, 10_000.0)(9, 30)
    grad = np.array(mx.grad(lambda x: (rotate(x) * mx.array(weights, mx.float32)).sum())(mx.array(x, mx.float32)))
    up, down = ((rotated64(x + sign * 1e-4 * direction) * weights).sum() for sign in (1, -1))
    assert (grad * direction).sum() == pytest.approx((up - down) / 2e-4, rel=1e-4)


def rotated64(x: np.ndarray) -> np.ndarray:
    return np.stack([reference.rope(row, 30 + np.arange(x.shape[2]), 10_000.0) for row in x])


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_part_of_a_head_is_rotated_and_scaled(length: int, dtype: mx.Dtype) -> None:
    x = mx.random.normal((2, 3, length, 16), key=mx.random.key(6)).astype(dtype)
    result = Rope(16, RopeConfig("default", 6, 10_000.0, 64, scale=1.5))(length, 7)(x)
    assert result.dtype == dtype and mx.array_equal(result[..., 6:], x[..., 6:])
    expected = 1.5 * rotated(x[..., :6], [7, 7], 10_000.0)
    near = 1e-4 if dtype == mx.float32 else 0.05
    np.testing.assert_allclose(np.array(result[..., :6].astype(mx.float32)), expected, atol=near)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("length", [1, 3])
def test_a_head_of_any_size_takes_little_memory(length: int) -> None:
    """A config may say so; the square of it was taken three times."""
    head_dim = 200_000
    mx.reset_peak_memory()
    x = mx.random.normal((1, 1, length, head_dim), key=mx.random.key(7))
    result = np.array(Rope(head_dim, 10_000.0)(length, 3)(x))
    assert mx.get_peak_memory() < 100e6
    np.testing.assert_allclose(result, rotated(x, [3], 10_000.0), atol=1e-4)


@pytest.mark.usefixtures("branch")
def test_longrope_turns_each_row_by_its_own_length() -> None:
    config = RopeConfig("longrope", 8, 10_000.0, 16, short=(1.0,) * 4, long=(2.0, 3.0, 4.0, 5.0))
    rope = Rope(8, config)
    x = mx.random.normal((3, 2, 1, 8), key=mx.random.key(8))
    together = np.array(rope(1, mx.array([3, 15, 16]))(x))
    for row, offset in enumerate((3, 15, 16)):
        for given in (offset, mx.array([offset])):
            np.testing.assert_allclose(np.array(rope(1, given)(x[row : row + 1]))[0], together[row], atol=1e-5)
    short = Rope(8, 10_000.0)(1, 15)(x)[1]
    np.testing.assert_allclose(together[1], np.array(short), atol=1e-5)
    assert np.abs(together[2] - np.array(Rope(8, 10_000.0)(1, 16)(x)[2])).max() > 0.1
    # what is known of the text's length counts
    early = np.array(rope(1, 3, 17)(x))[0]
    assert np.abs(early - together[0]).max() > 0.1
