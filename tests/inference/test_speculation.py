"""Whatever is guessed, the text is the one without guesses; and how many guesses are worth a pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import other_models
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_mlx import blas, device, stream_generate
from elm_mlx.errors import InputError
from elm_mlx.inference.conversation import Chat
from elm_mlx.inference.drafts import ModelDrafts, PromptLookup
from elm_mlx.inference.generation import Response, decode, prefill
from elm_mlx.inference.sampling import Sampler, State
from elm_mlx.inference.speculation import MOST_DRAFTED, DraftFigures, DraftPace, Speculation, speculation_for
from elm_mlx.model import lora_layers
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.network import Model
from elm_mlx.store.loading import load_model
from elm_mlx.text.tokenizer import Tokenizer

VOCAB = 96
PROMPT = [1, 50, 7, 31, 9, 50, 7]
SAMPLERS = {
    "greedy": Sampler(),
    "drawn": Sampler(temp=1.0),
    "filtered": Sampler(temp=0.9, top_p=0.9, top_k=20, min_p=0.01),
    "penalties": Sampler(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    "drawn, penalties": Sampler(temp=0.8, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias={5: 2.0, 9: -9.0}),
}


class Script:
    """Guesses what it is told to, of a text whose continuation it knows: each guess right, wrong, or missing."""

    def __init__(self, truth: Sequence[int], seed: int, rightness: float = 0.7) -> None:
        self._truth, self._random, self._rightness = list(truth), random.Random(seed), rightness
        self.asked: list[int] = []

    def begin(self, text: Sequence[int]) -> None:
        self._said = 0

    def add(self, token: int) -> None:
        assert token == self._truth[self._said]
        self._said += 1

    def offers(self, most: int) -> list[float]:
        return [0.5] * most

    def draft(self, count: int, sampler: Sampler, state: State) -> mx.array:
        self.asked.append(count)
        right = (*self._truth[self._said :], *[0] * count)
        drawn = [token if self._random.random() < self._rightness else (token + 1) % VOCAB for token in right[:count]]
        return mx.array(drawn)


class Whim(DraftPace):
    """Verifies as many guesses as it feels like."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def choose(self, likely: Sequence[float]) -> int:
        return self._random.randint(0, len(likely))


def whimsical(source: Any, seed: int = 0, most: int = MOST_DRAFTED) -> Speculation:
    made = Speculation(source, most)
    made._pace = Whim(seed)
    return made


def run(
    model: Model,
    prompt: Sequence[int],
    sampler: Sampler,
    count: int,
    made: Speculation | None = None,
    **kind: int | None,
) -> list[tuple[int, float]]:
    caches = make_prompt_cache(model, **kind)
    logits = prefill(model, prompt, caches)
    return [*decode(model, caches, sampler, logits, sampler.start([prompt], 5), count, prompt, made, prompt)]


def assert_same(found: list[tuple[int, float]], expected: list[tuple[int, float]], bits: bool = True) -> None:
    assert [token for token, _ in found] == [token for token, _ in expected]
    if bits and blas.status().name.endswith(blas.OWN_FEW_ROWS):
        assert found == expected
    np.testing.assert_allclose([each for _, each in found], [each for _, each in expected], atol=2e-3)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.random_model(tiny.scaled_config(VOCAB, max_context_length=1024), seed=3)


@pytest.fixture(scope="module")
def small() -> Model:
    return tiny.random_model(tiny.scaled_config(VOCAB, num_layers=1), seed=4)


# --- the same text


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_text_is_the_one_without_guesses_whatever_is_guessed(model: Model, branch: bool, name: str) -> None:
    sampler = SAMPLERS[name]
    expected = run(model, PROMPT, sampler, 60)
    for seed, rightness in enumerate((0.0, 0.5, 0.9, 1.0)):
        made = whimsical(Script([token for token, _ in expected], seed, rightness), seed)
        assert_same(run(model, PROMPT, sampler, 60, made), expected, bits=not branch)
        assert (made.figures.accepted > 0) == (rightness > 0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 12}),
        ("olmo", {}),
        ("olmo3", {}),
        ("gemma2", {"sliding_window": 16}),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [3.0] * 4, "short_factor": [1.5] * 4}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("branch")
