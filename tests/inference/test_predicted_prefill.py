"""A KV prediction in place of a prefill: exact where it predicts exactly, and a function of the prompt alone."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import kv_predictions
import mlx.core as mx
import numpy as np
import pytest
import tiny

from elm_mlx.errors import InputError
from elm_mlx.inference.batch import generate_batch
from elm_mlx.inference.conversation import Chat
from elm_mlx.inference.engine import Engine
from elm_mlx.inference.generation import stream_generate
from elm_mlx.inference.prefix import READ_STEP, PrefixCache
from elm_mlx.inference.requests import Embedded, Failed, Generated, PromptRead, Request
from elm_mlx.inference.rows import PREFILL_STEP, predicted_prefill
from elm_mlx.inference.sampling import Sampler
from elm_mlx.model.cache import make_prompt_cache
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model
from elm_mlx.store.loading import Loaded
from elm_mlx.text.tokenizer import Tokenizer

VOCAB = 96
GREEDY = {"temp": 0.0, "top_p": 1.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def base() -> Model:
    return tiny.random_model(tiny.scaled_config(VOCAB))


@pytest.fixture(scope="module")
def exact(base: Model) -> KVPrediction:
    return kv_predictions.identity_of(base, base)


@pytest.fixture(scope="module")
def wrong(base: Model) -> KVPrediction:
    return kv_predictions.prediction_of(base)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prediction has read."""
    counts: list[int] = []
    reading = KVPrediction.read

    def counting(kvp: KVPrediction, ids: mx.array, *rest: Any) -> None:
        counts.append(ids.shape[1])
        reading(kvp, ids, *rest)

    monkeypatch.setattr(KVPrediction, "read", counting)
    return counts


def drawn(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def said(model: Model, prompt: Sequence[int], **options: Any) -> tuple[list[int], list[float]]:
    found = [*stream_generate(model, None, prompt, max_tokens=12, stop_at_eos=False, **options)]
    return [each.token for each in found], [each.logprob for each in found]


@pytest.mark.parametrize("length", [1, 2, PREFILL_STEP + 1, 300])
@pytest.mark.parametrize("options", [{}, {"temp": 0.8, "seed": 3, "prompt_lookup": True, "prefill_step": 50}])
def test_what_predicts_exactly_changes_nothing(
    base: Model, exact: KVPrediction, branch: bool, length: int, options: dict[str, Any]
) -> None:
    (tokens, logprobs), (own, theirs) = (said(base, drawn(length), kvp=kvp, **options) for kvp in (exact, None))
    assert tokens == own and logprobs == pytest.approx(theirs, abs=1e-4)


def test_what_predicts_wrongly_is_another_text_whose_drafts_change_nothing(base: Model, wrong: KVPrediction) -> None:
    prompt = drawn(200)
    predicted = said(base, prompt, kvp=wrong)
    assert predicted[0] != said(base, prompt)[0]
    assert said(base, prompt, kvp=wrong, draft_model=wrong.auxiliary) == predicted
    assert said(base, prompt, kvp=wrong, prompt_lookup=True) == predicted


def test_all_but_the_last_token_are_counted_as_predicted(base: Model, wrong: KVPrediction) -> None:
    (only,) = stream_generate(base, None, drawn(9), max_tokens=1, kvp=wrong)
    assert (only.prompt_tokens, only.predicted_tokens) == (9, 8)
    (only,) = stream_generate(base, None, drawn(9), max_tokens=1)
    assert only.predicted_tokens == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_predicted_keys_may_be_kept_in_few_bits(bits: int) -> None:
    base = tiny.random_model(tiny.scaled_config(VOCAB, head_dim=32))
    exact = kv_predictions.identity_of(base, base)
    tokens, logprobs = said(base, drawn(60), kvp=exact, prompt_cache=make_prompt_cache(base, bits))
    own, theirs = said(base, drawn(60), prompt_cache=make_prompt_cache(base, bits), prefill_step=59)
    assert tokens[:1] == own[:1] and logprobs[0] == pytest.approx(theirs[0], abs=0.05)


def test_caches_that_a_prediction_cannot_fill_are_refused(base: Model, wrong: KVPrediction) -> None:
    filled = make_prompt_cache(base)
    predicted_prefill(base, wrong, drawn(5), filled)
    for caches in (filled, make_prompt_cache(base, max_kv_size=64)):
        with pytest.raises(InputError, match="empty caches"):
            stream_generate(base, None, drawn(9), prompt_cache=caches, kvp=wrong)
    with pytest.raises(InputError, match="empty caches"):
        [*generate_batch(base, None, [drawn(9)], prompt_cache=filled, kvp=wrong)]  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty caches"):
        PrefixCache(base, max_kv_size=64, kvp=wrong)


def test_several_prompts_are_each_predicted(tiny_tokenizer: Tokenizer) -> None:
    base = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size))
    kvp, prompts = kv_predictions.prediction_of(base), ["the quick brown fox", "an old king", "the quick brown fox"]
    together = generate_batch(base, tiny_tokenizer, prompts, max_tokens=8, kvp=kvp)
    for prompt, done in zip(prompts, together, strict=True):
        found = [*stream_generate(base, tiny_tokenizer, prompt, max_tokens=8, kvp=kvp)]
        assert done.tokens == [each.token for each in found]


