"""Caches against a plain list of what was written, across growth, trimming and padding."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx import blas, device
from elm_mlx.errors import InputError
from elm_mlx.model import packed
from elm_mlx.model.attention import Causal, Mask, Segments, attention
from elm_mlx.model.cache import (
    KVCache,
    QuantizedCache,
    SegmentedRow,
    StateCache,
    StepCache,
    make_prompt_cache,
    place_step,
    row_capacity,
    row_slots,
)  # fmt: skip
from elm_mlx.model.config import ModelConfig
from elm_mlx.model.network import Model
from elm_mlx.model.packed import Packed

IN_C = blas.attends()  # attention


def drawn(length: int, seed: int, batch: int = 1, heads: int = 2) -> tuple[mx.array, mx.array]:
    keys, values = mx.random.normal((2, batch, heads, length, 4), key=mx.random.key(seed))
    return keys, values


def filled(length: int, seed: int = 0, batch: int = 1) -> KVCache:
    cache = KVCache()
    cache.update_and_fetch(*drawn(length, seed, batch))
    return cache


steps = st.lists(
    st.tuples(st.just("write"), st.sampled_from([1, 1, 2, 100, 255, 256, 257, 600]))
    | st.tuples(st.just("trim"), st.integers(0, 400)),
    max_size=8,
)


@settings(max_examples=40)
@given(steps)
def test_a_cache_is_what_was_written_and_not_trimmed(actions: list[tuple[str, int]]) -> None:
    cache, keys, values = KVCache(), np.zeros((1, 2, 0, 4)), np.zeros((1, 2, 0, 4))
    for seed, (action, count) in enumerate(actions):
        if action == "trim":
            assert cache.trim(count) == min(count, keys.shape[2])
            kept = keys.shape[2] - min(count, keys.shape[2])
            keys, values = keys[:, :, :kept], values[:, :, :kept]
        else:
            new = drawn(count, seed)
            fetched = cache.update_and_fetch(*new)
            keys, values = (np.concatenate([old, x], axis=2) for old, x in zip((keys, values), new, strict=True))
            np.testing.assert_array_equal(fetched[0], keys.astype(np.float32))
            np.testing.assert_array_equal(fetched[1], values.astype(np.float32))
        assert cache.offset == keys.shape[2] <= cache.capacity
        assert cache.capacity % KVCache.step == 0


def test_an_empty_cache_is_empty() -> None:
    cache = KVCache()
    assert (cache.offset, cache.capacity, cache.nbytes, cache.state) == (0, 0, 0, [None, None])
    assert cache.trim(5) == 0 and cache.is_trimmable()
    with pytest.raises(ValueError, match="trimmed by -1 positions"):
        cache.trim(-1)


def test_room_is_made_once_and_says_its_size() -> None:
    cache = filled(256)
    assert cache.capacity == 256
    assert cache.nbytes == 2 * 2 * 256 * 4 * 4
    before = np.array(cache.state[0])
    cache.reserve(257)
    assert cache.capacity == 512 and cache.offset == 256
    np.testing.assert_array_equal(cache.state[0][:, :, :256], before)
    keys = cache.state[0]
    cache.reserve(400)
    assert cache.state[0] is keys


@given(st.integers(1, 20_000), st.integers(0, 4_000))
def test_a_steps_mask_fits_the_room_that_there_is(length: int, more: int) -> None:
    """However far a text has been read, and gone on since."""
    cache = KVCache()
    cache.update_and_fetch(*mx.zeros((2, 1, 1, length, 1)))
    for longest in range(length, length + more, 7):
        if longest >= cache.capacity:
            cache.reserve(row_capacity(longest + 1))
        assert place_step([longest])[1].shape[-1] <= cache.capacity


def test_the_type_of_what_is_written_stays() -> None:
    cache = KVCache()
    keys, _ = cache.update_and_fetch(*(x.astype(mx.bfloat16) for x in drawn(3, 0)))
    assert keys.dtype == mx.bfloat16
    cache.reserve(300)
    assert cache.state[0] is not None and cache.state[0].dtype == mx.bfloat16


def test_only_what_comes_after_is_hidden() -> None:
    assert KVCache().make_mask(1) is None
    assert KVCache().make_mask(2) == "causal"


def test_a_step_writes_at_its_position_and_sees_up_to_there() -> None:
    cache = filled(5)
    step = StepCache(KVCache(), cache.state, *place_step([5]))
    np.testing.assert_array_equal(step.offset, [5])
    new = drawn(1, 9)
    keys, values = step.update_and_fetch(*new)
    expected = filled(5).update_and_fetch(*new)
    np.testing.assert_array_equal(keys[:, :, :6], expected[0])
    np.testing.assert_array_equal(values[:, :, :6], expected[1])
    assert not np.array(keys[:, :, 6:]).any()
    np.testing.assert_array_equal(np.array(step.make_mask(1).array(1, 64)).reshape(-1), np.arange(64) <= 5)


def test_each_row_of_a_step_writes_at_its_own_position() -> None:
    cache, lengths = KVCache(), (5, 3, 1)
    for row, length in enumerate(lengths):
        cache.put(row, filled(length, seed=length))
    assert cache.state[0] is not None and cache.state[0].shape[0] == row_slots(3) == 4
    step = StepCache(KVCache(), cache.state, *place_step(lengths))
    np.testing.assert_array_equal(step.offset, lengths)
    new = drawn(1, 9, batch=3)
    keys, values = step.update_and_fetch(*new)
    assert keys.shape == values.shape == (3, 2, 64, 4)
    mask = np.array(step.make_mask(1).array(1, 64))
    assert mask.shape == (3, 1, 1, 64)
    for row, length in enumerate(lengths):
        expected = filled(length, seed=length).update_and_fetch(new[0][row : row + 1], new[1][row : row + 1])
        np.testing.assert_array_equal(keys[row, :, : length + 1], expected[0][0])
        np.testing.assert_array_equal(values[row, :, : length + 1], expected[1][0])
        assert not np.array(keys[row, :, length + 1 :]).any()
        np.testing.assert_array_equal(np.flatnonzero(mask[row]), np.arange(length + 1))


@given(st.data())
@settings(max_examples=30)
def test_rows_come_and_go_and_the_others_stay_what_they_are(data: st.DataObject) -> None:
    cache, texts = KVCache(), list[KVCache]()
    for seed in range(data.draw(st.integers(1, 12))):
        if texts and data.draw(st.booleans()):
            gone = data.draw(st.integers(0, len(texts) - 1))
            if len(texts) == 1:
                cache = KVCache()
            else:
                cache.drop(gone, len(texts))
            texts[gone] = texts[-1]
            texts.pop()
        else:
            length = data.draw(st.sampled_from([1, 7, 255, 256, 257, 600]))
            texts.append(filled(length, seed))
            cache.put(len(texts) - 1, filled(length, seed))
        for row, text in enumerate(texts):
            keys, theirs = cache.state[0], text.state[0]
            assert keys is not None and theirs is not None
            np.testing.assert_array_equal(keys[row, :, : text.offset], theirs[0, :, : text.offset])
            copied = cache.single(row, text.offset)
            assert copied.offset == text.offset and copied.capacity % KVCache.step == 0
            np.testing.assert_array_equal(copied.state[1][0, :, : text.offset], text.state[1][0, :, : text.offset])
        assert not texts or len(texts) <= cache.state[0].shape[0] <= 4 * len(texts)


def test_blocks_restore_a_cache() -> None:
    cache = filled(300)
    restored = KVCache()
    restored.restore([cache.block(0, start, start + 100) for start in (0, 100, 200)], 300)
    assert restored.offset == 300 and restored.capacity == 512
    for array, expected in zip(restored.state, cache.state, strict=True):
        np.testing.assert_array_equal(array[:, :, :300], expected[:, :, :300])


def test_every_layer_gets_a_cache_of_its_own() -> None:
    model = Model(tiny.scaled_config(64))
    caches = make_prompt_cache(model)
    assert len(caches) == 3 and len({id(cache) for cache in caches}) == 3


@pytest.mark.parametrize("name", ["OpenELM-270M", "OpenELM-3B"])
def test_a_token_takes_the_bytes_that_the_config_says(name: str) -> None:
    config = ModelConfig.preset(name)
    caches = [KVCache() for _ in config.num_kv_heads]
    for cache, heads in zip(caches, config.num_kv_heads, strict=True):
        cache.update_and_fetch(*mx.zeros((2, 1, heads, 1, config.head_dim), mx.bfloat16))
    assert sum(cache.nbytes for cache in caches) == KVCache.step * config.kv_bytes_per_token(2)


def test_a_state_is_forgotten_whole_or_not_at_all() -> None:
    cache = StateCache()
    assert not cache.is_trimmable() and cache.nbytes == 0 and cache.capacity == 1
    cache[0], cache[1], cache.offset = mx.ones((1, 3, 4)), mx.ones((1, 4, 2)), 7
    assert cache.trim(6) == 0 and cache.offset == 7 and cache.nbytes == 4 * (12 + 8)
    assert cache.trim(7) == 7 and cache.offset == 0 and cache.state == [None, None]


def test_states_of_several_prompts_are_rows_of_one() -> None:
    caches = []
    for value, length in ((1.0, 3), (2.0, 5)):
        cache = StateCache()
        cache.state, cache.offset = [mx.full((1, 2), value), mx.full((1, 3, 2), value)], length
        caches.append(cache)
    joined = StateCache()
    for row, cache in enumerate(caches):
        joined.put(row, cache)
    assert [array.shape for array in joined.state if array is not None] == [(2, 2), (2, 3, 2)]
    assert joined[0] is not None and joined[0].tolist() == [[1.0, 1.0], [2.0, 2.0]]
    joined.drop(0, 2)
    assert joined[0].tolist() == [[2.0, 2.0]]
    assert joined.single(0, 5).offset == 5


def test_a_window_hides_what_is_too_long_ago() -> None:
    cache = filled(6)
    assert cache.make_mask(2, window_size=8) == "causal" and cache.make_mask(1, window_size=7) is None
    window = cache.make_mask(3, window_size=4)
    assert isinstance(window, Causal)
    mask = np.array(window.array(3, 9)).reshape(3, 9)
    for row, position in enumerate((6, 7, 8)):
        np.testing.assert_array_equal(np.flatnonzero(mask[row]), np.arange(position - 3, position + 1))
    step = StepCache(KVCache(), cache.state, *place_step([6]))
    np.testing.assert_array_equal(np.flatnonzero(step.make_mask(1, window_size=4).array(1, 64)), [3, 4, 5, 6])


def test_texts_in_a_row_see_themselves_alone_and_their_window() -> None:
    segments = Segments(mx.array([[0, 0, 0, 1, 1, 1]]))
    row = SegmentedRow(segments)
    keys, values = drawn(6, 0)
    assert row.update_and_fetch(keys, values) == (keys, values) and row.offset == 0
    assert row.make_mask(6) is segments and row.make_mask(6, window_size=6) is segments
    mask = np.array(row.make_mask(6, window_size=2)).reshape(6, 6)
    seen = {(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5)}
    assert {(int(i), int(j)) for i, j in np.argwhere(mask)} == seen


# --- in 8 and 4 bits


def wide(length: int, seed: int = 0, batch: int = 1, head_dim: int = 64) -> tuple[mx.array, mx.array]:
    keys, values = mx.random.normal((2, batch, 2, length, head_dim), key=mx.random.key(seed))
    return keys, values


def rounded(x: mx.array, bits: int) -> mx.array:
    """What MLX's own quantization of these values leaves of them."""
    group = 64 if x.shape[-1] % 64 == 0 else 32
    return mx.dequantize(*mx.quantize(x, group, bits), group, bits)