def test_it_is_of_other_families_past_windows_and_where_rope_changes(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = load_model(other_models.write_model(tmp_path / family, family, changes))
    prompt = np.random.default_rng(1).integers(300, 390, 40).tolist()
    for sampler in (SAMPLERS["greedy"], SAMPLERS["drawn, penalties"]):
        expected = run(model, prompt, sampler, 50)  # across 64, where Phi-3's switches
        for seed in range(3):
            made = whimsical(Script([token for token, _ in expected], seed, 0.8), seed)
            assert_same(run(model, prompt, sampler, 50, made), expected, bits=not device.on_gpu())


def _fits(part: nn.Module) -> bool:
    return hasattr(part, "to_quantized") and part.weight.shape[-1] % 32 == 0


@pytest.mark.parametrize("kind", ["quantized", "adapted"])
def test_it_is_of_quantized_and_adapted_models(kind: str) -> None:
    model = tiny.random_model(tiny.scaled_config(VOCAB), seed=6)
    if kind == "quantized":
        nn.quantize(model, group_size=32, bits=4, class_predicate=lambda _, part: "weight" in part and _fits(part))
    else:
        for layer in model.layers:
            layer.attn.qkv_proj = lora_layers.LoRALinear(layer.attn.qkv_proj, 4, 2.0, 0.0, mx.random.key(1))
            layer.attn.qkv_proj.lora_b = mx.random.normal(layer.attn.qkv_proj.lora_b.shape, key=mx.random.key(2))
    expected = run(model, PROMPT, SAMPLERS["drawn"], 40)
    for seed in range(3):
        made = whimsical(Script([token for token, _ in expected], seed), seed)
        assert_same(run(model, PROMPT, SAMPLERS["drawn"], 40, made), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.usefixtures("branch")
def test_it_is_of_quantized_caches(bits: int) -> None:
    model = tiny.random_model(tiny.scaled_config(VOCAB, head_dim=32), seed=6)
    expected = run(model, PROMPT, SAMPLERS["greedy"], 40, kv_bits=bits)
    for seed in range(3):
        made = whimsical(Script([token for token, _ in expected], seed), seed)
        found = run(model, PROMPT, SAMPLERS["greedy"], 40, made, kv_bits=bits)
        assert_same(found, expected, bits=not device.on_gpu())


@pytest.mark.usefixtures("branch")
def test_it_is_of_a_text_without_end(model: Model) -> None:
    for name in ("greedy", "drawn, penalties"):
        expected = run(model, PROMPT, SAMPLERS[name], 120, max_kv_size=40)
        for seed in range(3):
            made = whimsical(Script([token for token, _ in expected], seed), seed)
            found = run(model, PROMPT, SAMPLERS[name], 120, made, max_kv_size=40)
            assert_same(found, expected, bits=not device.on_gpu())


@pytest.mark.parametrize("length", [60, 61, 62, 63, 64, 250, 255, 256, 257])
def test_where_the_cache_grows_and_steps_look_farther_nothing_changes(model: Model, length: int) -> None:
    prompt = np.random.default_rng(length).integers(3, VOCAB, length).tolist()
    expected = run(model, prompt, SAMPLERS["greedy"], 20)
    made = whimsical(Script([token for token, _ in expected], 1, 0.9), length)
    assert_same(run(model, prompt, SAMPLERS["greedy"], 20, made), expected)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.usefixtures("branch")
def test_a_smaller_models_guesses_change_nothing(model: Model, small: Model, name: str) -> None:
    made = whimsical(ModelDrafts(small, VOCAB))
    expected = run(model, PROMPT, SAMPLERS[name], 60)
    assert_same(run(model, PROMPT, SAMPLERS[name], 60, made), expected, bits=not device.on_gpu())
    assert made.figures.drafted > 40


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_guesses_for_itself_is_always_right(model: Model, name: str) -> None:
    """It draws by the same random numbers, and sees the same history."""
    made = whimsical(ModelDrafts(model, VOCAB))
    run(model, PROMPT, SAMPLERS[name], 80, made)
    assert made.figures.drafted == made.figures.accepted > 40


@pytest.mark.parametrize("most", [15, 20])
def test_more_guesses_than_rows_have_bits_for_are_right_to_rounding(model: Model, most: int) -> None:
    expected = run(model, PROMPT, SAMPLERS["greedy"], 60)
    made = whimsical(Script([token for token, _ in expected], 1, 1.0), most=most)
    assert_same(run(model, PROMPT, SAMPLERS["greedy"], 60, made), expected, bits=most < 16)


def test_functions_of_the_callers_are_called_as_often_and_in_the_same_order(model: Model) -> None:
    calls: list[tuple[int, ...]] = []

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        calls.append(tuple(tokens.tolist()))
        return logits + len(calls) * (mx.arange(VOCAB) % 7 == len(calls) % 7)

    def choose(logprobs: mx.array) -> mx.array:
        return mx.random.categorical(logprobs)

    sampler, seen = Sampler(choose=choose, processors=(process,)), []
    for made in (None, whimsical(Script([], 0)), whimsical(PromptLookup()), whimsical(ModelDrafts(model, VOCAB))):
        calls.clear()
        mx.random.seed(11)
        if seen and isinstance(made._source, Script):
            made._source = Script([token for token, _ in seen[0][0]], 1)
        seen.append((run(model, PROMPT, sampler, 40, made), calls[:40]))
    for found, called in seen[1:]:
        assert_same(found, seen[0][0])
        assert called == seen[0][1]


# --- where it ends, and what it leaves


@settings(max_examples=25)
@given(st.integers(1, 25), st.integers(0, 1000), st.integers(1, 30))
def test_wherever_it_is_left_the_cache_holds_what_it_says(model: Model, max_tokens: int, seed: int, leave: int) -> None:
    sampler = SAMPLERS["drawn"]
    truth = [token for token, _ in run(model, PROMPT, sampler, 30)]
    caches = make_prompt_cache(model)
    logits = prefill(model, PROMPT, caches)
    made = whimsical(Script(truth, seed, 0.9), seed)
    drawn = decode(model, caches, sampler, logits, sampler.start([PROMPT], 5), max_tokens, PROMPT, made, PROMPT)
    text = [*PROMPT]
    for token, _ in islice(drawn, leave):
        text.append(token)
        held = caches[0].offset
        assert len(text) - 1 <= held <= len(text) and {cache.offset for cache in caches} == {held}
    drawn.close()  # type: ignore[attr-defined]
    assert len(text) == len(PROMPT) + min(leave, max_tokens)
    held = caches[0].offset
    fresh = make_prompt_cache(model)
    prefill(model, text[:held], fresh)
    for cache, own in zip(caches, fresh, strict=True):
        for mine, theirs in zip(cache.state, own.state, strict=True):
            np.testing.assert_allclose(mine[:, :, :held], theirs[:, :, :held], atol=1e-3)


def test_ctrl_c_amid_a_pass_leaves_a_cache_that_claims_nothing_of_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = [token for token, _ in run(model, PROMPT, SAMPLERS["greedy"], 30)]

    def press(*_: Any) -> Iterator[Any]:
        raise KeyboardInterrupt

    for before in range(4):
        caches = make_prompt_cache(model)
        logits = prefill(model, PROMPT, caches)
        made = whimsical(Script(truth, 1, 1.0), before)
        drawn = decode(model, caches, Sampler(), logits, State(), 30, PROMPT, made, PROMPT)
        text = [*PROMPT, *(token for token, _ in islice(drawn, 6 + before))]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Speculation, "_choices", press)
            for token, _ in drawn:
                text.append(token)
        held = caches[0].offset
        assert held <= len(text)
        again = prefill(model, text[held:] or text[-1:], caches if held < len(text) else make_prompt_cache(model))
        assert again.argmax().item() == truth[len(text) - len(PROMPT)] or held == len(text)


def streamed(model: Model, tokenizer: Tokenizer | None, prompt: Any, **options: Any) -> list[Response]:
    return [*stream_generate(model, tokenizer, prompt, **options)]


def same_responses(found: Sequence[Response], expected: Sequence[Response]) -> None:
    def of(responses: Sequence[Response]) -> list[Any]:
        return [(each.text, each.token, each.finish_reason, each.generation_tokens) for each in responses]

    assert of(found) == of(expected)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess that there is is verified."""
    monkeypatch.setattr(DraftPace, "choose", lambda self, likely: len(likely))


@pytest.mark.usefixtures("eager", "branch")
@pytest.mark.parametrize("stop", [(), ("fox",), ("quickbrown", "zzz"), ("sx",)])
def test_stop_strings_and_eos_end_it_amid_a_draft(tiny_tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "thequickbrownfoxs")
    prompt = "thequickbrownfoxs thequickbrownfoxs\n"
    expected = streamed(model, tiny_tokenizer, prompt, stop=stop)
    found = streamed(model, tiny_tokenizer, prompt, stop=stop, prompt_lookup=True)
    same_responses(found, expected)
    assert expected[-1].finish_reason == "stop" and found[-1].drafts is not None and found[-1].drafts.accepted


@pytest.mark.usefixtures("eager")
def test_it_ends_with_max_tokens_and_with_the_context(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.spelling_model(tiny_tokenizer, "xyzx", context=64)
    for max_tokens in (*range(1, 12), 100):
        expected = streamed(model, tiny_tokenizer, "xyzxyz", max_tokens=max_tokens)
        found = streamed(model, tiny_tokenizer, "xyzxyz", max_tokens=max_tokens, prompt_lookup=True)
        same_responses(found, expected)
        assert expected[-1].finish_reason == ("context" if max_tokens == 100 else "length")
    assert found[-1].drafts.passes < 20  # type: ignore[union-attr]


@pytest.mark.usefixtures("eager")
def test_a_prompt_cache_goes_on_as_without(model: Model) -> None:
    texts = []
    for options in ({}, {"prompt_lookup": True}, {"draft_model": model, "num_draft_tokens": 4}):
        caches, said = make_prompt_cache(model), []
        for prompt in (PROMPT, [8, 9], [50, 7]):
            responses = streamed(
                model, None, prompt, prompt_cache=caches, max_tokens=20, temp=0.7, seed=2, stop_at_eos=False, **options
            )
            said.append([response.token for response in responses])
            for cache in caches:  # as far as both hold it
                cache.trim(cache.offset - sum(map(len, said)) - 7 + 1)
        texts.append(said)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("source", ["prompt", "model"])
def test_a_conversation_is_the_same_and_reads_nothing_twice(
    model: Model, tiny_tokenizer: Tokenizer, source: str
) -> None:
    spoken = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size), seed=2)
    options = {"max_tokens": 24, "temp": 0.6}
    plain = Chat(spoken, tiny_tokenizer, options=options, seed=3)
    drafts: dict[str, Any] = {"prompt_lookup": True} if source == "prompt" else {"draft_model": spoken}
    guessed = Chat(spoken, tiny_tokenizer, options=options, seed=3, **drafts)
    for message in ("the quick brown fox", "jumps over", "the quick brown fox"):
        assert "".join(guessed.ask(message)) == "".join(plain.ask(message))
        assert guessed.last is not None and plain.last is not None
        assert plain.last.drafts is None and guessed.last.drafts is not None
        assert guessed.last.read_tokens <= plain.last.read_tokens + 1  # the last token may not have been fed
    assert guessed.last.drafts.drafted or source == "prompt"  # which random text does not repeat


# --- refusals


def test_what_cannot_draft_is_refused(model: Model, tmp_path: Path) -> None:
    mamba = load_model(other_models.write_model(tmp_path / "mamba", "mamba"))
    other = tiny.random_model(tiny.scaled_config(VOCAB + 1))
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: speculation_for(mamba, True), "keeps a state"),
        (lambda: speculation_for(model, draft_model=other), "97 tokens and the model 96"),
        (lambda: speculation_for(model, True, model), "one of the two"),
        (lambda: speculation_for(model, True, num_draft_tokens=0), "from 1 to 31"),
        (lambda: speculation_for(model, True, num_draft_tokens=32), "from 1 to 31"),
        (lambda: streamed(mamba, None, [5, 6], prompt_lookup=True), "keeps a state"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    assert speculation_for(mamba) is None


# --- the pace


def paced(times: dict[int, float]) -> DraftPace:
    pace = DraftPace(7)
    for _ in range(3):
        pace.took(1, times[1])
    for tokens, seconds in times.items():
        if tokens > 1:
            pace.took(tokens, seconds)
    return pace


@pytest.mark.parametrize(
    ("times", "likely", "count"),
    [
        ({1: 1.0}, [], 0),
        ({1: 1.0, 2: 1.0, 4: 1.2, 8: 1.6}, [0.9] * 7, 7),  # 5.7 / 1.6 against 3.44 / 1.2
        ({1: 1.0, 2: 1.0, 4: 1.2, 8: 2.4}, [0.9] * 7, 3),
        ({1: 1.0, 2: 1.0, 4: 1.2, 8: 2.4}, [0.9] * 2, 1),
        ({1: 1.0, 2: 1.9, 4: 3.6, 8: 7.0}, [0.8] * 7, 0),  # a pass costs what its tokens cost
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0}, [0.05] * 7, 0),
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0}, [0.5] * 7, 3),  # 1.875 / 1.3 against 1.5 / 1.1
        ({1: 1.0, 2: 2.0, 4: 2.0, 8: 2.0}, [0.9] * 7, 7),  # bfloat16 on an M3 Ultra
        ({1: 1.0, 2: 2.0}, [0.9] * 7, 3),  # what was not tried may cost no more, up to twice as many tokens
    ],
)
def test_as_many_guesses_are_verified_as_make_it_fastest(
    times: dict[int, float], likely: list[float], count: int
) -> None:
    assert paced(times).choose(likely) == count


def test_nothing_is_guessed_before_it_is_known_what_a_token_costs() -> None:
    pace = DraftPace(7)
    for _ in range(3):
        assert pace.choose([0.9] * 7) == 0
        pace.took(1, 1.0)
    assert pace.choose([0.9] * 7) == 1


def test_passes_that_cost_too_much_are_found_out_by_short_ones() -> None:
    pace, counts = paced({1: 1.0}), []
    for _ in range(4):
        counts.append(pace.choose([0.9] * 7))
        pace.took(1 + counts[-1], 1.0)
    assert counts == [1, 3, 7, 7]
    dear = paced({1: 1.0})
    dear.took(1 + dear.choose([0.3] * 7), 1.5)
    assert dear.choose([0.3] * 7) == 0


def test_a_pass_that_was_slow_once_is_tried_again_and_seldom() -> None:
    pace, tried = paced({1: 1.0, 2: 5.0, 4: 5.0, 8: 9.0}), []
    for step in range(1000):
        count = pace.choose([0.8] * 7)
        tried += [step] * bool(count)
        pace.took(1 + count, 1.0 + 4 * count)
    assert tried[0] == 64 and len(tried) < 6  # 64, 128, 256, … steps apart
    assert pace.choose([0.8] * 7) == 0
    for _ in range(2000):
        count = pace.choose([0.8] * 7)
        pace.took(1 + count, 1.0 + 0.02 * count)  # the machine is quiet now
    assert pace.choose([0.8] * 7) == 7


def test_a_long_run_of_drafts_is_compared_with_single_tokens() -> None:
    pace, passes = paced({1: 1.0, 8: 1.5}), []
    for _ in range(200):
        passes.append(pace.choose([0.9] * 7) + 1)
        pace.took(passes[-1], 1.5 if passes[-1] > 1 else 1.0)
    assert 0.01 < passes.count(1) / len(passes) < 0.1
    for _ in range(40):
        count = pace.choose([0.9] * 7)
        pace.took(count + 1, 8.0 if count else 1.0)  # something else uses the machine
    assert pace.choose([0.9] * 7) == 0


def test_figures_say_how_drafts_fared() -> None:
    assert str(DraftFigures(40, 30, 20)) == "30 of 40 tokens right, 2.50 tokens a pass"
    assert str(DraftFigures(0, 0, 20)) == "none was worth it, 1.00 tokens a pass"