def test_what_was_predicted_before_is_not_predicted_again(base: Model, wrong: KVPrediction, read: list[int]) -> None:
    cache, first = PrefixCache(base, kvp=wrong), drawn(150)
    for prompt, new, alike in (
        (first, 149, True),
        (first, 0, True),  # answered anew
        ([*first, *drawn(9, 1)], 8, False),  # behind a token that the model has read itself
        (first[:40], 0, True),
        ([*first[:40], *drawn(200, 2)], 199, False),
        ([7], 0, True),
    ):
        read.clear()
        logits = cache.read(prompt)
        assert logits is not None and sum(read) == new and cache.ids == prompt
        fresh = predicted_prefill(base, wrong, prompt, make_prompt_cache(base))
        assert mx.allclose(logits, fresh, atol=1e-4) == alike, len(prompt)


def test_what_the_model_said_itself_stays_and_is_read_by_the_auxiliary_alone(
    base: Model, wrong: KVPrediction, read: list[int]
) -> None:
    cache, prompt = PrefixCache(base, kvp=wrong), drawn(60)
    logits = cache.read(prompt)
    assert logits is not None
    answer = [*cache.decode(logits, Sampler(), 0, 9)]
    following = [*prompt, *answer, *drawn(20, 1)]
    read.clear()
    logits = cache.read(following)
    assert (
        logits is not None and sum(read) == 20 and cache.ids == following
    )  # the answer's last token with it, the last one not

    caches, own = make_prompt_cache(base), make_prompt_cache(wrong.auxiliary)
    predicted_prefill(base, wrong, prompt, caches, own)
    base(mx.array([answer[:-1]]), cache=caches)
    wrong.auxiliary(mx.array([[prompt[-1], *answer[:-1]]]), cache=own)
    wrong.read(mx.array([following[68:-1]]), own, caches)
    expected = base(mx.array([following[-1:]]), cache=caches)[0]
    assert mx.allclose(logits, expected, atol=1e-4)
    whole = predicted_prefill(base, wrong, following, make_prompt_cache(base))
    assert not mx.allclose(logits, whole, atol=1e-2)


def test_a_prediction_that_is_stopped_goes_on_where_it_was(base: Model, wrong: KVPrediction, read: list[int]) -> None:
    cache, prompt, looks = PrefixCache(base, kvp=wrong), drawn(2 * READ_STEP + 9), iter([False, True])
    assert cache.read(prompt, lambda: next(looks)) is None
    assert cache.ids == prompt[:READ_STEP]
    logits = cache.read(prompt)
    assert logits is not None and read == [READ_STEP, READ_STEP, 8]
    assert mx.allclose(logits, predicted_prefill(base, wrong, prompt, make_prompt_cache(base)), atol=1e-4)


