"""Texts with keys and values in 8 and 4 bits: alone, together, interrupted, saved, and close to those of whole ones."""

from __future__ import annotations

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
from elm_mlx.evaluate.scoring import Scored, Scorer
from elm_mlx.inference.batch import generate_batch
from elm_mlx.inference.prefix import PrefixCache
from elm_mlx.inference.rows import PREFILL_STEP, Rows, prefill
from elm_mlx.inference.sampling import Sampler
from elm_mlx.inference.saved_cache import Origin, load_cache, save_cache
from elm_mlx.model import ops
from elm_mlx.model.cache import KVCache, make_prompt_cache
from elm_mlx.model.network import Model
from elm_mlx.store.loading import load_model

BITS = (8, 4)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.random_model(tiny.scaled_config(96, head_dim=64, max_context_length=1024), seed=3)


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 96, length).tolist()


def run(model: Model, ids: Sequence[int], count: int = 12, **options: Any) -> list[tuple[int, float]]:
    found = stream_generate(model, None, ids, max_tokens=count, stop_at_eos=False, **options)
    return [(response.token, response.logprob) for response in found]


def read(model: Model, ids: Sequence[int], bits: int) -> tuple[mx.array, list[KVCache]]:
    caches = make_prompt_cache(model, bits)
    logits = prefill(model, ids, caches)
    mx.eval(logits, [cache.state for cache in caches])
    return logits, caches


def eager(model: Model, ids: Sequence[int], count: int, bits: int) -> list[tuple[int, float]]:
    """Token by token: nothing compiled, nothing ahead."""
    logits, caches = read(model, ids, bits)
    found = []
    for _ in range(count):
        logprobs = logits.astype(mx.float32) - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = int(logits.argmax(axis=-1).item())
        found.append((token, float(logprobs[0, token].item())))
        logits = model(mx.array([[token]]), cache=caches)[:, -1]
    return found


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("length", [1, 5, 250, 256, 300])
@pytest.mark.parametrize("bits", BITS)
def test_the_compiled_step_is_the_plain_one(model: Model, bits: int, length: int) -> None:
    ids = ids_of(length, seed=length)
    found, expected = (
        run(model, ids, 8, prompt_cache=make_prompt_cache(model, bits)), eager(model, ids, 8, bits),
    )  # fmt: skip
    assert [token for token, _ in found] == [token for token, _ in expected]
    np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], atol=2e-3)


def test_more_bits_are_closer(model: Model) -> None:
    ids = ids_of(400)
    whole = prefill(model, ids, make_prompt_cache(model))
    kl = []
    for bits in BITS:
        before, after = (x - ops.logsumexp(x)[:, None] for x in (whole, read(model, ids, bits)[0]))
        kl.append(float(ops.kl_divergences(before, after).item()))
    assert 0 < kl[0] < 0.05 * kl[1] and kl[1] < 1


@pytest.mark.parametrize("bits", BITS)
def test_a_row_has_the_bits_of_its_own_whatever_its_company(model: Model, bits: int) -> None:
    prompts = [ids_of(length, seed=length) for length in (3, 300, 40, 129, 7)]
    alone = []
    for prompt in prompts:
        rows, (logits, caches) = Rows(model), read(model, prompt, bits)
        rows.join(caches, prompt)
        out = []
        for _ in range(6):
            logits = rows.step(logits.argmax(axis=-1))
            out.append(np.array(logits[0]))
        alone.append(out)
    rows, each = Rows(model), [read(model, prompt, bits) for prompt in prompts]
    for prompt, (_, caches) in zip(prompts, each, strict=True):
        rows.join(caches, prompt)
    logits = mx.concatenate([logits for logits, _ in each])
    places = [0, 1, 2, 3, 4]
    for step in range(6):
        logits = rows.step(logits.argmax(axis=-1))
        for row, place in enumerate(places):
            np.testing.assert_array_equal(np.array(logits[row]), alone[place][step])
        if step == 2:
            rows.leave(1)
            places = [0, 4, 2, 3]
            logits = logits[mx.array(places)]


