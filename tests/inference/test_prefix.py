"""What a model has read is never read again, and never claimed where it was not."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx.inference import prefix
from elm_mlx.inference.generation import prefill, stream_generate
from elm_mlx.inference.prefix import READ_STEP, PrefixCache
from elm_mlx.inference.sampling import Sampler
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.network import Model
from elm_mlx.store.loading import load_model

VOCAB = 96


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.random_model(tiny.scaled_config(VOCAB))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass has read."""
    counts: list[int] = []

    def counting(model: Model, ids: list[int], *rest: object) -> mx.array:
        counts.append(len(ids))
        return prefill(model, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prefix, "prefill", counting)
    return counts


def fresh(model: Model, ids: list[int]) -> np.ndarray:
    return np.array(prefill(model, ids, make_prompt_cache(model)))


def drawn(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=30)
@given(prompts)
def test_whatever_was_read_before_the_logits_are_those_of_a_fresh_model(model: Model, texts: list[list[int]]) -> None:
    cache = PrefixCache(model)
    for ids in texts:
        logits = cache.read(ids)
        assert cache.ids == ids and all(layer.offset == len(ids) for layer in cache.caches)
        assert logits is not None
        np.testing.assert_allclose(np.array(logits), fresh(model, ids), atol=1e-4)


def test_only_what_is_new_is_read(model: Model, read: list[int]) -> None:
    cache, text = PrefixCache(model), drawn(2 * READ_STEP + 5)
    cache.read(text)
    assert read == [READ_STEP, READ_STEP, 5]
    for longer, new in (
        ([*text, 1, 2], 2),  # it has grown
        ([*text, 1, 2], 1),  # the same again: the last token's logits are not kept
        ([*text[:-1], (text[-1] + 1) % VOCAB, 3], 2),  # its end is another
        (text[:4], 1),
        (drawn(7, seed=1), 7),  # another text
    ):
        read.clear()
        assert cache.shared(longer) == len(longer) - new
        cache.read(longer)
        assert read == [new] and cache.ids == longer


def test_a_stop_leaves_what_was_read(model: Model, read: list[int]) -> None:
    cache, text = PrefixCache(model), drawn(3 * READ_STEP)
    answers = iter([False, True])
    assert cache.read(text, lambda: next(answers)) is None
    assert cache.ids == text[:READ_STEP] and cache.caches[0].offset == READ_STEP
    logits = cache.read(text)
    assert read == [READ_STEP] * 3 and logits is not None
    np.testing.assert_allclose(np.array(logits), fresh(model, text), atol=1e-4)


def test_an_answer_belongs_to_what_was_read(model: Model, read: list[int]) -> None:
    """Greedy as `stream_generate`, and left in the middle the ids are those that the caches hold."""
    cache, text = PrefixCache(model), drawn(9)
    expected = [r.token for r in stream_generate(model, None, text, max_tokens=20, stop_at_eos=False)]
    logits = cache.read(text)
    assert logits is not None
    assert list(islice(cache.decode(logits, Sampler(), 0, 20), 7)) == expected[:7]
    held = len(cache.ids)
    assert 9 <= held <= 9 + 8 and cache.ids == [*text, *expected][:held] and cache.caches[0].offset == held
    read.clear()
    logits = cache.read([*text, *expected[:7]])
    assert sum(read) <= 2 and logits is not None
    assert list(cache.decode(logits, Sampler(), 0, 13)) == expected[7:]


def test_a_failure_amid_a_step_forgets_everything(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PrefixCache(model)
    cache.read(drawn(5))

    def fail(*arguments: object) -> mx.array:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prefix, "prefill", fail)
        with pytest.raises(KeyboardInterrupt):
            cache.read([*drawn(5), 1])
    assert cache.ids == [] and cache.caches[0].offset == 0 and cache.nbytes == 0
    assert cache.read(drawn(5)) is not None


def test_a_state_that_cannot_be_cut_back_is_kept_whole_or_read_anew(
    family_dirs: dict[str, Path], read: list[int]
) -> None:
    model = load_model(family_dirs["mamba"])
    cache = PrefixCache(model)
    cache.read([5, 6, 7])
    read.clear()
    cache.read([5, 6, 7, 8])
    assert read == [1]
    cache.read([5, 6, 9])
    logits = cache.read([5, 6, 9])
    assert read == [1, 3, 3] and logits is not None
    np.testing.assert_allclose(np.array(logits), fresh(model, [5, 6, 9]), atol=1e-4)