def test_an_interrupt_amid_a_prediction_empties_all_caches(
    base: Model, wrong: KVPrediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, prompt = PrefixCache(base, kvp=wrong), drawn(90)
    cache.read(prompt[:50])
    reading = KVPrediction.read

    def torn(kvp: KVPrediction, ids: mx.array, own: Any, caches: Any) -> None:
        reading(kvp, ids, own, caches[:1] + [each.empty() for each in caches[1:]])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(KVPrediction, "read", torn)
        cache.read(prompt)
    assert cache.ids == []
    logits = cache.read(prompt)
    assert logits is not None
    assert mx.allclose(logits, predicted_prefill(base, wrong, prompt, make_prompt_cache(base)), atol=1e-4)


def test_a_chat_that_is_predicted_exactly_is_the_chat(tiny_tokenizer: Tokenizer) -> None:
    base = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size))
    plain, chat = (
        Chat(base, tiny_tokenizer, options=GREEDY, kvp=kvp) for kvp in (None, kv_predictions.identity_of(base, base))
    )
    for message in ("the quick brown fox", "an old king", "told stories"):
        assert "".join(chat.ask(message)) == "".join(plain.ask(message))
        assert chat.last is not None and chat.last.predicted_tokens == chat.last.read_tokens - 1


@pytest.fixture
def served(base: Model, wrong: KVPrediction) -> Iterator[Engine]:
    models = {name: Loaded(base, None, "float32", ()) for name in ("plain", "sooner")}
    engine = Engine(models, max_memory=1 << 33, prefix_bytes=1 << 30, predictions={"sooner": wrong})
    yield engine
    engine.close(5)


def ask(engine: Engine, model: str, ids: Sequence[int], **options: Any) -> Callable[[], tuple[list[Any], int]]:
    """Hands in a request. Returns a function that waits for its tokens, and how many of the prompt were kept."""
    events: queue.Queue[Any] = queue.Queue()
    engine.submit(Request(model, tuple(ids), 12, Sampler(), **options), events.put)

    def answer() -> tuple[list[Any], int]:
        heard = []
        while not heard or not (isinstance(heard[-1], Failed) or getattr(heard[-1], "finish_reason", None)):
            heard.append(events.get(timeout=60))
        assert not isinstance(heard[-1], Failed), heard[-1].error
        scored = [event.scored for event in heard if isinstance(event, Generated)]
        (kept,) = [event.cached_tokens for event in heard if isinstance(event, PromptRead)]
        return [(each.token, each.logprob) for each in scored], kept

    return answer


def test_a_server_keeps_what_was_predicted_from_what_was_read(base: Model, wrong: KVPrediction, served: Engine) -> None:
    prompt = drawn(300)
    expected = {
        name: [*zip(*said(base, prompt, kvp=kvp), strict=True)] for name, kvp in (("plain", None), ("sooner", wrong))
    }
    assert expected["plain"] != expected["sooner"]
    for name, kept in (("sooner", 0), ("plain", 0), ("sooner", 256), ("plain", 256)):
        tokens, cached = ask(served, name, prompt)()
        assert cached == kept, name
        assert tokens == expected[name][: len(tokens)] and len(tokens) > 5, name
    asked = [ask(served, name, prompt) for name in ("plain", "sooner", "sooner")]  # together
    for name, answer in zip(("plain", "sooner", "sooner"), asked, strict=True):
        assert answer()[0] == expected[name][: len(expected[name])], name


def test_a_server_predicts_an_answer_that_comes_back_in_a_prompt(
    base: Model, wrong: KVPrediction, served: Engine
) -> None:
    prompt = drawn(250)
    tokens, _ = ask(served, "sooner", prompt)()
    longer = [*prompt, *(token for token, _ in tokens), *drawn(20, 1)]
    found, kept = ask(served, "sooner", longer)()
    assert kept == PREFILL_STEP and [*zip(*said(base, longer, kvp=wrong), strict=True)] == found
    for length in (1, 2, PREFILL_STEP + 1):
        found, _ = ask(served, "sooner", drawn(length, 5))()
        assert [*zip(*said(base, drawn(length, 5), kvp=wrong), strict=True)] == found


def test_a_server_scores_no_prompt_that_it_predicts(base: Model, served: Engine) -> None:
    with pytest.raises(InputError, match="sooner predicts"):
        ask(served, "sooner", drawn(9), prompt_logprobs=True)
    found: queue.Queue[Any] = queue.Queue()
    for name in ("plain", "sooner"):  # the model's own either way
        served.embed(name, drawn(200), found.put)
    first, second = found.get(timeout=60), found.get(timeout=60)
    assert isinstance(first, Embedded) and first == second
