"""Attention in one call of the C, against float64: what each query sees, and that nothing else touches its bits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from elm_mlx import blas, device
from elm_mlx.model import attention as attending
from elm_mlx.model import packed
from elm_mlx.model.attention import Causal, Mask, Segments, attention
from elm_mlx.model.cache import KVCache, QuantizedCache
from elm_mlx.model.packed import Packed

IN_C = blas.attends()
in_one_call = pytest.mark.skipif(not IN_C, reason="no C compiler, or one that knows no wide vectors")


def drawn(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def cached(seed: int, batch: int, kv_heads: int, positions: int, head_dim: int) -> mx.array:
    """Keys or values as a cache has them: of more rows and room for more positions, which are nobody's."""
    room = mx.concatenate(
        [drawn(seed, batch + 1, kv_heads, positions, head_dim), mx.full((batch + 1, kv_heads, 9, head_dim), mx.nan)],
        axis=2,
    )
    mx.eval(room)
    return room[:batch, :, :positions]


def attended(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, seen: Sequence[int], window: int | None,
    cap: float | None = None,
) -> np.ndarray:  # fmt: skip
    """By float64, a query after the other."""
    q, k, v = (np.array(x, np.float64) for x in (queries, keys, values))
    batch, heads, length, _ = q.shape
    out = np.empty_like(q)
    for row in range(batch):
        for head in range(heads):
            own = head * k.shape[1] // heads
            for at in range(length):
                stop = seen[row] + at
                visible = slice(0 if window is None else max(0, stop - window), stop)
                scores = k[row, own, visible] @ q[row, head, at] * scale
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                weights = np.exp(scores - scores.max())
                out[row, head, at] = weights @ v[row, own, visible] / weights.sum()
    return out


CASES = [  # queries a key, key heads, queries, positions, head_dim, window
    (1, 1, 1, 1, 64, None), (3, 3, 1, 700, 64, None), (8, 2, 1, 255, 128, None), (16, 1, 1, 256, 80, None),
    (1, 4, 1, 257, 96, 100), (9, 2, 8, 513, 32, None), (3, 3, 5, 300, 64, 7), (1, 2, 7, 7, 16, None),
    (3, 1, 97, 97, 64, None), (1, 3, 100, 1000, 64, None), (4, 2, 131, 640, 48, 256), (2, 2, 300, 301, 32, 1),
    (5, 2, 400, 520, 64, None), (1, 2, 1, 700, 100, None), (3, 2, 6, 300, 12, 40), (1, 1, 3, 600, 1, None),
    (2, 1, 100, 600, 33, None), (1, 1, 2, 70, 8, None),
]  # fmt: skip


