"""Attention and its masks against float64, and its derivatives against MLX's, on both sides of every threshold."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx import device
from elm_mlx.model import attention as attending
from elm_mlx.model.attention import Segments, attention


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
    out = attention(queries, keys, values, 32**-0.5, mask)
    assert out.shape == queries.shape
    expected = attention64(queries, keys, values, 32**-0.5, causal=True)
    np.testing.assert_allclose(float64(out), expected, atol=3e-6)


def test_one_query_under_a_mask_sees_what_the_mask_says() -> None:
    queries, keys, values = drawn((2, 4, 1, 16), 1), drawn((2, 2, 30, 16), 2), drawn((2, 2, 30, 16), 3)
    seen = mx.arange(30)[None] < mx.array([9, 21])[:, None]
    out = attention(queries, keys, values, 0.25, seen[:, None, None])
    for row, count in enumerate((9, 21)):
        alone = attention64(queries[row : row + 1], keys[row : row + 1, :, :count], values[row : row + 1, :, :count],
                            0.25, causal=False)  # fmt: skip
        np.testing.assert_allclose(float64(out[row : row + 1]), alone, atol=2e-6)


def test_large_scores_do_not_overflow() -> None:
    queries, keys, values = drawn((1, 4, 128, 32), 1, 60.0), drawn((1, 4, 128, 32), 2, 60.0), drawn((1, 4, 128, 32), 3)
    out = attention(queries, keys, values, 1.0, "causal")
    np.testing.assert_allclose(float64(out), attention64(queries, keys, values, 1.0, causal=True), atol=2e-2)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_other_types_keep_their_type(dtype: mx.Dtype) -> None:
    heads = drawn((1, 2, 200, 32)).astype(dtype)
    out = attention(heads, heads, heads, 0.2, "causal")
    assert out.dtype == dtype
    np.testing.assert_allclose(float64(out), attention64(heads, heads, heads, 0.2, causal=True), atol=3e-2)


def test_the_derivatives_are_those_of_mlxs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, values = drawn((1, 8, 128, 32), 1), drawn((1, 2, 150, 32), 2), drawn((1, 2, 150, 32), 3)
    weights = drawn((1, 8, 128, 32), 6)

    def scalar(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return (attention(queries, keys, values, 32**-0.5, "causal") * weights).sum()

    grad = mx.grad(scalar, argnums=(0, 1, 2))
    ours = grad(queries, keys, values)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    theirs = grad(queries, keys, values)
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
    out = attention(queries, keys, values, 0.25, Segments(NUMBERS))
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
    monkeypatch.setattr(attending, "_BLOCK_SCORES", block)
    numbers = mx.array([[1] * 50 + [2] * 70 + [3] * 9 + [0] * 31, [1] * 70 + [2] * 20 + [3] * 70])
    queries, keys, values = drawn((2, 8, 160, 16), 1), drawn((2, 2, 160, 16), 2), drawn((2, 2, 160, 16), 3)
    weights = drawn((2, 8, 160, 16), 4)

    def scalar(segments: Segments, *heads: mx.array) -> mx.array:
        return (attention(*heads, 0.25, segments) * weights).sum()  # type: ignore[call-arg,misc]

    near, whole = Segments(numbers, reach), Segments(numbers)
    np.testing.assert_allclose(
        attention(queries, keys, values, 0.25, near), attention(queries, keys, values, 0.25, whole), atol=3e-6
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
    blocks = attending._runs(heads, length, before + length, reach)
    assert [at for start, stop, _ in blocks for at in range(start, stop)] == list(range(length))
    for start, stop, seen in blocks:
        assert seen.stop == before + stop
        assert seen.start == (0 if reach is None else max(0, start - reach + 1))
        assert stop - start <= 32 or heads * (stop - start) * (seen.stop - seen.start) <= attending._BLOCK_SCORES


def test_segments_of_a_single_token() -> None:
    values = drawn((2, 2, 1, 16), 3)
    out = attention(drawn((2, 4, 1, 16), 1), drawn((2, 2, 1, 16), 2), values, 0.25, Segments(mx.ones((2, 1))))
    np.testing.assert_allclose(out[:, ::2], values, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_derivatives_within_segments_are_those_of_mlxs_own(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    queries, keys, values = drawn((2, 8, 160, 16), 1), drawn((2, 2, 160, 16), 2), drawn((2, 2, 160, 16), 3)
    weights = drawn((2, 8, 160, 16), 4)

    def scalar(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return (attention(queries, keys, values, 0.25, Segments(NUMBERS)) * weights).sum()

    grad = mx.grad(scalar, argnums=(0, 1, 2))
    ours = (mx.compile(grad) if compiled else grad)(queries, keys, values)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    for mine, reference in zip(ours, grad(queries, keys, values), strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-5 * float(mx.abs(reference).max()))
