"""Texts that go on past what their cache holds: the first positions and the last, as if nothing had stood between."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import other_models
import pytest
import tiny

from elm_mlx import stream_generate
from elm_mlx.errors import InputError
from elm_mlx.inference.conversation import Chat
from elm_mlx.inference.generation import Response
from elm_mlx.inference.prefix import PrefixCache
from elm_mlx.inference.rows import Rows, prefill
from elm_mlx.inference.sampling import Sampler
from elm_mlx.inference.speculation import DraftPace
from elm_mlx.model.cache import StreamingCache, make_prompt_cache
from elm_mlx.model.network import Model
from elm_mlx.model.rope import Rope
from elm_mlx.model.rope_config import RopeConfig
from elm_mlx.store.loading import load_model
from elm_mlx.text.tokenizer import Tokenizer

LIMIT, SINKS = 64, StreamingCache.SINKS


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.random_model(tiny.scaled_config(96, max_context_length=256), seed=3)


@pytest.fixture(scope="module")
def flat() -> Model:
    """One layer, whose keys and values are those of a token and its position alone."""
    return tiny.random_model(tiny.scaled_config(96, num_layers=1, max_context_length=256), seed=3)


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 96, length).tolist()


def run(model: Model, ids: Sequence[int], count: int, **options: Any) -> list[Response]:
    return list(stream_generate(model, None, ids, max_tokens=count, stop_at_eos=False, **options))


def in_view(cache: Any, ids: Sequence[int]) -> list[int]:
    """The ids that a cache still holds of those that it was given."""
    return [*ids[:SINKS], *ids[SINKS + cache.dropped :]] if cache.dropped else [*ids]


@pytest.mark.parametrize(
    "config",
    [10_000.0, RopeConfig("default", 8, 10_000.0, original=0), RopeConfig("linear", 16, 1e4, original=64, factor=4.0)],
    ids=["plain", "partial", "linear"],
)
def test_keys_are_moved_as_if_rotated_elsewhere(config: Any) -> None:
    rope, x = Rope(16, config), mx.random.normal((1, 2, 5, 16), key=mx.random.key(1))
    for positions in (-3, -40, 7):
        moved = rope.moved(rope(5, 50)(x), positions)
        np.testing.assert_allclose(moved, rope(5, 50 + positions)(x), atol=2e-5)


@pytest.mark.usefixtures("branch")
def test_while_it_fits_a_text_is_the_usual_one(model: Model) -> None:
    for length in (1, 32, 50):
        ids, caches = ids_of(length), make_prompt_cache(model, max_kv_size=LIMIT)
        found = run(model, ids, 12, prompt_cache=caches)
        usual = run(model, ids, 12, prefill_step=LIMIT // 2)  # no piece takes more than half of what there is room for
        assert [(each.token, each.logprob) for each in found] == [(each.token, each.logprob) for each in usual]


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("length", [63, 64, 65, 100, 200, 700])
def test_what_is_in_view_stands_as_if_nothing_had_been_between(flat: Model, length: int) -> None:
    """Prompts longer than the context too: the logits are those of a text of just what is in view."""
    ids, caches = ids_of(length), make_prompt_cache(flat, max_kv_size=LIMIT)
    logits = prefill(flat, ids, caches)
    cache = caches[0]
    assert cache.offset <= LIMIT and cache.length == length and cache.offset >= min(length, LIMIT // 2)
    text = in_view(cache, ids)
    assert len(text) == cache.offset
    np.testing.assert_allclose(logits, flat(mx.array([text]))[:, -1], atol=2e-3)
    rows = Rows(flat)
    rows.join(caches, ids)
    for token in ids_of(100, seed=1):
        ids.append(token)
        logits = rows.step(mx.array([token]))
        np.testing.assert_allclose(logits, flat(mx.array([in_view(cache, ids)]))[:, -1], atol=3e-3)
        assert cache.offset <= LIMIT and cache.length == len(ids) and rows.lengths == [cache.offset]


@pytest.mark.usefixtures("branch")
def test_a_text_goes_on_past_the_context_in_the_same_memory(model: Model) -> None:
    caches = make_prompt_cache(model, max_kv_size=LIMIT)
    responses = run(model, ids_of(20), 600, prompt_cache=caches)
    assert len(responses) == 600 and responses[-1].finish_reason == "length"
    assert all(cache.offset <= LIMIT and cache.capacity <= 256 for cache in caches)
    assert caches[0].length == 20 + 599, "all but the last are fed"
    assert run(model, ids_of(300), 5, prompt_cache=make_prompt_cache(model, max_kv_size=LIMIT))[-1].prompt_tokens == 300


def test_what_is_read_again_and_what_is_not(flat: Model) -> None:
    """A text is cut back as far as its end is in view; else it is read anew."""
    cache, ids = PrefixCache(flat, max_kv_size=LIMIT), ids_of(150)
    assert cache.read(ids) is not None
    assert cache.shared([*ids, 5]) == 150
    assert cache.shared([*ids[:140], 5]) == 140
    assert cache.shared([*ids[:60], 5]) == 0, "what stands there was dropped"
    logits = cache.read([*ids[:140], 5])
    assert cache.ids == [*ids[:140], 5]
    np.testing.assert_allclose(logits, flat(mx.array([in_view(cache.caches[0], cache.ids)]))[:, -1], atol=3e-3)
    logits = cache.read([*ids[:60], 5])
    assert cache.ids == [*ids[:60], 5] and cache.caches[0].dropped == 0
    np.testing.assert_allclose(logits, flat(mx.array([cache.ids]))[:, -1], atol=3e-3)
    assert logits is not None
    found = list(cache.decode(logits, Sampler(), 0, 100))
    assert len(found) == 100 and cache.ids == [*ids[:60], 5, *found[: len(cache.ids) - 61]]
    assert cache.caches[0].length == len(cache.ids) >= 61 + 98


def test_a_conversation_forgets_no_exchange(model: Model, tiny_tokenizer: Tokenizer) -> None:
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size, max_context_length=128), seed=3)
    chat = Chat(model, tiny_tokenizer, options={"max_tokens": 40, "temp": 1.0}, seed=1, max_kv_size=LIMIT)
    for _ in range(8):
        reply = chat.ask("the quick brown fox")
        "".join(reply)
        assert not reply.forgotten and reply.finish_reason in ("length", "stop")
        assert chat.cache.caches[0].offset <= LIMIT
    assert len(chat.exchanges) == 8 and chat.cache.caches[0].length > 128
    assert chat.last is not None and chat.last.read_tokens < 40, "what was said is not read again"


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "olmo2", "olmo3", "gemma2"])
def test_other_families_go_on(name: str, tmp_path: Path) -> None:
    model = load_model(other_models.write_model(tmp_path / name, name))
    limit = 48
    while_fits = run(model, ids_of(20), 10, prompt_cache=make_prompt_cache(model, max_kv_size=limit))
    assert [each.logprob for each in while_fits] == [each.logprob for each in run(model, ids_of(20), 10)]
    responses = run(model, ids_of(20), 150, prompt_cache=make_prompt_cache(model, max_kv_size=limit))
    assert len(responses) == 150 and all(np.isfinite(each.logprob) for each in responses)


def test_what_cannot_be_streamed_is_refused(
    model: Model, tiny_tokenizer: Tokenizer, family_dirs: dict[str, Path]
) -> None:
    for size in (31, 0, -1, 257, sys.maxsize):
        with pytest.raises(InputError, match=f"--max-kv-size {size}: 32 to 256 are possible for this model"):
            make_prompt_cache(model, max_kv_size=size)
    with pytest.raises(InputError, match="cannot be in --kv-bits: choose one"):
        make_prompt_cache(model, 8, 64)
    with pytest.raises(InputError, match="--max-kv-size: Mamba keeps a state"):
        make_prompt_cache(load_model(family_dirs["mamba"]), max_kv_size=64)
    with pytest.raises(InputError, match="choose --max-kv-size or drafts"):
        Chat(model, tiny_tokenizer, max_kv_size=64, prompt_lookup=True)


@pytest.mark.parametrize("options", [{"prompt_lookup": True}, {"draft_model": True, "num_draft_tokens": 4}], ids=str)
@pytest.mark.parametrize("sampling", [{}, {"temp": 0.8, "seed": 3, "repetition_penalty": 1.2}], ids=str)
def test_guesses_change_no_text_without_end(
    model: Model, options: dict[str, Any], sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the guesses end, and however long the prompt was: the same positions are dropped at the same time."""
    monkeypatch.setattr(DraftPace, "choose", lambda self, likely: len(likely))
    drafts = {**options, **({"draft_model": model} if "draft_model" in options else {})}
    for length in (20, 47, 48, 150):
        plain, guessed = (
            run(model, ids_of(length), 150, prompt_cache=make_prompt_cache(model, max_kv_size=48), **sampling, **extra)
            for extra in ({}, drafts)
        )
        assert [(each.token, each.logprob) for each in guessed] == [(each.token, each.logprob) for each in plain]
        figures = guessed[-1].drafts
        assert figures is not None and (figures.drafted > 5 or (sampling and "prompt_lookup" in options))