@pytest.mark.parametrize(("group", "kv_heads", "length", "positions", "head_dim", "window"), CASES)
@pytest.mark.parametrize("way", ["one call", "without the C", "a GPU's"])
def test_every_query_sees_what_the_mask_says(
    monkeypatch: pytest.MonkeyPatch, group: int, kv_heads: int, length: int, positions: int, head_dim: int,
    window: int | None, way: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(blas, "attends", lambda: way == "one call" and IN_C)
    monkeypatch.setattr(device, "on_gpu", lambda: way == "a GPU's")
    queries = 2 * drawn(1, 2, group * kv_heads, length, head_dim)
    keys, values = (cached(seed, 2, kv_heads, positions, head_dim) for seed in (2, 3))
    first = positions - length + 1
    expected = attended(queries, keys, values, 0.3, [first] * 2, window)
    masks: list[Mask] = [Causal(first, window), Causal(mx.array([first, first]), window)]
    if window is None:
        masks.append("causal" if length > 1 else None)
    for mask in masks:
        np.testing.assert_allclose(attention(queries, keys, values, 0.3, mask), expected, atol=3e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("way", ["one call", "without the C", "a GPU's"])
def test_scores_are_capped(monkeypatch: pytest.MonkeyPatch, window: int | None, way: str) -> None:
    """Scores of up to some 60 by a tanh, and its derivatives; of codes and of several texts in a row too."""
    monkeypatch.setattr(blas, "attends", lambda: way == "one call" and blas.OWN_FEW_ROWS in blas.status().name)
    monkeypatch.setattr(device, "on_gpu", lambda: way == "a GPU's")
    queries = 8 * drawn(1, 2, 4, 5, 64)
    keys, values = (cached(seed, 2, 2, 300, 64) for seed in (2, 3))
    mask, cap = Causal(296, window), 20.0
    expected = attended(queries, keys, values, 0.3, [296] * 2, window, cap)
    np.testing.assert_allclose(attention(queries, keys, values, 0.3, mask, cap), expected, atol=3e-5)
    codes = QuantizedCache(8)
    held = codes.update_and_fetch(keys, values)
    whole = [packed.whole(each) for each in held]
    found = attention(queries, *held, 0.3, mask, cap)
    np.testing.assert_allclose(found, attended(queries, *whole, 0.3, [296] * 2, window, cap), atol=3e-5)

    def plain(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        scores = cap * mx.tanh(0.3 / cap * queries @ mx.repeat(keys, 2, axis=1).swapaxes(2, 3))
        weights = mx.softmax(mx.where(mask.array(5, 300), scores, -mx.inf), axis=-1)
        return weights @ mx.repeat(values, 2, axis=1)

    given, above = [queries, keys, values], [drawn(4, *queries.shape)]
    derived = mx.vjp(lambda *x: attention(*x, 0.3, mask, cap), given, above)[1]
    for each, other in zip(derived, mx.vjp(plain, given, above)[1], strict=True):
        assert mx.allclose(each, other, atol=2e-4)
    numbers = mx.array([[1] * 140 + [2] * 160] * 2)
    row = 8 * drawn(5, 2, 4, 300, 64)
    first = attention(row[:, :, :140], keys[:, :, :140], values[:, :, :140], 0.3, "causal", cap)
    together = attention(row, keys, values, 0.3, Segments(numbers), cap)
    assert mx.allclose(together[:, :, :140], first, atol=3e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("with_c", [True, False])
def test_rows_that_end_at_different_positions(
    monkeypatch: pytest.MonkeyPatch, window: int | None, with_c: bool
) -> None:
    monkeypatch.setattr(blas, "attends", lambda: with_c and IN_C)
    ends = [1, 600, 256, 30]
    queries = drawn(1, 4, 6, 1, 64)
    keys, values = (cached(seed, 4, 2, 640, 64) for seed in (2, 3))
    found = attention(queries, keys, values, 0.125, Causal(mx.array(ends), window))
    np.testing.assert_allclose(found, attended(queries, keys, values, 0.125, ends, window), atol=2e-6)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("with_c", [True, False])
def test_rows_of_one_text(monkeypatch: pytest.MonkeyPatch, window: int | None, with_c: bool) -> None:
    monkeypatch.setattr(blas, "attends", lambda: with_c and IN_C)
    queries, keys, values = drawn(1, 5, 6, 1, 64), cached(2, 1, 2, 300, 64), cached(3, 1, 2, 300, 64)
    found = attention(queries, keys, values, 0.125, Causal(mx.arange(290, 295), window))
    expected = attended(queries.swapaxes(0, 2), keys, values, 0.125, [290], window).swapaxes(0, 2)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_keys_and_values_may_lie_in_any_order() -> None:
    """As a projection gives them, and a cache that they fill to its end."""
    queries = drawn(1, 1, 4, 256, 32)
    keys, values = (drawn(seed, 1, 256, 2, 32).swapaxes(1, 2) for seed in (2, 3))
    expected = attended(queries, keys, values, 0.2, [1], None)
    np.testing.assert_allclose(attention(queries, keys, values, 0.2, "causal"), expected, atol=3e-6)
    cache = KVCache()
    assert cache.step == 256
    filled = cache.update_and_fetch(keys, values)
    np.testing.assert_allclose(attention(queries, *filled, 0.2, "causal"), expected, atol=3e-6)


@in_one_call
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("window", "head_dim"), [(None, 64), (300, 64), (None, 100), (300, 12)])
def test_a_query_has_the_same_bits_alone_and_in_any_company(window: int | None, head_dim: int) -> None:
    """Of queries of its text or others, behind positions that it does not see, shared out to processors or not."""
    queries, (keys, values) = drawn(1, 1, 9, 160, head_dim), (drawn(seed, 1, 3, 900, head_dim) for seed in (2, 3))
    together = attention(queries, keys, values, 0.125, Causal(741, window))
    for length in (1, 2, 3, 8, 100):
        for start in (0, 27, 159):
            stop = min(start + length, 160)
            for spare in (0, 1, 60):
                near, far = (x[:, :, : min(900, 740 + stop + spare)] for x in (keys, values))
                found = attention(queries[:, :, start:stop], near, far, 0.125, Causal(741 + start, window))
                assert mx.array_equal(found, together[:, :, start:stop])
    for rows in (2, 3, 8):
        at = mx.arange(0, 160, 160 // rows)[:rows]
        batch = queries[0].swapaxes(0, 1)[at][:, :, None]
        all_keys, all_values = (mx.broadcast_to(x, (rows, *x.shape[1:])) for x in (keys, values))
        found = attention(batch, all_keys, all_values, 0.125, Causal(741 + at, window))
        for row, number in enumerate(at.tolist()):
            assert mx.array_equal(found[row, :, 0], together[0, :, number])
    one_text = queries[:, :, 40:47].swapaxes(0, 2)
    found = attention(one_text, keys, values, 0.125, Causal(781 + mx.arange(7), window))
    assert mx.array_equal(found.swapaxes(0, 2), together[:, :, 40:47])
    with blas.one_thread():
        assert mx.array_equal(attention(queries, keys, values, 0.125, Causal(741, window)), together)


@in_one_call
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_attended_to_as_what_they_stand_for(bits: int, head_dim: int) -> None:
    """To the bit, in spans that are full and others, and however they lie."""
    for positions, length, group, window in (
        (41, 1, 1, None), (256, 3, 2, None), (300, 1, 3, 7), (257, 9, 1, 30), (700, 40, 3, None), (700, 130, 1, 300),
    ):  # fmt: skip
        cache = QuantizedCache(bits)
        keys, values = cache.update_and_fetch(*(drawn(seed, 2, 2, positions, head_dim) for seed in (1, 2)))
        assert isinstance(keys, Packed) and isinstance(values, Packed)
        queries, mask = drawn(3, 2, 2 * group, length, head_dim), Causal(positions - length + 1, window)
        assert attending._fits_one_call(queries, keys)
        expected = attention(queries, keys.unpacked(), values.unpacked(), 0.2, mask)
        assert mx.array_equal(attention(queries, keys, values, 0.2, mask), expected), (positions, length)
        if length > 1:
            continue
        one_text = [Packed(*(x[:1] for x in (held.codes, held.scales, held.biases)), bits) for held in (keys, values)]
        mask = Causal(mx.array([positions - 1, positions]), window)
        expected = attention(queries, *(held.unpacked() for held in one_text), 0.2, mask)
        assert mx.array_equal(attention(queries, *one_text, 0.2, mask), expected)


@in_one_call
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("head_dim", [1024, 4096])
def test_the_widest_heads_fit_a_threads_stack(head_dim: int) -> None:
    """Of so many queries that a thread would join the spans of some."""
    keys, values = QuantizedCache(8).update_and_fetch(*(drawn(seed, 1, 1, 300, head_dim) for seed in (1, 2)))
    assert isinstance(keys, Packed) and isinstance(values, Packed)
    queries, mask = drawn(3, 1, 3, 260, head_dim), Causal(41)
    expected = attention(queries, keys.unpacked(), values.unpacked(), 0.02, mask)
    assert mx.array_equal(attention(queries, keys, values, 0.02, mask), expected)


@in_one_call
@pytest.mark.usefixtures("two_threads")
def test_calls_at_the_same_time_do_not_disturb_each_other() -> None:
    queries, keys, values = ([drawn(seed + at, 1, 4, 50, 64) for at in range(4)] for seed in (0, 10, 20))
    expected = [attention(*each, 0.125, "causal") for each in zip(queries, keys, values, strict=True)]
    mx.eval(expected)

    def attend(at: int) -> bool:
        with mx.stream(mx.new_stream(mx.cpu)):
            again = (attention(queries[at], keys[at], values[at], 0.125, "causal") for _ in range(50))
            return all(mx.array_equal(each, expected[at]).item() for each in again)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(attend, range(4)))


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("compiled", [False, True])
def test_derivatives_are_those_of_mlxs_own(window: int | None, compiled: bool) -> None:
    queries, keys, values = drawn(1, 1, 6, 90, 32), drawn(2, 1, 2, 120, 32), drawn(3, 1, 2, 120, 32)
    weights = drawn(4, 1, 6, 90, 32)
    mask = Causal(31, window)

    def ours(*heads: mx.array) -> mx.array:
        return (attention(*heads, 0.2, mask) * weights).sum()  # type: ignore[call-arg]

    def theirs(*heads: mx.array) -> mx.array:
        out = mx.fast.scaled_dot_product_attention(*heads, scale=0.2, mask=mask.array(90, 120))
        return (out * weights).sum()

    derive = mx.grad(ours, argnums=(0, 1, 2))
    found = (mx.compile(derive) if compiled else derive)(queries, keys, values)
    for mine, reference in zip(found, mx.grad(theirs, argnums=(0, 1, 2))(queries, keys, values), strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-5 * float(mx.abs(reference).max()))


@in_one_call
def test_weights_that_are_very_small_and_scores_that_are_very_large() -> None:
    queries, keys = 60 * drawn(1, 1, 2, 130, 32), 60 * drawn(2, 1, 1, 600, 32)
    values = drawn(3, 1, 1, 600, 32)
    found = attention(queries, keys, values, 1.0, "causal")
    np.testing.assert_allclose(found, attended(queries, keys, values, 1.0, [471], None), atol=2e-2)


@in_one_call
def test_what_is_no_number_is_not_hidden() -> None:
    queries, keys, values = drawn(1, 1, 2, 3, 32), drawn(2, 1, 1, 40, 32), drawn(3, 1, 1, 40, 32)
    for spoiled in (
        (queries * mx.nan, keys, values),
        (queries, keys * mx.nan, values),
        (queries, keys, values * mx.nan),
    ):
        assert mx.isnan(attention(*spoiled, 0.2, "causal")).all().item()


def test_who_asks_is_told_whether_attention_is_in_c() -> None:
    """A library of narrow vectors says no, and leaves such products alone."""
    assert attending._calls_arrive() is blas.attends()
