"""An answer of a rollout is drawn from the model's own distribution, by its seed and numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import family_cases
import mlx.core as mx
import numpy as np
import pytest
import tiny

from elm_mlx import load_model
from elm_mlx.data.encoding import Encoder
from elm_mlx.data.records import PromptAnswer
from elm_mlx.errors import InputError
from elm_mlx.inference import rollouts as module
from elm_mlx.inference.generation import prefill
from elm_mlx.inference.rollouts import Rollout, prompt_ids, rollouts
from elm_mlx.model.network import Model
from elm_mlx.text.chat_template import OpenELMInstruct
from elm_mlx.text.tokenizer import Tokenizer

PROMPTS = [[1, 40], [1, *range(50, 90)], [1, 7, 8, 9], [1, 60, 61], [1, 5], [1, 90, 91, 92, 93], [1, 99]]


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Model:
    """Whose texts end at many lengths."""
    config = tiny.scaled_config(tiny_tokenizer.vocab_size, eos_token_id=tuple(range(2, 20)))
    return tiny.random_model(config, seed=2)


def sampled(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], samples: int, **options: Any
) -> dict[tuple[int, int], Rollout]:
    found = list(rollouts(model, tokenizer, prompts, samples, **{"max_tokens": 40, "seed": 3} | options))
    assert len(found) == len(prompts) * samples
    by_number = {(each.problem, each.sample): each for each in found}
    assert by_number.keys() == {(p, s) for p in range(len(prompts)) for s in range(samples)}
    return by_number


def assert_same(found: Rollout, expected: Rollout, exactly: bool) -> None:
    assert (found.tokens, found.text, found.finish_reason) == (expected.tokens, expected.text, expected.finish_reason)
    if exactly:
        assert found.logprobs == expected.logprobs
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-3)


@pytest.mark.parametrize(("count", "samples"), [(1, 20), (7, 5), (3, 1), (2, 16)])
def test_an_answer_depends_on_its_numbers_alone(
    model: Model, tiny_tokenizer: Tokenizer, branch: bool, count: int, samples: int
) -> None:
    together = sampled(model, tiny_tokenizer, PROMPTS[:count], samples)
    for problem in range(count):
        options: dict[str, Any] = {"numbers": [problem], "most_rows": 1}
        for (_, sample), expected in sampled(model, tiny_tokenizer, [PROMPTS[problem]], samples, **options).items():
            assert_same(together[problem, sample], expected, exactly=not branch)
    assert len({each.tokens for each in together.values()}) > 0.8 * len(together)
    if len(together) > 16:
        assert {each.finish_reason for each in together.values()} == {"stop", "length"}


def test_no_prompts_have_no_answers(model: Model, tiny_tokenizer: Tokenizer) -> None:
    assert sampled(model, tiny_tokenizer, [], 3) == {}


def test_more_samples_begin_with_the_same_ones(model: Model, tiny_tokenizer: Tokenizer) -> None:
    few, many = (sampled(model, tiny_tokenizer, PROMPTS, samples) for samples in (2, 4))
    assert few == {numbers: each for numbers, each in many.items() if numbers[1] < 2}
    assert few != sampled(model, tiny_tokenizer, PROMPTS, 2, seed=4)


@pytest.mark.parametrize("temp", [1.0, 0.5])
@pytest.mark.usefixtures("branch")
def test_log_probabilities_are_those_of_a_forward_pass(model: Model, tiny_tokenizer: Tokenizer, temp: float) -> None:
    for (problem, _), answer in sampled(model, tiny_tokenizer, PROMPTS, 3, temp=temp).items():
        prompt = PROMPTS[problem]
        logits = np.array(model(mx.array([[*prompt, *answer.tokens]])), np.float64)[0, len(prompt) - 1 : -1] / temp
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = logprobs[np.arange(len(answer.tokens)), answer.tokens]
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)


def test_tokens_come_as_often_as_they_are_likely(model: Model, tiny_tokenizer: Tokenizer) -> None:
    count = 4000
    answers = sampled(model, tiny_tokenizer, [PROMPTS[0]], count, max_tokens=2).values()
    probabilities = np.array(mx.softmax(model(mx.array([PROMPTS[0]]))[0, -1]))
    for place, expected in enumerate((probabilities, None)):
        drawn = Counter(each.tokens[place] for each in answers if len(each.tokens) > place)
        if expected is None:  # the second token, after the likeliest first one
            first = int(np.argmax(probabilities))
            expected = np.array(mx.softmax(model(mx.array([[*PROMPTS[0], first]]))[0, -1]))
            drawn = Counter(each.tokens[1] for each in answers if len(each.tokens) > 1 and each.tokens[0] == first)
        total = sum(drawn.values())
        assert total > 100
        for token in np.argsort(-expected)[:8]:
            deviation = np.sqrt(expected[token] * (1 - expected[token]) / total)
            assert abs(drawn[int(token)] / total - expected[token]) < 4.5 * deviation


def test_a_prompt_is_read_once(model: Model, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[list[int]]()
    monkeypatch.setattr(module, "prefill", lambda model, ids, *rest: read.append(ids) or prefill(model, ids, *rest))
    sampled(model, tiny_tokenizer, PROMPTS, 9, most_rows=4)
    assert read == PROMPTS


@pytest.mark.parametrize("name", ["phi3, longrope, partial, tied", "mamba", "gemma3"])
def test_other_families(tmp_path: Path, tiny_tokenizer: Tokenizer, name: str) -> None:
    """Texts that cross the length where RoPE changes, states in place of keys, windows."""
    model = load_model(family_cases.write(tmp_path / "model", name))
    least = min(model.config.vocab_size, tiny_tokenizer.vocab_size)
    prompts = [[5, 6, 7], list(range(10, 60)), [9]]
    together = sampled(model, tiny_tokenizer, prompts, 6, max_tokens=30, most_rows=4)
    assert all(token < least for each in together.values() for token in each.tokens)
    for problem, prompt in enumerate(prompts):
        alone = sampled(model, tiny_tokenizer, [prompt], 6, max_tokens=30, most_rows=1, numbers=[problem])
        for (_, sample), expected in alone.items():
            assert_same(together[problem, sample], expected, exactly=False)


def test_an_answer_ends_where_it_says(tiny_tokenizer: Tokenizer) -> None:
    spelling = tiny.spelling_model(tiny_tokenizer, "thequickbrownfoxs", context=12)
    answers = sampled(
        spelling, tiny_tokenizer, [tiny_tokenizer.encode("\n"), tiny_tokenizer.encode("fox")], 2, temp=0.01
    )
    first, second = answers[0, 0], answers[1, 1]
    assert (first.text, first.finish_reason) == ("thequickbrow", "context")
    assert (second.text, second.finish_reason) == ("s", "stop")
    assert second.tokens[-1] == tiny_tokenizer.eos_ids[0]


@pytest.mark.parametrize("templated", [False, True])
def test_a_prompt_has_the_ids_that_fine_tuning_sees(tiny_tokenizer: Tokenizer, templated: bool) -> None:
    template = OpenELMInstruct(tiny_tokenizer) if templated else None
    example = Encoder(tiny_tokenizer, template).encode(PromptAnswer("", "the quick fox 12 + 7 =", " 19"))
    assert prompt_ids(tiny_tokenizer, template, "the quick fox 12 + 7 =") == [
        *example.ids[: example.trained.index(True)]
    ]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "the prompt is empty"),
        ([[1], [1, 320]], {}, "token id 320"),
        ([[1] * 600], {}, "600 tokens, .* context is 512"),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[1]], {"samples": 0}, "samples is 0"),
        ([[1]], {"most_rows": 0}, "most_rows is 0"),
        ([[1]], {"temp": 0.0}, "temp is 0.0: answers are drawn"),
        ([[1]], {"temp": float("nan")}, "temp is nan"),
        ([[1]], {"seed": -1}, "seed is -1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_once(
    model: Model, tiny_tokenizer: Tokenizer, prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"samples": 2, "max_tokens": 5, "seed": 0} | options
    with pytest.raises(InputError, match=message):
        rollouts(model, tiny_tokenizer, prompts, settings.pop("samples"), **settings)
