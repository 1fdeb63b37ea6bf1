"""A batch says what each prompt alone would have been told, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny

from elm_mlx import stream_generate
from elm_mlx.errors import InputError
from elm_mlx.inference import batch
from elm_mlx.inference.batch import BATCH_SIZE, Completion, generate_batch
from elm_mlx.inference.generation import prefill
from elm_mlx.model.network import Model
from elm_mlx.text.tokenizer import Tokenizer

TEXTS = ["the", "quick brown fox jumps over lazy dogs while", "", "an old king told stories of 漢字 to us. " * 4, "x"]


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Model:
    return tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size), seed=2)


def alone(model: Model, tokenizer: Tokenizer, prompt: str | list[int], **options: Any) -> Completion:
    responses = list(stream_generate(model, tokenizer, prompt, **options))
    return Completion(
        prompt_tokens=responses[0].prompt_tokens,
        text="".join(response.text for response in responses),
        tokens=[response.token for response in responses],
        logprobs=[response.logprob for response in responses],
        finish_reason=responses[-1].finish_reason,
    )


def assert_as_alone(
    model: Model, tokenizer: Tokenizer, prompts: list[Any], batch_size: int = 8, **options: Any
) -> None:
    together = list(generate_batch(model, tokenizer, prompts, batch_size=batch_size, **options))
    assert len(together) == len(prompts)
    for prompt, completion in zip(prompts, together, strict=True):
        expected = alone(model, tokenizer, prompt, **options)
        np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=2e-3)
        completion.logprobs = expected.logprobs
        assert completion == expected


@pytest.mark.usefixtures("branch")
def test_prompts_of_different_length(model: Model, tiny_tokenizer: Tokenizer) -> None:
    assert_as_alone(model, tiny_tokenizer, TEXTS, max_tokens=24)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_more_prompts_than_fit_one_batch(model: Model, tiny_tokenizer: Tokenizer, batch_size: int) -> None:
    assert_as_alone(model, tiny_tokenizer, TEXTS, batch_size, max_tokens=6)


def test_the_batch_has_a_size_by_itself(model: Model, tiny_tokenizer: Tokenizer) -> None:
    prompts = [[1, 5 + i] for i in range(2 * BATCH_SIZE + 1)]
    assert_as_alone(model, tiny_tokenizer, prompts, max_tokens=3)


def test_one_prompt_and_none(model: Model, tiny_tokenizer: Tokenizer) -> None:
    assert_as_alone(model, tiny_tokenizer, TEXTS[:1], max_tokens=10)
    assert list(generate_batch(model, tiny_tokenizer, [])) == []


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_hardly_any_tokens(model: Model, tiny_tokenizer: Tokenizer, max_tokens: int) -> None:
    assert_as_alone(model, tiny_tokenizer, TEXTS, max_tokens=max_tokens)


def test_the_cache_grows_under_a_batch(model: Model, tiny_tokenizer: Tokenizer) -> None:
    assert_as_alone(model, tiny_tokenizer, [[1, *[9] * 253], [1, 7, 8], [1, *[9] * 240]], max_tokens=12)


@pytest.mark.usefixtures("branch")
def test_rows_that_meet_eos_leave(tiny_tokenizer: Tokenizer) -> None:
    """Random text ends at different lengths when many tokens are EOS."""
    config = tiny.scaled_config(tiny_tokenizer.vocab_size, eos_token_id=tuple(range(2, 40)))
    model = tiny.random_model(config, seed=2)
    prompts = [[1, 40 + i] for i in range(8)]
    done = list(generate_batch(model, tiny_tokenizer, prompts, max_tokens=30))
    assert len({len(completion.tokens) for completion in done}) > 2
    assert "stop" in {completion.finish_reason for completion in done}
    assert_as_alone(model, tiny_tokenizer, prompts, max_tokens=30)


def test_rows_that_meet_a_stop_string_leave(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "thequickbrownfoxs漢😀")
    prompts = ["\n", "the quick", "a c", "a", "fo"]
    done = list(generate_batch(model, tiny_tokenizer, prompts, stop=["kbr", "foxs"]))
    assert done[0].text == "thequic"
    assert len({len(completion.tokens) for completion in done}) > 1
    assert {completion.finish_reason for completion in done} == {"stop"}
    assert_as_alone(model, tiny_tokenizer, prompts, stop=["kbr", "foxs"])


@pytest.mark.usefixtures("branch")
def test_every_row_fills_its_own_context(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size, max_context_length=40), seed=2)
    prompts = [[1, *[9] * count] for count in (38, 1, 20, 0, 30)]
    done = list(generate_batch(model, tiny_tokenizer, prompts, max_tokens=1000))
    for prompt, completion in zip(prompts, done, strict=True):
        if completion.finish_reason == "context":
            assert len(prompt) + len(completion.tokens) == 40
    assert "context" in {completion.finish_reason for completion in done}
    assert_as_alone(model, tiny_tokenizer, prompts, max_tokens=1000)
    assert_as_alone(model, tiny_tokenizer, prompts, max_tokens=15)


def test_the_prompts_may_be_read_in_chunks(model: Model, tiny_tokenizer: Tokenizer) -> None:
    for step in (1, 3, 7):
        assert_as_alone(model, tiny_tokenizer, TEXTS, max_tokens=5, prefill_step=step)


def test_a_repetition_penalty_looks_at_its_own_row(model: Model, tiny_tokenizer: Tokenizer) -> None:
    assert_as_alone(model, tiny_tokenizer, TEXTS, max_tokens=20, repetition_penalty=1.3)


def test_a_sampler_of_ones_own_chooses_for_every_row(model: Model, tiny_tokenizer: Tokenizer) -> None:
    def second(logprobs: mx.array) -> mx.array:
        return mx.argsort(logprobs, axis=-1)[:, -2]

    assert_as_alone(model, tiny_tokenizer, TEXTS, 3, max_tokens=6, sampler=second, repetition_penalty=1.2)
    for options, reason in (({"seed": 1}, "seed has no effect"), ({"temp": 0.5}, "give a sampler, or temp")):
        with pytest.raises(InputError, match=reason):
            next(generate_batch(model, tiny_tokenizer, ["a"], sampler=second, **options))  # type: ignore[arg-type]


def test_a_seed_reproduces_a_batch(model: Model, tiny_tokenizer: Tokenizer) -> None:
    def run(seed: int) -> list[list[int]]:
        return [done.tokens for done in generate_batch(model, tiny_tokenizer, ["the"] * 4, temp=1.0, seed=seed)]

    first = run(5)
    assert run(5) == first != run(6)
    assert len({tuple(row) for row in first}) == 4  # rows are drawn independently


def test_one_prompt_many_times_is_drawn_anew_in_every_group(model: Model, tiny_tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"temp": 1.0, "seed": 5, "max_tokens": 20, "batch_size": 3}
    drawn = [done.tokens for done in generate_batch(model, tiny_tokenizer, ["the"] * 9, **options)]
    assert len(set(map(tuple, drawn))) == 9
    assert [done.tokens for done in generate_batch(model, tiny_tokenizer, ["the"] * 9, **options)] == drawn
    assert [done.tokens for done in generate_batch(model, tiny_tokenizer, ["the"] * 3, **options)] == drawn[:3]


def test_one_prompt_many_times_is_read_once_in_a_group(
    model: Model, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, read = ["the", "a fox", "the", "the", "a fox", "the"], list[list[int]]()
    monkeypatch.setattr(batch, "prefill", lambda model, ids, *rest: read.append(ids) or prefill(model, ids, *rest))
    together = [done.tokens for done in generate_batch(model, tiny_tokenizer, prompts, max_tokens=9, batch_size=4)]
    assert read == [tiny_tokenizer.encode(text) for text in ("the", "a fox", "a fox", "the")]
    assert together == [alone(model, tiny_tokenizer, prompt, max_tokens=9).tokens for prompt in prompts]


def test_characters_are_whole(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "x漢😀")
    done = list(generate_batch(model, tiny_tokenizer, ["\n", "\n"], max_tokens=3))
    assert [completion.text for completion in done] == [alone(model, tiny_tokenizer, "\n", max_tokens=3).text] * 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["the", []], {}, "the prompt is empty"),
        ([[1], [1, 320]], {}, "token id 320"),
        ([[1], [1] * 600], {}, "600 tokens, .* context is 512"),
        (["the"], {"max_tokens": 0}, "max_tokens is 0"),
        (["the"], {"prefill_step": -1}, "prefill_step is -1"),
        (["the"], {"batch_size": 0}, "batch_size is 0"),
        (["the"], {"temp": -1.0}, "temp is -1"),
        (["the"], {"stop": [""]}, "a stop string is empty"),
        (["the"], {"seed": -1, "temp": 1.0}, "seed is -1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_computed(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, prompts: Any, options: dict[str, Any], message: str
) -> None:
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size))
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(InputError, match=message):
        list(generate_batch(model, tiny_tokenizer, prompts, **options))
