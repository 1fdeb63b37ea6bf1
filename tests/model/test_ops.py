"""Gates, logits and their exponential, against float64, on both sides of every threshold."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from elm_mlx import device
from elm_mlx.model import ops


def drawn(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.random.normal(shape, scale=scale, key=mx.random.key(seed))


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def test_the_exponential_is_exact_to_what_its_docstring_says() -> None:
    x = mx.linspace(-87, 87, 200_001)
    error = np.abs(float64(ops.fast_exp(x)) / np.exp(float64(x)) - 1)
    assert error.max() < 4e-6
    assert error[np.abs(float64(x)) < 1].max() < 3e-7


@pytest.mark.parametrize("size", [7, ops._LITTLE - 1, ops._LITTLE, 100_000])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_silu_and_swiglu(size: int, scale: float) -> None:
    gate, up = drawn((size,), 1, scale), drawn((size,), 2)
    x = float64(gate)
    expected = x / (1 + np.exp(-x))
    np.testing.assert_allclose(float64(ops.silu(gate)), expected, rtol=5e-6, atol=1e-30)
    np.testing.assert_allclose(float64(ops.swiglu(gate, up)), expected * float64(up), rtol=5e-6, atol=1e-30)


def test_silu_at_the_ends_of_float32() -> None:
    x = mx.concatenate([mx.array([-1e30, -1000.0, -88.0, 0.0, 88.0, 1000.0, 3e38]), mx.zeros((ops._LITTLE,))])
    np.testing.assert_allclose(np.array(ops.silu(x))[:7], [0, 0, 0, 0, 88, 1000, 3e38], rtol=1e-6, atol=1e-3)
    assert np.isnan(np.array(ops.silu(mx.full((ops._LITTLE,), mx.nan)))).all(), "what is no number is not hidden"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_other_types_keep_their_type(dtype: mx.Dtype) -> None:
    x = drawn((ops._LITTLE,)).astype(dtype)
    assert ops.silu(x).dtype == ops.swiglu(x, x).dtype == dtype


def test_the_derivatives_are_those_of_mlxs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = drawn((200, 100), 4, 3.0), drawn((200, 100), 5)

    def scalar(gate: mx.array, up: mx.array) -> mx.array:
        return mx.sin(ops.swiglu(gate, up)).sum() + ops.silu(gate).sum()

    grad = mx.grad(scalar, argnums=(0, 1))
    ours = grad(gate, up)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    theirs = grad(gate, up)
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-5 * float(mx.abs(reference).max()))
        assert float(mx.abs(reference).max()) > 0.1


def test_the_hyperbolic_tangent(branch: bool) -> None:
    x = mx.concatenate([mx.linspace(-12, 12, 1001), mx.array([-1e30, -90.0, 90.0, 1e30])])
    expected = np.tanh(np.array(x, np.float64))
    np.testing.assert_allclose(ops.tanh(x), expected, atol=5e-7)
    np.testing.assert_allclose(mx.grad(lambda x: ops.tanh(x).sum())(x), 1 - expected**2, atol=1e-6)
    assert mx.isnan(ops.tanh(mx.array([mx.nan]))).item()


def test_the_public_exponential_bears_anything_below_87() -> None:
    x = mx.concatenate([mx.array([-1e30, -100.0, 0.0, 1.0]), mx.zeros((ops._LITTLE,))])
    np.testing.assert_allclose(np.array(ops.exp(x))[:4], [0, 0, 1, np.e], rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(mx.grad(lambda x: ops.exp(x).sum())(x)[2:4], [1, np.e], rtol=1e-6)


@pytest.mark.parametrize("vocab_size", [5, 8192, 16_000])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_logsumexp(vocab_size: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a row's is the same to the bit, whatever rows are beside it."""
    monkeypatch.setattr(device, "on_gpu", lambda: on_gpu)
    rows = 20 * mx.random.normal((9, vocab_size), key=mx.random.key(3))
    found = ops.logsumexp(rows)
    exact = np.logaddexp.reduce(np.array(rows, np.float64), axis=-1)
    np.testing.assert_allclose(np.array(found), exact, rtol=1e-6)
    for row in range(9):
        assert mx.array_equal(ops.logsumexp(rows[row : row + 1]), found[row : row + 1])
    assert mx.isnan(ops.logsumexp(mx.full((1, vocab_size), mx.nan))).all().item()


@pytest.mark.parametrize("vocab_size", [3, 16, 17, 1000, 49_152])
def test_the_likeliest_token_and_its_log_probability(vocab_size: int) -> None:
    logits = 4 * mx.random.normal((9, vocab_size), key=mx.random.key(vocab_size))
    logits[0, 1] = logits[0, 2] = logits[0].max() + 1  # the first of several
    logits[1, 0], logits[2, -1] = -math.inf, 60.0
    exact = np.array(logits, np.float64)
    exact = exact.max(-1) + np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1))
    tokens, log_probabilities = ops.likeliest(logits)
    assert np.array_equal(tokens, np.array(logits).argmax(-1))
    assert np.abs(np.array(ops.logsumexp(logits)) - exact).max() < 1e-5 * math.log(vocab_size) + 2e-6
    assert np.abs(np.array(log_probabilities) - (np.array(logits).max(-1) - exact)).max() < 1e-4
    assert mx.array_equal(ops.likeliest(mx.contiguous(logits.T).T)[0], tokens)
    alone = [ops.likeliest(logits[row : row + 1]) for row in range(9)]
    assert mx.array_equal(mx.concatenate([one[0] for one in alone]), tokens)
    assert mx.array_equal(mx.concatenate([one[1] for one in alone]), log_probabilities)


def test_no_number_among_logits_is_no_log_probability() -> None:
    logits = mx.zeros((2, 50))
    logits[0, 7] = math.nan
    assert mx.isnan(ops.likeliest(logits)[1]).tolist() == [True, False]
    assert mx.isnan(ops.logsumexp(logits)).tolist() == [True, False]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000, 49_152])
def test_places_in_ascending_order_are_mlxs(count: int) -> None:
    """Equals, zeros of both signs, the infinite and no numbers among them."""
    x = mx.round(mx.random.normal((3, count), key=mx.random.key(count)) * 50) / 10
    x = mx.where(x > 3, mx.inf, mx.where(x < -4, -0.0, mx.where(x == -1, -mx.inf, mx.where(x == 1, mx.nan, x))))
    assert mx.array_equal(ops.ascending(x), mx.argsort(x, axis=-1))
    assert mx.array_equal(ops.ascending(x[1:2]), mx.argsort(x[1:2], axis=-1))
