"""The compiled, cached, run-ahead loop against the plainest one; where it ends; what it leaves in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
import tiny
from mlx.utils import tree_flatten

import elm_mlx
from elm_mlx import generate, stream_generate
from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.generation import Decoder, Response
from elm_mlx.inference.rows import prefill
from elm_mlx.inference.sampling import Sampler, State
from elm_mlx.model.cache import KVCache, make_prompt_cache
from elm_mlx.model.network import Model
from elm_mlx.text.tokenizer import Tokenizer

PROMPT = [1, 50, 7, 31, 9]
VARIANTS: list[dict[str, Any]] = [
    {"num_gqa_groups": groups, "normalize_qk_projections": norm, "ffn_with_glu": glu, "share_input_output_layers": tied}
    for groups, norm, glu, tied in product((1, 2, 4), (True, False), (True, False), (True, False))
]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.random_model(tiny.scaled_config(96, max_context_length=1024), seed=3)


def small_context(context: int) -> Model:
    return tiny.random_model(tiny.scaled_config(96, max_context_length=context), seed=3)


def ids_of(length: int, seed: int = 0, vocab: int = 96) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, length).tolist()


def run(model: Model, prompt: Sequence[int], count: int = 8, **options: Any) -> list[Response]:
    options = {"stop_at_eos": False, "max_tokens": count} | options
    return list(stream_generate(model, None, prompt, **options))


def tokens(responses: Sequence[Response]) -> list[int]:
    return [response.token for response in responses]


def eager(model: Model, prompt: Sequence[int], count: int, **sampling: Any) -> tuple[list[int], list[float]]:
    """Token by token: nothing compiled, nothing ahead, no state but the cache, which `test_model` vouches for."""
    sampler, caches = Sampler(**sampling), make_prompt_cache(model)
    state, ids, logprobs, logits = sampler.start([prompt], 0), [], [], model(mx.array([prompt]), cache=caches)
    for _ in range(count):
        token, logprob, state = sampler(logits[:, -1], state)
        ids.append(int(token[0]))
        logprobs.append(float(logprob[0]))
        logits = model(token[:, None], cache=caches)
    return ids, logprobs


# --- what comes


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_every_token_is_the_references_likeliest(fields: dict[str, Any]) -> None:
    model = tiny.random_model(tiny.scaled_config(96, **fields), seed=1)
    weights = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    responses = run(model, PROMPT, 5)
    truth = reference.logits(model.config, weights, [*PROMPT, *tokens(responses)])[len(PROMPT) - 1 : -1]
    assert tokens(responses) == truth.argmax(axis=-1).tolist()
    chosen = reference.log_softmax(truth).max(axis=-1)
    np.testing.assert_allclose([response.logprob for response in responses], chosen, atol=1e-4)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("length", [1, 2, 250, 255, 256, 257, 508])
def test_where_the_cache_grows_nothing_changes(model: Model, length: int) -> None:
    prompt = ids_of(length, seed=length)
    responses = run(model, prompt, 10)
    expected, logprobs = eager(model, prompt, 10)
    assert tokens(responses) == expected
    np.testing.assert_allclose([response.logprob for response in responses], logprobs, atol=2e-3)


@pytest.mark.usefixtures("branch")
def test_a_long_text_goes_on_where_rooms_are_large() -> None:
    model = tiny.random_model(tiny.scaled_config(96, num_layers=1, max_context_length=8192, rope_max_length=16384))
    for length in (2050, 4100):
        prompt = ids_of(length)
        assert tokens(run(model, prompt, 4)) == eager(model, prompt, 4)[0]


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize(
    "sampling",
    [
        {"temp": 1.0},
        {"temp": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"repetition_penalty": 1.5},
        {"temp": 0.7, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_sampling_as_the_loop_does_is_sampling_by_hand(model: Model, sampling: dict[str, Any]) -> None:
    expected, logprobs = eager(model, PROMPT, 20, **sampling)
    responses = run(model, PROMPT, 20, seed=0, **sampling)
    assert tokens(responses) == expected
    np.testing.assert_allclose([response.logprob for response in responses], logprobs, atol=1e-3)


@pytest.mark.usefixtures("branch")
def test_the_prompt_may_be_read_in_chunks_of_any_size(model: Model) -> None:
    prompt = ids_of(21)
    whole = run(model, prompt)
    for step in range(1, 24):
        chunked = run(model, prompt, prefill_step=step)
        assert tokens(chunked) == tokens(whole)
        np.testing.assert_allclose([r.logprob for r in chunked], [r.logprob for r in whole], atol=1e-3)


def test_a_seed_reproduces_a_run(model: Model) -> None:
    first = tokens(run(model, PROMPT, 30, temp=1.0, seed=11))
    assert tokens(run(model, PROMPT, 30, temp=1.0, seed=11)) == first
    assert tokens(run(model, PROMPT, 30, temp=1.0, seed=12)) != first
    assert tokens(run(model, PROMPT, 30, temp=1.0)) != first


def test_greedy_needs_no_seed_and_ignores_one(model: Model) -> None:
    assert tokens(run(model, PROMPT, seed=1)) == tokens(run(model, PROMPT, seed=2)) == tokens(run(model, PROMPT))


def test_two_streams_of_one_model_do_not_meet(model: Model) -> None:
    prompts = [ids_of(9, 1), ids_of(4, 2)]
    alone = [tokens(run(model, prompt, 12)) for prompt in prompts]
    streams = [stream_generate(model, None, prompt, max_tokens=12, stop_at_eos=False) for prompt in prompts]
    assert [[a.token, b.token] for a, b in zip(*streams, strict=True)] == [
        list(pair) for pair in zip(*alone, strict=True)
    ]


# --- prompts


def test_text_gets_bos_and_ids_are_taken_as_they_are(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size))
    ids = tiny_tokenizer.encode("the quick brown fox")
    assert ids[0] == model.config.bos_token_id
    by_text = list(stream_generate(model, tiny_tokenizer, "the quick brown fox", max_tokens=6))
    by_ids = list(stream_generate(model, tiny_tokenizer, ids, max_tokens=6))
    assert [(r.token, r.text) for r in by_text] == [(r.token, r.text) for r in by_ids]
    assert by_text[0].prompt_tokens == len(ids)
    without_bos = list(stream_generate(model, tiny_tokenizer, ids[1:], max_tokens=6))
    assert without_bos[0].prompt_tokens == len(ids) - 1
    assert tokens(without_bos) != tokens(by_text)


def test_ids_may_be_arrays(model: Model) -> None:
    assert tokens(run(model, mx.array(PROMPT))) == tokens(run(model, np.array(PROMPT))) == tokens(run(model, PROMPT))  # type: ignore[arg-type]


def test_an_empty_text_is_bos_alone(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size))
    assert next(stream_generate(model, tiny_tokenizer, "", max_tokens=2)).prompt_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 96], {}, "token id 96 is outside the vocabulary of 96"),
        ([-1], {}, "token id -1 is outside the vocabulary of 96"),
        ([10**30], {}, "is outside the vocabulary"),
        ("text", {}, "a text needs a tokenizer"),
        ([1] * 1024, {}, "the prompt has 1024 tokens, and the model's context is 1024"),
        ([1] * 5000, {}, "the prompt has 5000 tokens, and the model's context is 1024"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1], {"max_tokens": -5}, "max_tokens is -5"),
        ([1], {"prefill_step": 0}, "prefill_step is 0"),
        ([1], {"stop": ["x"]}, "stop strings need a tokenizer"),
        ([1], {"temp": math.nan}, "temp is nan"),
        ([1], {"temp": 1.0, "seed": -1}, "seed is -1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused_before_the_first_token(
    model: Model, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        stream_generate(model, None, prompt, **options)  # not even asked for a token
    assert "\n" not in str(caught.value)


def test_a_prompt_that_no_longer_fits_says_what_is_taken(model: Model) -> None:
    caches = make_prompt_cache(model)
    run(model, ids_of(1000), 1, prompt_cache=caches)
    with pytest.raises(
        InputError, match=r"the prompt has 24 tokens after 1000 already in the cache, .* context is 1024"
    ):
        run(model, ids_of(24), 1, prompt_cache=caches)


# --- the end


def test_it_counts(model: Model) -> None:
    responses = run(model, PROMPT, 7)
    assert [response.generation_tokens for response in responses] == list(range(1, 8))
    assert {response.prompt_tokens for response in responses} == {5}
    assert [response.finish_reason for response in responses] == [None] * 6 + ["length"]
    last = responses[-1]
    assert last.peak_memory > 10**6
    assert last.prompt_tps > 0 and last.generation_tps > 0
    assert 0 < last.time_to_first_token < 60
    assert {response.time_to_first_token for response in responses} == {last.time_to_first_token}
    assert {response.text for response in responses} == {""}


def test_one_token_is_enough(model: Model) -> None:
    (only,) = run(model, PROMPT, 1)
    assert (only.finish_reason, only.generation_tokens) == ("length", 1)
    assert only.token == run(model, PROMPT, 2)[0].token


@pytest.mark.parametrize("context", [2, 6, 8, 256, 257, 300])
def test_the_context_is_filled_and_not_exceeded(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_context(context)
    prompt = PROMPT[: context - 1]
    caches = make_prompt_cache(model)
    responses = run(model, prompt, 10_000, prompt_cache=caches)
    assert len(prompt) + len(responses) == context
    assert [r.finish_reason for r in responses[-2:]][-1] == "context"
    assert caches[0].offset < context
    assert tokens(responses) == eager(model, prompt, context - len(prompt))[0]


def test_as_much_as_fits_is_a_matter_of_length(model: Model) -> None:
    small = small_context(16)
    assert run(small, PROMPT, 11)[-1].finish_reason == "length"
    assert run(small, PROMPT, 12)[-1].finish_reason == "context"
    assert len(run(small, PROMPT, 12)) == 11


def test_eos_ends_it_and_is_not_shown(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "the fox")
    responses = list(stream_generate(model, tiny_tokenizer, "\n", max_tokens=50))
    assert responses[-1].token == tiny_tokenizer.eos_id
    assert responses[-1].finish_reason == "stop"
    assert "".join(response.text for response in responses) == "the fox"
    assert generate(model, tiny_tokenizer, "\n") == "the fox"


def test_any_eos_of_the_config_ends_it(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.random_model(tiny.scaled_config(96), seed=3)
    free = tokens(run(model, PROMPT, 12))
    wanted = free[6]
    model = tiny.random_model(tiny.scaled_config(96, eos_token_id=(95, wanted)), seed=3)
    ended = run(model, PROMPT, 12, stop_at_eos=True)
    assert tokens(ended) == free[: free.index(wanted) + 1]
    assert ended[-1].finish_reason == "stop"


def test_other_ids_may_end_it_too(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.random_model(tiny.scaled_config(96), seed=3)
    free = tokens(run(model, PROMPT, 12))
    wanted = free[6]
    for at_eos in (False, True):
        ended = run(model, PROMPT, 12, stop_ids=(95, wanted), stop_at_eos=at_eos)
        assert tokens(ended) == free[: free.index(wanted) + 1] and ended[-1].finish_reason == "stop"


def test_eos_may_be_ignored_for_measurements(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "the fox")
    responses = list(stream_generate(model, tiny_tokenizer, "\n", max_tokens=50, stop_at_eos=False))
    assert len(responses) == 50 and responses[-1].finish_reason == "length"


def test_eos_as_the_last_token_allowed_is_still_a_stop(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "the fox")
    count = len(list(stream_generate(model, tiny_tokenizer, "\n")))
    for limit, reason in ((count, "stop"), (count - 1, "length"), (count + 1, "stop")):
        responses = list(stream_generate(model, tiny_tokenizer, "\n", max_tokens=limit))
        assert responses[-1].finish_reason == reason
        assert "".join(response.text for response in responses) == "the fox"


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (["foxs"], "thequickbrown"),
        (["ckbr"], "thequi"),
        (["brown foxes jump", "k"], "thequic"),
        (["thequick"], ""),
        (["foxs", "quick"], "the"),
        (["nfoxjumps", "foxs.", "xs漢"], "thequickbrownfo"),
    ],
)
def test_stop_strings_end_it_and_are_not_shown(tiny_tokenizer: Tokenizer, stop: list[str], shown: str) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "thequickbrownfoxs漢😀")
    responses = list(stream_generate(model, tiny_tokenizer, "\n", stop=stop))
    assert "".join(response.text for response in responses) == shown
    assert responses[-1].finish_reason == "stop"
    assert all(response.finish_reason is None for response in responses[:-1])


def test_what_a_stop_string_held_back_is_shown_when_the_tokens_end(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "the quick")
    count = len(list(stream_generate(model, tiny_tokenizer, "\n"))) - 1
    for limit, reason in ((count, "length"), (count + 1, "stop")):
        responses = list(stream_generate(model, tiny_tokenizer, "\n", stop=["quick fox"], max_tokens=limit))
        assert responses[-1].finish_reason == reason
        assert responses[-1].text.endswith("quick") and responses[-2].text == ""
    assert "".join(response.text for response in responses) == "the quick"


@pytest.mark.parametrize("text", ["a漢b", "é漢😀!", "😀漢字", "naïve 漢字"])
def test_no_character_is_ever_broken(tiny_tokenizer: Tokenizer, text: str) -> None:
    model = tiny.spelling_model(tiny_tokenizer, text)
    pieces = [response.text for response in stream_generate(model, tiny_tokenizer, "\n")]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert ("😀" not in text) or "" in pieces[:-1]  # there were bytes to wait for


def test_a_character_cut_off_by_the_length_shows_as_such(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "x😀")
    count = len(list(stream_generate(model, tiny_tokenizer, "\n")))
    responses = list(stream_generate(model, tiny_tokenizer, "\n", max_tokens=count - 2))
    assert "".join(response.text for response in responses) == "x\ufffd\ufffd\ufffd"


def test_pieces_join_to_what_decode_says(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size), seed=5)
    for seed in range(4):
        responses = list(
            stream_generate(model, tiny_tokenizer, "the", max_tokens=60, temp=2.0, seed=seed, stop_at_eos=False)
        )
        ids = tiny_tokenizer.encode("the")
        whole = tiny_tokenizer.decode(ids + tokens(responses))
        assert "the" + "".join(response.text for response in responses) == whole


# --- what is left in the cache


def assert_holds(caches: list[KVCache], model: Model, ids: list[int]) -> None:
    """The caches are as if the first `offset` of `ids` had been read."""
    (offset,) = {cache.offset for cache in caches}
    assert 0 < offset <= len(ids)
    fresh = make_prompt_cache(model)
    model(mx.array([ids[:offset]]), cache=fresh)
    for cache, expected in zip(caches, fresh, strict=True):
        for held, truth in zip(cache.state, expected.state, strict=True):
            assert held is not None and truth is not None
            np.testing.assert_allclose(held[:, :, :offset], truth[:, :, :offset], atol=2e-3)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("length", [3, 252])
@pytest.mark.parametrize("taken", [1, 2, 3, 7, 8])
def test_a_stream_that_is_abandoned_leaves_what_it_said(model: Model, length: int, taken: int) -> None:
    prompt = ids_of(length)
    caches = make_prompt_cache(model)
    stream = stream_generate(model, None, prompt, max_tokens=8, stop_at_eos=False, prompt_cache=caches)
    said = [next(stream).token for _ in range(taken)]
    assert len(prompt) + taken - 1 <= caches[0].offset <= len(prompt) + taken
    assert_holds(caches, model, prompt + said)
    stream.close()  # type: ignore[attr-defined]
    assert_holds(caches, model, prompt + said)


@pytest.mark.parametrize("reason", ["length", "context", "stop"])
def test_a_stream_that_ended_leaves_what_it_said(reason: str) -> None:
    model = small_context(24 if reason == "context" else 512)
    free = tokens(run(model, PROMPT, 9))
    if reason == "stop":
        model = tiny.random_model(tiny.scaled_config(96, eos_token_id=free[5]), seed=3)
    caches = make_prompt_cache(model)
    limit = 100 if reason == "context" else 9
    responses = run(model, PROMPT, limit, prompt_cache=caches, stop_at_eos=True)
    assert responses[-1].finish_reason == reason
    assert caches[0].offset >= len(PROMPT) + len(responses) - 1
    assert_holds(caches, model, PROMPT + tokens(responses))


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("taken", [1, 4, 9])
def test_an_answer_can_be_continued(model: Model, taken: int) -> None:
    """The rest of what was said, then more: the same as reading it all at once."""
    caches = make_prompt_cache(model)
    stream = stream_generate(model, None, PROMPT, max_tokens=9, stop_at_eos=False, prompt_cache=caches)
    history = PROMPT + [next(stream).token for _ in range(taken)]
    more = ids_of(6, seed=8)
    unread = history[caches[0].offset :]
    continued = run(model, unread + more, 10, prompt_cache=caches)
    assert tokens(continued) == tokens(run(model, history + more, 10))


def test_a_continued_text_gets_no_second_bos(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size))
    caches = make_prompt_cache(model)
    first = list(stream_generate(model, tiny_tokenizer, "the", max_tokens=1, prompt_cache=caches))
    second = next(stream_generate(model, tiny_tokenizer, "fox", max_tokens=1, prompt_cache=caches))
    assert first[0].prompt_tokens == len(tiny_tokenizer.encode("the"))
    assert second.prompt_tokens == len(tiny_tokenizer.encode("fox", add_bos=False))


def test_a_cache_rolled_back_answers_as_before(model: Model) -> None:
    """What /retry and /undo need."""
    caches = make_prompt_cache(model)
    first = tokens(run(model, ids_of(250), 20, prompt_cache=caches))
    for cache in caches:
        cache.trim(cache.offset - 249)
    again = tokens(run(model, ids_of(250)[249:], 20, prompt_cache=caches))
    assert again == first


def test_an_error_leaves_the_cache_alone(model: Model) -> None:
    caches = make_prompt_cache(model)
    run(model, PROMPT, 1, prompt_cache=caches)
    with pytest.raises(InputError):
        run(model, [96], 1, prompt_cache=caches)
    assert {cache.offset for cache in caches} == {5}


def test_nothing_is_computed_before_the_first_is_asked_for(model: Model) -> None:
    caches = make_prompt_cache(model)
    stream: Iterator[Response] = stream_generate(model, None, PROMPT, prompt_cache=caches)
    assert caches[0].offset == 0
    next(stream)
    assert caches[0].offset >= 5


def test_a_step_writes_in_place(model: Model) -> None:
    caches = make_prompt_cache(model)
    stream = stream_generate(model, None, ids_of(5), max_tokens=40, prompt_cache=caches, stop_at_eos=False)

    def addresses() -> list[int]:
        mx.eval([cache.state for cache in caches])
        arrays = [array for cache in caches for array in cache.state]
        return [np.array(array, copy=False).__array_interface__["data"][0] for array in arrays]

    for _ in range(4):
        next(stream)
    before = addresses()
    for _ in range(30):
        next(stream)
    assert addresses() == before


def test_a_model_of_damaged_weights_ends_in_an_error_and_not_in_nonsense() -> None:
    model = Model(tiny.scaled_config(96))
    model.transformer.norm.weight = mx.full(model.transformer.norm.weight.shape, mx.nan)
    with pytest.raises(ElmError, match=r"the model computes NaN.*--compute-dtype float32"):
        list(stream_generate(model, None, [1, 2, 3], max_tokens=5))


def test_ctrl_c_amid_a_step_leaves_the_caches_whole(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = make_prompt_cache(model)
    sampler = Sampler()
    tokens, _, state = sampler(prefill(model, ids_of(5), caches), State())
    decoder = Decoder(model, sampler, caches, tokens, state)
    decoder.advance()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder.rows, "_compiled", interrupted)
        patch.setattr(Model, "head", interrupted)  # of a step that is one call
        with pytest.raises(KeyboardInterrupt):
            decoder.advance()
    assert [cache.offset for cache in caches] == [6] * len(caches)
    expected, _ = eager(model, ids_of(5), 3)
    assert decoder.advance()[0].item() == expected[2]


def test_a_sampler_of_ones_own_chooses_each_token(model: Model) -> None:
    rows: list[mx.array] = []

    def least(logprobs: mx.array) -> mx.array:
        rows.append(logprobs)
        return mx.argmin(logprobs, axis=-1)

    responses = run(model, PROMPT, 5, sampler=least)
    expected, ids = [], list(PROMPT)
    for response in responses:
        logits = model(mx.array([ids]))[0, -1].astype(mx.float32)
        expected.append(int(mx.argmin(logits).item()))
        assert response.logprob == pytest.approx((logits - mx.logsumexp(logits))[response.token].item(), abs=1e-4)
        ids.append(response.token)
    assert tokens(responses) == expected and rows[0].shape == (1, 96)
    assert mx.exp(rows[0]).sum().item() == pytest.approx(1, abs=1e-4)


def test_processors_come_one_after_the_other_and_before_the_settings(model: Model) -> None:
    def only(*wanted: int) -> Any:
        return lambda so_far, logits: mx.where(mx.array([i in wanted for i in range(96)]), logits, -mx.inf)

    assert {*tokens(run(model, PROMPT, 8, logits_processors=[only(5, 6, 7), only(6, 7, 8)], temp=5, seed=1))} <= {6, 7}
    assert {*tokens(run(model, PROMPT, 8, logits_processors=[only(9)], repetition_penalty=2.0))} == {9}


def test_what_contradicts_a_sampler_is_refused(model: Model) -> None:
    for options in ({"temp": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.5}, {"seed": 1}):
        with pytest.raises(InputError, match="sampler"):
            run(model, PROMPT, sampler=mx.argmax, **options)


def test_a_misspelt_option_is_a_type_error(model: Model, tiny_tokenizer: Tokenizer) -> None:
    for call in (generate, stream_generate, elm_mlx.generate_batch):
        with pytest.raises(TypeError, match="max_token"):
            call(model, tiny_tokenizer, [PROMPT], max_token=5)  # type: ignore[operator]