@pytest.mark.parametrize("bits", BITS)
def test_prompts_of_a_batch_are_those_alone(model: Model, bits: int) -> None:
    prompts = [ids_of(20, 1), ids_of(300, 2), ids_of(20, 1)]
    done = generate_batch(model, None, prompts, max_tokens=6, prompt_cache=make_prompt_cache(model, bits))  # type: ignore[arg-type]
    for prompt, completion in zip(prompts, done, strict=True):
        expected = run(model, prompt, len(completion.tokens), prompt_cache=make_prompt_cache(model, bits))
        assert list(zip(completion.tokens, completion.logprobs, strict=True)) == expected


@pytest.mark.parametrize("bits", BITS)
def test_a_saved_cache_is_loaded_as_the_same_kind_alone(model: Model, bits: int, tmp_path: Path) -> None:
    document, origin = ids_of(PREFILL_STEP + 30), Origin("a" * 64)
    save_cache(tmp_path / "c", origin, document, read(model, document, bits)[1])
    caches, prompt = make_prompt_cache(model, bits), [*document, 7, 8]
    cached = load_cache(tmp_path / "c", origin, model, caches)
    plain = run(model, prompt, prompt_cache=make_prompt_cache(model, bits))
    assert run(model, prompt, prompt_cache=caches, cached=cached) == plain
    with pytest.raises(InputError, match=f"holds 'keys and values in {bits} bits', and keys and values are wanted"):
        load_cache(tmp_path / "c", origin, model, make_prompt_cache(model))
    with pytest.raises(InputError, match=f"and keys and values in {12 - bits} bits are wanted"):
        load_cache(tmp_path / "c", origin, model, make_prompt_cache(model, 12 - bits))


def test_a_conversation_keeps_its_kind(model: Model) -> None:
    cache, ids = PrefixCache(model, 8), ids_of(9)
    logits = cache.read(ids)
    assert logits is not None
    found = list(cache.decode(logits, Sampler(), 0, 6))
    assert found == [token for token, _ in run(model, ids, 6, prompt_cache=make_prompt_cache(model, 8))]
    cache.clear()
    assert cache.caches[0].kind == "keys and values in 8 bits"


@pytest.mark.parametrize("bits", BITS)
def test_scores_are_those_of_a_text_read_with_such_a_cache(model: Model, bits: int) -> None:
    ids = ids_of(60)
    (scores,) = Scorer(model, kv_bits=bits).score([[Scored(ids, 20)]])
    logits = model(mx.array([ids]), cache=make_prompt_cache(model, bits))[0]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = sum(float(logprobs[at - 1, ids[at]].item()) for at in range(20, 60))
    assert scores.logprobs[0] == pytest.approx(expected, abs=1e-3)
    questions = [[Scored([*ids[:40], *ids_of(5, seed)], 40) for seed in range(3)]]  # from one prefix
    (shared,) = Scorer(model, kv_bits=bits).score(questions)
    for score, asked in zip(shared.logprobs, questions[0], strict=True):
        logits = model(mx.array([asked.ids]), cache=make_prompt_cache(model, bits))[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        expected = sum(float(logprobs[at - 1, asked.ids[at]].item()) for at in range(40, 45))
        assert score == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral", "olmo2", "olmo3", "gemma2"])
def test_other_families_networks_take_such_caches(name: str, tmp_path: Path) -> None:
    """Sliding windows too."""
    model = load_model(other_models.write_model(tmp_path / name, name, {"head_dim": 64}))
    for bits in BITS:
        found = run(model, ids_of(40), 6, prompt_cache=make_prompt_cache(model, bits))
        assert [token for token, _ in found] == [token for token, _ in eager(model, ids_of(40), 6, bits)]


def test_a_state_is_not_quantized(family_dirs: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="--kv-bits: Mamba keeps a state, which is not quantized, and no keys"):
        make_prompt_cache(load_model(family_dirs["mamba"]), 8)


@pytest.mark.parametrize("bits", BITS)
def test_guesses_are_verified_with_the_bits_of_single_steps(model: Model, bits: int) -> None:
    ids = ids_of(12) * 6
    plain = run(model, ids, 40, prompt_cache=make_prompt_cache(model, bits))
    assert run(model, ids, 40, prompt_cache=make_prompt_cache(model, bits), prompt_lookup=True) == plain