def packed_cache(bits: int, length: int, seed: int = 0, head_dim: int = 64) -> QuantizedCache:
    cache = QuantizedCache(bits)
    cache.update_and_fetch(*wide(length, seed, head_dim=head_dim))
    return cache


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=10)
@given(actions=steps)
def test_quantized_keys_are_what_was_written_but_for_the_codes(
    bits: int, head_dim: int, actions: list[tuple[str, int]]
) -> None:
    cache, kept = QuantizedCache(bits), [mx.zeros((1, 2, 0, head_dim))] * 2
    for seed, (action, count) in enumerate(actions):
        if action == "trim":
            cache.trim(count)
            kept = [x[:, :, : cache.offset] for x in kept]
        else:
            new = wide(count, seed, head_dim=head_dim)
            found = cache.update_and_fetch(*new)
            kept = [mx.concatenate([old, rounded(x, bits)], axis=2) for old, x in zip(kept, new, strict=True)]
            for quantized, expected in zip(found, kept, strict=True):
                assert isinstance(quantized, Packed) and quantized.shape == expected.shape
                np.testing.assert_array_equal(quantized.unpacked(), expected)
        assert cache.offset == kept[0].shape[2] <= cache.capacity


@pytest.mark.parametrize("bits", [8, 4])
def test_each_position_takes_the_bytes_of_its_codes_and_scales(bits: int) -> None:
    cache = packed_cache(bits, 256)
    assert cache.nbytes == 256 * 2 * 2 * (64 * bits // 8 + 8)
    half = QuantizedCache(bits)
    half.update_and_fetch(*(x.astype(mx.bfloat16) for x in wide(256)))
    assert half.nbytes == 256 * 2 * 2 * (64 * bits // 8 + 4)
    found, _ = half.fetched([array for array in half.state if array is not None])
    assert isinstance(found, Packed) and found.dtype == found.unpacked().dtype == mx.bfloat16


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_rows_come_and_go_and_are_blocks(bits: int) -> None:
    lengths = (300, 5, 260)
    texts = [packed_cache(bits, length, seed) for seed, length in enumerate(lengths)]
    cache = QuantizedCache(bits)
    for row, text in enumerate(texts):
        cache.put(row, text)
    cache.drop(0, 3)
    for row, text in ((0, texts[2]), (1, texts[1])):
        single = cache.single(row, text.offset)
        assert isinstance(single, QuantizedCache) and single.kv_bits == bits
        for array, expected in zip(single.block(0, 0, text.offset), text.block(0, 0, text.offset), strict=True):
            np.testing.assert_array_equal(array, expected)
    restored = QuantizedCache(bits)
    restored.restore([texts[0].block(0, start, start + 100) for start in (0, 100, 200)], 300)
    assert restored.capacity == 512
    for array, expected in zip(restored.block(0, 0, 300), texts[0].block(0, 0, 300), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_row_is_the_one_that_it_would_be_alone(bits: int) -> None:
    """To the bit: in a step of one row, of several, and read in one piece."""
    lengths, cache, new = (5, 3, 1), QuantizedCache(bits), wide(1, 9, batch=3)
    for row, length in enumerate(lengths):
        cache.put(row, packed_cache(bits, length, seed=length))
    step = cache.inside([array for array in cache.state if array is not None], *place_step(lengths))
    keys, values = map(packed.whole, step.update_and_fetch(*new))
    assert keys.shape == (3, 2, 64, 64)
    for row, length in enumerate(lengths):
        alone = packed_cache(bits, length, seed=length).update_and_fetch(new[0][row : row + 1], new[1][row : row + 1])
        for found, expected in zip((keys, values), map(packed.whole, alone), strict=True):
            np.testing.assert_array_equal(found[row, :, : length + 1], expected[0])
        assert not np.array(keys[row, :, length + 1 :]).any(), "what no step has written is no number that hurts"


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("queries", [1, 3, 8, 9])
def test_attention_multiplies_codes_or_what_they_stand_for(
    bits: int, queries: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU those of few queries as they are, the C all of them, and MLX's loops on a CPU none."""
    asked = mx.random.normal((1, 6, queries, head_dim), key=mx.random.key(5))
    keys, values = packed_cache(bits, 70, head_dim=head_dim).update_and_fetch(*wide(queries, 7, head_dim=head_dim))
    window = mx.arange(70 + queries) > 40
    masks: list[Mask] = [Causal(71, 20), "causal" if queries > 1 else None, *[window] * (queries == 1)]
    for mask in masks:
        expected = attention(asked, packed.whole(keys), packed.whole(values), head_dim**-0.5, mask)
        for on_gpu, in_c in ((True, False), (False, True), (False, False)):
            monkeypatch.setattr(device, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
            monkeypatch.setattr(blas, "attends", lambda in_c=in_c: in_c and IN_C)
            found = attention(asked, keys, values, head_dim**-0.5, mask)
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_models_whose_keys_cannot_be_quantized_are_refused() -> None:
    for fields, bits, reason in (
        ({"head_dim": 16}, 8, "heads of 16 values cannot be quantized: groups of 64 or 32 do not fit"),
        ({"head_dim": 64}, 3, "--kv-bits 3: 8 or 4 are possible"),
    ):
        with pytest.raises(InputError, match=reason):
            make_prompt_cache(Model(tiny.scaled_config(64, **fields)), bits)
    caches = make_prompt_cache(Model(tiny.scaled_config(64, head_dim=32)), 4)
    assert all(isinstance(cache, QuantizedCache) and cache.kind == "keys and values in 4 bits" for cache in caches)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}  # fmt: skip


def numbers(cache: Any) -> list[Any]:
    return [array.tolist() for array in cache.single(0, cache.offset).state]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", [KVCache, lambda: QuantizedCache(8)], ids=["keys and values", "in 8 bits"])
def test_a_copy_and_what_it_was_made_of_grow_apart(make: Callable[[], Any], copied: Callable[[Any], Any]) -> None:
    heads = [mx.random.normal((2, 1, 2, 5, 32), key=mx.random.key(seed)) for seed in range(3)]
    one = make()
    one.update_and_fetch(*heads[0])
    other = copied(one)
    found = []
    for cache, keys_and_values in ((one, heads[1]), (other, heads[2])):
        cache.update_and_fetch(*keys_and_values)
        found.append(numbers(cache))
    assert [numbers(one), numbers(other)] == found and found[0] != found[1]
    one.put(1, other)
    one.drop(0, 2)
    assert [numbers(one), numbers(other)] == [found[1], found[1]]
    one.state = [None] * len(one.state)
    assert numbers(other) == found[1]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_state_is_one_of_its_own(copied: Callable[[Any], Any]) -> None:
    one = StateCache()
    one[0] = one[1] = mx.zeros((1, 4))
    other = copied(one)
    one[0] = mx.ones((1, 4))
    assert mx.array_equal(other[0], mx.zeros((1, 4))) and mx.array_equal(one[0], mx.ones((1, 4)))
