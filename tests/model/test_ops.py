"""The gate, attention and their exponential, against float64, on both sides of every threshold."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx import device
from elm_mlx.model import ops


def drawn(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.random.normal(shape, scale=scale, key=mx.random.key(seed))


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def attention64(queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> np.ndarray:
    q, k, v = map(float64, (queries, keys, values))
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat(repeats, axis=1).swapaxes(2, 3) * scale
    if causal:
        length, positions = scores.shape[2:]
        scores[..., np.arange(positions)[None] > np.arange(length)[:, None] + positions - length] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v.repeat(repeats, axis=1)


def test_the_exponential_is_exact_to_what_its_docstring_says() -> None:
    x = mx.linspace(-87, 87, 200_001)
    error = np.abs(float64(ops._exp(x)) / np.exp(float64(x)) - 1)
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


SHAPES = [  # batch, heads, kv heads, length, positions
    (1, 4, 4, 1, 50), (1, 8, 2, 1, 300), (3, 6, 3, 1, 40),  # one query
    (1, 4, 2, 20, 20), (2, 4, 2, 3, 90),  # little
    (1, 8, 2, 130, 130), (2, 4, 1, 100, 400), (1, 6, 6, 257, 700), (1, 16, 4, 300, 1100),  # blocks
]  # fmt: skip


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "positions"), SHAPES)
@pytest.mark.parametrize("gpu", [False, True])
def test_causal_attention(
    monkeypatch: pytest.MonkeyPatch, batch: int, heads: int, kv_heads: int, length: int, positions: int, gpu: bool
) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    queries = drawn((batch, heads, length, 32), 1)
    keys, values = (drawn((batch, kv_heads, positions, 32), seed) for seed in (2, 3))
    mask = "causal" if length > 1 else None
    out = ops.attention(queries, keys, values, 32**-0.5, mask)
    assert out.shape == queries.shape
    expected = attention64(queries, keys, values, 32**-0.5, causal=True)
    np.testing.assert_allclose(float64(out), expected, atol=3e-6)


def test_one_query_under_a_mask_sees_what_the_mask_says() -> None:
    queries, keys, values = drawn((2, 4, 1, 16), 1), drawn((2, 2, 30, 16), 2), drawn((2, 2, 30, 16), 3)
    seen = mx.arange(30)[None] < mx.array([9, 21])[:, None]
    out = ops.attention(queries, keys, values, 0.25, seen[:, None, None])
    for row, count in enumerate((9, 21)):
        alone = attention64(queries[row : row + 1], keys[row : row + 1, :, :count], values[row : row + 1, :, :count],
                            0.25, causal=False)  # fmt: skip
        np.testing.assert_allclose(float64(out[row : row + 1]), alone, atol=2e-6)


def test_large_scores_do_not_overflow() -> None:
    queries, keys, values = drawn((1, 4, 128, 32), 1, 60.0), drawn((1, 4, 128, 32), 2, 60.0), drawn((1, 4, 128, 32), 3)
    out = ops.attention(queries, keys, values, 1.0, "causal")
    np.testing.assert_allclose(float64(out), attention64(queries, keys, values, 1.0, causal=True), atol=2e-2)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_other_types_keep_their_type(dtype: mx.Dtype) -> None:
    x = drawn((ops._LITTLE,)).astype(dtype)
    assert ops.silu(x).dtype == ops.swiglu(x, x).dtype == dtype
    heads = drawn((1, 2, 200, 32)).astype(dtype)
    out = ops.attention(heads, heads, heads, 0.2, "causal")
    assert out.dtype == dtype
    np.testing.assert_allclose(float64(out), attention64(heads, heads, heads, 0.2, causal=True), atol=3e-2)


def test_the_derivatives_are_those_of_mlxs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, values = drawn((1, 8, 128, 32), 1), drawn((1, 2, 150, 32), 2), drawn((1, 2, 150, 32), 3)
    gate, up, weights = drawn((200, 100), 4, 3.0), drawn((200, 100), 5), drawn((1, 8, 128, 32), 6)

    def scalar(queries: mx.array, keys: mx.array, values: mx.array, gate: mx.array, up: mx.array) -> mx.array:
        attended = ops.attention(queries, keys, values, 32**-0.5, "causal")
        return (attended * weights).sum() + mx.sin(ops.swiglu(gate, up)).sum() + ops.silu(gate).sum()

    grad = mx.grad(scalar, argnums=(0, 1, 2, 3, 4))
    ours = grad(queries, keys, values, gate, up)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    theirs = grad(queries, keys, values, gate, up)
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-5 * float(mx.abs(reference).max()))
        assert float(mx.abs(reference).max()) > 0.1


NUMBERS = mx.array([[1] * 50 + [2] * 70 + [3] * 9 + [0] * 31, [1] * 160])


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (24, 8)])
def test_segments_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, gpu: bool) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    queries = drawn((2, heads, 160, 16), 1)
    keys, values = (drawn((2, kv_heads, 160, 16), seed) for seed in (2, 3))
    out = ops.attention(queries, keys, values, 0.25, ops.Segments(NUMBERS))
    for row, starts in enumerate(([0, 50, 120, 129, 160], [0, 160])):
        for start, stop in pairwise(starts):
            q, k, v = (x[row : row + 1, :, start:stop] for x in (queries, keys, values))
            np.testing.assert_allclose(
                float64(out[row : row + 1, :, start:stop]), attention64(q, k, v, 0.25, causal=True), atol=3e-6
            )


@pytest.mark.parametrize("reach", [70, 100, 159])
@pytest.mark.parametrize("block", [1 << 12, 1 << 18])
def test_what_lies_farther_back_than_any_text_is_long(monkeypatch: pytest.MonkeyPatch, reach: int, block: int) -> None:
    """Left out of the products, the results and derivatives stay those of the whole row."""
    monkeypatch.setattr(ops, "_BLOCK_SCORES", block)
    numbers = mx.array([[1] * 50 + [2] * 70 + [3] * 9 + [0] * 31, [1] * 70 + [2] * 20 + [3] * 70])
    queries, keys, values = drawn((2, 8, 160, 16), 1), drawn((2, 2, 160, 16), 2), drawn((2, 2, 160, 16), 3)
    weights = drawn((2, 8, 160, 16), 4)

    def scalar(segments: ops.Segments, *heads: mx.array) -> mx.array:
        return (ops.attention(*heads, 0.25, segments) * weights).sum()  # type: ignore[call-arg,misc]

    near, whole = ops.Segments(numbers, reach), ops.Segments(numbers)
    np.testing.assert_allclose(
        ops.attention(queries, keys, values, 0.25, near), ops.attention(queries, keys, values, 0.25, whole), atol=3e-6
    )
    ours = mx.grad(partial(scalar, near), argnums=(0, 1, 2))(queries, keys, values)
    theirs = mx.grad(partial(scalar, whole), argnums=(0, 1, 2))(queries, keys, values)
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-5 * float(mx.abs(reference).max()))


@given(
    heads=st.integers(1, 64), length=st.integers(1, 3000), before=st.integers(0, 500),
    reach=st.none() | st.integers(1, 3000),
)  # fmt: skip
def test_blocks_hold_every_query_once_and_all_that_it_may_see(
    heads: int, length: int, before: int, reach: int | None
) -> None:
    before = 0 if reach else before  # texts in a row have no cache before them
    blocks = ops._runs(heads, length, before + length, reach)
    assert [at for start, stop, _ in blocks for at in range(start, stop)] == list(range(length))
    for start, stop, seen in blocks:
        assert seen.stop == before + stop
        assert seen.start == (0 if reach is None else max(0, start - reach + 1))
        assert stop - start <= 32 or heads * (stop - start) * (seen.stop - seen.start) <= ops._BLOCK_SCORES


def test_segments_of_a_single_token() -> None:
    values = drawn((2, 2, 1, 16), 3)
    out = ops.attention(drawn((2, 4, 1, 16), 1), drawn((2, 2, 1, 16), 2), values, 0.25, ops.Segments(mx.ones((2, 1))))
    np.testing.assert_allclose(out[:, ::2], values, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_derivatives_within_segments_are_those_of_mlxs_own(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    queries, keys, values = drawn((2, 8, 160, 16), 1), drawn((2, 2, 160, 16), 2), drawn((2, 2, 160, 16), 3)
    weights = drawn((2, 8, 160, 16), 4)

    def scalar(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return (ops.attention(queries, keys, values, 0.25, ops.Segments(NUMBERS)) * weights).sum()

    grad = mx.grad(scalar, argnums=(0, 1, 2))
    ours = (mx.compile(grad) if compiled else grad)(queries, keys, values)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    for mine, reference in zip(ours, grad(queries, keys, values), strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-5 * float(mx.abs(reference).max()))


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
