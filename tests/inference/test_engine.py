"""Whatever comes together in the engine, every answer is the one that `generate` gives alone."""

from __future__ import annotations

import itertools
import json
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny

from elm_mlx.errors import InputError
from elm_mlx.inference import engine as engine_module
from elm_mlx.inference.drafts import PromptLookup
from elm_mlx.inference.engine import Engine
from elm_mlx.inference.generation import decode, stream_generate
from elm_mlx.inference.grammar import GrammarCompiler
from elm_mlx.inference.requests import (
    Busy,
    Embedded,
    Event,
    Failed,
    Generated,
    PromptRead,
    Request,
    ScoredToken,
    Ticket,
    TooLarge,
)
from elm_mlx.inference.rows import Rows, prefill
from elm_mlx.inference.sampling import Sampler
from elm_mlx.inference.speculation import DraftPace
from elm_mlx.model.cache import make_prompt_cache, row_capacity
from elm_mlx.model.network import Model
from elm_mlx.store.loading import Loaded, load_model
from elm_mlx.text.tokenizer import Tokenizer

PLENTY = 1 << 34


@dataclass
class Heard:
    """The events of one request, as they come."""

    events: queue.Queue[Any] = field(default_factory=queue.Queue)
    ticket: Ticket | None = None

    def all(self, timeout: float = 60) -> list[Any]:
        """Waits for the end."""
        heard = []
        while True:
            heard.append(self.events.get(timeout=timeout))
            last = heard[-1]
            if isinstance(last, Failed | Embedded) or (isinstance(last, Generated) and last.finish_reason):
                return heard

    def tokens(self) -> list[ScoredToken]:
        heard = self.all()
        assert not isinstance(heard[-1], Failed), heard[-1].error
        return [event.scored for event in heard if isinstance(event, Generated)]


def ask(engine: Engine, ids: Sequence[int], max_tokens: int = 20, model: str = "tiny", **options: Any) -> Heard:
    heard = Heard()
    sampler = options.pop("sampler", Sampler())
    request = Request(model, tuple(ids), max_tokens, sampler, **options)
    heard.ticket = engine.submit(request, heard.events.put)
    return heard


def alone(
    model: Model, ids: Sequence[int], max_tokens: int = 20, sampler: Sampler | None = None, **options: Any
) -> Any:
    settings = {} if sampler is None else {
        name: getattr(sampler, name) for name in ("temp", "top_p", "top_k", "min_p", "repetition_penalty")
    }  # fmt: skip
    found = stream_generate(model, None, ids, max_tokens=max_tokens, **settings, **options)
    return [ScoredToken(response.token, response.logprob) for response in found]


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Model:
    return tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size, eos_token_id=(318,)), seed=2)


def made(model: Model, tokenizer: Tokenizer | None = None, **options: Any) -> Engine:
    settings: dict[str, Any] = {"max_memory": PLENTY, "prefix_bytes": 1 << 26, **options}
    return Engine({"tiny": Loaded(model, tokenizer, "float32", ())}, **settings)


@pytest.fixture
def engine(model: Model, tiny_tokenizer: Tokenizer) -> Iterator[Engine]:
    engine = made(model, tiny_tokenizer)
    yield engine
    engine.close(10)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [1, *(3 + (7 * i * i + 31 * seed + 5 * i) % 300 for i in range(length - 1))]


def test_one_answer_is_generates(engine: Engine, model: Model) -> None:
    for length in (1, 5, 7, 127, 128, 129, 200, 300):
        assert ask(engine, prompt(length, length)).tokens() == alone(model, prompt(length, length))


def test_sixteen_answers_together_have_the_bits_of_each_alone(engine: Engine, model: Model) -> None:
    lengths = (3, 130, 17, 300, 250, 64, 5, 9, 12, 16, 33, 129, 8, 2, 40, 70)
    heard = [ask(engine, prompt(length, length), 40) for length in lengths]
    for length, each in zip(lengths, heard, strict=True):
        assert each.tokens() == alone(model, prompt(length, length), 40)


def test_a_seed_draws_what_generate_draws(engine: Engine, model: Model) -> None:
    samplers = [
        Sampler(1.0), Sampler(0.8, top_p=0.9), Sampler(), Sampler(1.2, top_k=5, repetition_penalty=1.3),
        Sampler(0.7, min_p=0.05), Sampler(repetition_penalty=1.5),
    ]  # fmt: skip
    heard = [ask(engine, prompt(9, i), 30, sampler=sampler, seed=i) for i, sampler in enumerate(samplers)]
    for i, (sampler, each) in enumerate(zip(samplers, heard, strict=True)):
        assert each.tokens() == alone(model, prompt(9, i), 30, sampler, seed=i if sampler.temp else None)


def test_answers_with_the_same_settings_are_drawn_in_one_call(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    samplers = [Sampler(0.8, top_p=0.9), Sampler(), Sampler(0.8, top_p=0.9), Sampler(0.9), Sampler(0.8, top_p=0.9)]
    calls, choose = [], Sampler.__call__

    def counted(self: Sampler, logits: mx.array, *rest: Any) -> Any:
        calls.append((self, logits.shape[0]))
        return choose(self, logits, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", counted)
        heard = [ask(engine, prompt(9, i), 30, sampler=sampler, seed=i) for i, sampler in enumerate(samplers)]
        answers = [each.tokens() for each in heard]
    for i, (sampler, answer) in enumerate(zip(samplers, answers, strict=True)):
        assert answer == alone(model, prompt(9, i), 30, sampler, seed=i if sampler.temp else None)
    assert calls.count((samplers[0], 3)) > 20


@pytest.fixture
def guessing(model: Model, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Verifies every guess that there is."""
    monkeypatch.setattr(DraftPace, "choose", lambda self, likely: len(likely))
    engine = made(model, tiny_tokenizer, drafted=7)
    yield engine
    engine.close(10)


@pytest.mark.parametrize(
    "sampler",
    [Sampler(), Sampler(0.6), Sampler(0.8, top_p=0.9, repetition_penalty=1.1), Sampler(frequency_penalty=0.2)],
    ids=["greedy", "drawn", "filtered", "penalties"],
)
def test_guesses_change_no_answer(
    guessing: Engine, engine: Engine, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(1)
    for length in (9, 130):
        text = prompt(length, 3)
        for count in (1, 2, 7, 60):
            options = {"sampler": sampler, "seed": 4, "top_logprobs": 2}
            expected = ask(engine, text, count, **options).tokens()
            said = [*text, *(each.token for each in expected), *[5] * 8]

            def half_right(lookup: PromptLookup, most: int, said: list[int] = said) -> list[int]:
                right = said[len(lookup) : len(lookup) + most]
                return [token if chance.random() < 0.7 else 5 for token in right]

            with monkeypatch.context() as patch:
                patch.setattr(PromptLookup, "offers", lambda self, most: [0.5] * most)
                patch.setattr(PromptLookup, "guesses", half_right)
                assert ask(guessing, text, count, **options).tokens() == expected
    statistics = guessing.statistics()
    assert statistics.drafted_tokens > statistics.accepted_tokens > 50
    assert engine.statistics().drafted_tokens == 0


@pytest.mark.parametrize("answers", [2, 3, 5, 8, 9, 16])
def test_guesses_at_several_answers_change_none_of_them(
    guessing: Engine, model: Model, answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all lengths and settings, with guesses that are right for some, wrong for others and none for a few."""
    samplers = [
        Sampler(),
        Sampler(0.6),
        Sampler(0.8, top_p=0.9, repetition_penalty=1.1),
        Sampler(frequency_penalty=0.2),
    ]
    chance, engine = random.Random(answers), made(model)
    asked = [(prompt(3 + 40 * (i % 5), i), 20 + 9 * (i % 4), samplers[i % 4]) for i in range(answers)]
    options = [{"sampler": sampler, "seed": 4 + i, "top_logprobs": i % 3} for i, (_, _, sampler) in enumerate(asked)]
    expected = [ask(engine, ids, count, **each).tokens() for (ids, count, _), each in zip(asked, options, strict=True)]
    said = [
        [*ids, *(each.token for each in answer), *[5] * 8] for (ids, *_), answer in zip(asked, expected, strict=True)
    ]

    def offered(lookup: PromptLookup, most: int) -> list[float]:
        return [0.5] * chance.randrange(most + 1)

    def half_right(lookup: PromptLookup, count: int) -> list[int]:
        begun = lookup._text[:3]
        right = next(text for text in said if text[:3] == begun)[len(lookup) : len(lookup) + count]
        return [token if chance.random() < 0.7 else 5 for token in right]

    monkeypatch.setattr(PromptLookup, "offers", offered)
    monkeypatch.setattr(PromptLookup, "guesses", half_right)
    heard = [ask(guessing, ids, count, **each) for (ids, count, _), each in zip(asked, options, strict=True)]
    assert [each.tokens() for each in heard] == expected
    statistics = guessing.statistics()
    assert statistics.drafted_tokens > statistics.accepted_tokens > 10
    assert statistics.generated_tokens == engine.statistics().generated_tokens
    engine.close(10)


@pytest.mark.parametrize("seed", [2, 9], ids=["its-own", "another"])
def test_a_draft_model_changes_no_answer_whoever_comes_between(
    model: Model, tiny_tokenizer: Tokenizer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftPace, "choose", lambda self, likely: len(likely))
    draft = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size, max_context_length=200), seed=seed)
    engine, plain = made(model, tiny_tokenizer, drafted=5, draft_model=draft), made(model, tiny_tokenizer)
    batch, usual = engine._batches["tiny"], plain._batches["tiny"]
    assert batch.bytes_of([600]) - usual.bytes_of([600]) == sum(
        cache.nbytes for cache in full_caches(draft)
    )  # whose context is all that it reads
    assert engine.statistics().weight_bytes == 2 * plain.statistics().weight_bytes
    sampler = Sampler(0.7, top_p=0.95)
    for length in (5, 150, 30):  # in the second the draft's context ends, in the third another text stands in it
        asked = [(prompt(length, number), 20 * number) for number in (5, 1, 2)]
        heard = [ask(engine, ids, count, sampler=sampler, seed=number) for number, (ids, count) in enumerate(asked)]
        for number, ((ids, count), each) in enumerate(zip(asked, heard, strict=True)):
            assert each.tokens() == alone(model, ids, count, sampler, seed=number)
    statistics = engine.statistics()
    assert statistics.accepted_tokens > 50 if seed == 2 else statistics.drafted_tokens > 50
    engine.close(10)
    plain.close(10)


def full_caches(model: Model) -> Any:
    """Returns caches of a text as long as the model's context, with the room that rows' have."""
    caches = make_prompt_cache(model)
    mx.eval(prefill(model, [5] * model.config.max_context_length, caches))
    for cache in caches:
        cache.reserve(row_capacity(cache.offset))
    return caches


def test_a_draft_model_of_another_vocabulary_is_refused(model: Model, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="a draft needs a model of the same vocabulary"):
        made(model, tiny_tokenizer, drafted=5, draft_model=tiny.random_model(tiny.scaled_config(96)))


def test_right_guesses_come_in_fewer_steps_and_end_where_the_text_does(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftPace, "choose", lambda self, likely: len(likely))
    model = tiny.spelling_model(tiny_tokenizer, "xyzx", context=128)
    ids, stops = tiny_tokenizer.encode("xyzxyz"), ((), ("zxyzx",), ("yy",))
    engines = [made(model, tiny_tokenizer, drafted=drafted) for drafted in (0, 7)]
    for stop in stops:
        for count in (3, 8, 50, 500):
            plain, guessed = (ask(engine, ids, count, stop=stop).all() for engine in engines)
            assert guessed == plain
    assert engines[1].statistics().accepted_tokens > 100
    assert engines[1].statistics().generated_tokens == engines[0].statistics().generated_tokens
    for engine in engines:
        engine.close(10)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_first_token_that_is_guessed_again_is_chosen_again(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """It is reported as soon as the prompt is read; guesses are no second report of it."""
    monkeypatch.setattr(DraftPace, "choose", lambda self, likely: len(likely))
    model = tiny.spelling_model(tiny_tokenizer, "abcdefghi")
    ids = tiny_tokenizer.encode("Q\naaaaaaaaQ\n")  # by which more of the first letter is likely
    plain, guessing = (made(model, tiny_tokenizer, drafted=drafted) for drafted in (0, 7))
    for _ in range(before):
        ask(guessing, ids, 3).all()
    expected = ask(plain, ids, 8, top_logprobs=2).all()
    assert "".join(event.text for event in expected if isinstance(event, Generated)) == "abcdefghi"
    assert ask(guessing, ids, 8, top_logprobs=2).all()[-1:] == expected[-1:]
    assert ask(guessing, ids, 8, top_logprobs=2).tokens() == ask(plain, ids, 8, top_logprobs=2).tokens()
    assert guessing.statistics().drafted_tokens > 0
    for engine in (plain, guessing):
        engine.close(10)


def test_who_joins_an_answer_with_guesses_takes_its_steps_and_leaves_them_again(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftPace, "choose", lambda self, likely: len(likely))
    model = tiny.spelling_model(tiny_tokenizer, "xyzx", context=512)
    engine, ids = made(model, tiny_tokenizer, drafted=7), tiny_tokenizer.encode("xyzxyz")
    for _ in range(3):
        first = ask(engine, ids, 150)
        others = [ask(engine, [*ids, *ids[1:]] * number, 7 * number) for number in range(1, 5)]
        assert first.tokens() == alone(model, ids, 150)
        for number, each in enumerate(others, start=1):
            assert each.tokens() == alone(model, [*ids, *ids[1:]] * number, 7 * number)
    assert engine.statistics().accepted_tokens > 100
    engine.close(10)


@pytest.mark.parametrize("keeps", [True, False])
def test_what_has_been_read_is_not_read_again(model: Model, tiny_tokenizer: Tokenizer, keeps: bool) -> None:
    engine = made(model, tiny_tokenizer, prefix_bytes=1 << 26 if keeps else 0)
    shared = prompt(300)
    for tail in ([5], [6, 7], [8] * 140):
        heard = ask(engine, [*shared, *tail], 10)
        events = heard.all()
        cached = events[0].cached_tokens
        assert isinstance(events[0], PromptRead) and cached == (256 if keeps and tail != [5] else 0)
        assert [event.scored for event in events[1:]] == alone(model, [*shared, *tail], 10)
    assert engine.statistics().prefix_bytes == ((3 * 128 * 2 * sum(model.config.num_kv_heads) * 16 * 4) if keeps else 0)
    engine.close(10)


def test_the_second_turn_reads_what_is_new(engine: Engine, model: Model) -> None:
    first = prompt(200)
    answer = [scored.token for scored in ask(engine, first, 100).tokens()]
    events = ask(engine, [*first, *answer, 7, 8, 9], 10).all()
    assert events[0].cached_tokens == 256
    expected = alone(model, [*first, *answer, 7, 8, 9], 10)
    assert [event.scored.token for event in events[1:]] == [scored.token for scored in expected]


def test_two_at_once_with_one_beginning_read_it_once(engine: Engine) -> None:
    heard = [ask(engine, [*prompt(300), token], 5) for token in (5, 6, 7)]
    assert [each.all()[0].cached_tokens for each in heard] == [0, 256, 256]


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine computes: of a step its rows, of what is read of a prompt its layers times tokens."""
    found: list[Any] = []
    step, read = Rows.step, Engine._read_layers

    def steps(rows: Rows, tokens: mx.array) -> mx.array:
        found.append(("step", len(rows)))
        return step(rows, tokens)

    def reads(engine: Engine, most: int) -> int:
        found.append(("read", read(engine, most)))
        return int(found[-1][1])

    monkeypatch.setattr(Rows, "step", steps)
    monkeypatch.setattr(Engine, "_read_layers", reads)
    return found


def test_answers_to_prompts_that_come_together_take_all_steps_together(engine: Engine, happened: list[Any]) -> None:
    with engine._changed:  # so that they do
        heard = [ask(engine, prompt(length, length), 10) for length in (9, 300, 130, 20)]
    assert [len(each.tokens()) for each in heard] == [10] * 4
    assert [rows for what, rows in happened if what == "step"] == [4] * 9


@pytest.mark.parametrize("drafted", [0, 7])
def test_first_tokens_come_as_each_prompt_is_read_and_are_the_same(
    model: Model, tiny_tokenizer: Tokenizer, happened: list[Any], drafted: int
) -> None:
    engine, lengths = made(model, tiny_tokenizer, drafted=drafted), (9, 300, 130, 20)
    sampler, heard = Sampler(0.8, top_p=0.9, frequency_penalty=0.2), [Heard() for _ in lengths]

    def tell(number: int, event: Event) -> None:
        happened.append((type(event).__name__, number))
        heard[number].events.put(event)

    for count in (10, 2, 1):
        happened.clear()
        with engine._changed:
            for number, length in enumerate(lengths):
                ids = tuple(prompt(length, length + count))  # none that has been read
                request = Request("tiny", ids, count, sampler, seed=number, top_logprobs=2)
                engine.submit(request, partial(tell, number))
        answers = [each.tokens() for each in heard]
        beginnings = [number for what, number in happened if what == "Generated"][:4]
        last_read = max(at for at, (what, _) in enumerate(happened) if what == "read")
        assert beginnings == [0, 1, 2, 3] and happened.index(("Generated", 1)) < last_read
        for number, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            drawn = alone(model, prompt(length, length + count), count, sampler, seed=number)
            assert len(answer) == count and answer[0].token == drawn[0].token
            options: dict[str, Any] = {"sampler": sampler, "seed": number, "top_logprobs": 2}
            assert ask(engine, prompt(length, length + count), count, **options).tokens() == answer
    engine.close(10)


def test_a_prompt_that_is_too_long_to_be_waited_for_is_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, happened: list[Any]
) -> None:
    monkeypatch.setattr(engine_module, "_GATHERED", 256)
    with engine._changed:
        short, long = ask(engine, prompt(9), 50), ask(engine, prompt(400), 2)
    assert len(short.tokens()) == 50 and len(long.tokens()) == 2
    assert happened[1] == ("step", 1)


@pytest.mark.parametrize(("running", "waiting", "layers"), [(6, 1, 1), (2, 1, 1), (1, 3, 3)])
def test_reading_takes_its_share_of_the_time(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch, happened: list[Any], running: int, waiting: int,
    layers: int,
) -> None:  # fmt: skip
    """Of a second, if a step takes one and whatever is read after it takes one too."""
    seconds = itertools.count()
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: float(next(seconds)))
    with engine._changed:
        heard = [ask(engine, prompt(9, i), 100) for i in range(running)]
    for each in heard:
        assert isinstance(each.events.get(timeout=30), PromptRead)
        each.events.get(timeout=30)  # which comes before the first step
    each.events.get(timeout=30)
    with engine._changed:
        late = [ask(engine, prompt(256, i), 1) for i in range(waiting)]
    assert all(len(each.tokens()) == 1 for each in late)
    between = [
        sum(work for what, work in part if what == "read")
        for taken, part in itertools.groupby(happened, lambda each: each[0] == "step")
        if not taken
    ]
    assert max(between[-3:]) == layers * 128 if layers == 1 else max(between) >= layers * 128


def test_text_stop_and_length(engine: Engine, model: Model, tiny_tokenizer: Tokenizer) -> None:
    whole = "".join(response.text for response in stream_generate(model, tiny_tokenizer, prompt(9), max_tokens=30))
    stop = whole[10:13]
    expected = list(stream_generate(model, tiny_tokenizer, prompt(9), max_tokens=30, stop=[stop]))
    heard = ask(engine, prompt(9), 30, stop=(stop,)).all()
    assert [(event.text, event.finish_reason) for event in heard[1:]] == [
        (response.text, response.finish_reason) for response in expected
    ]
    assert ask(engine, prompt(510), 30).all()[-1].finish_reason == "context"
    assert ask(engine, prompt(5), 1).all()[-1].finish_reason == "length"


def test_the_likeliest_tokens_are_reported(engine: Engine, model: Model) -> None:
    ids = prompt(140)
    scored = ask(engine, ids, 3, top_logprobs=4).tokens()
    text = [*ids, *(each.token for each in scored)]
    logits = model(mx.array([text]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for place, each in enumerate(scored, start=len(ids) - 1):
        best = sorted(enumerate(logprobs[place].tolist()), key=lambda pair: -pair[1])[:4]
        assert [token for token, _ in each.top] == [token for token, _ in best]
        assert [value for _, value in each.top] == pytest.approx([value for _, value in best], abs=1e-4)
    assert each.top[0] == (each.token, each.logprob)


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_the_prompts_own_tokens_are_scored(engine: Engine, model: Model, max_tokens: int) -> None:
    ids = prompt(300)
    ask(engine, ids, 1).all()
    heard = Heard()
    engine.submit(
        Request("tiny", tuple(ids), max_tokens, Sampler(), prompt_logprobs=True, top_logprobs=2), heard.events.put
    )
    read = heard.events.get(timeout=30)
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    logprobs = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()
    assert [each.token for each in read.scored] == ids and read.scored[0] == ScoredToken(ids[0], None)
    for place, each in enumerate(read.scored[1:]):
        assert each.logprob == pytest.approx(logprobs[place][each.token], abs=1e-4)
        assert each.top[0][1] == pytest.approx(max(logprobs[place]), abs=1e-4) and len(each.top) == 2
    if max_tokens:
        assert len(heard.tokens()) == max_tokens


def test_an_embedding_is_the_mean_of_the_last_hidden_states(engine: Engine, model: Model) -> None:
    heard = Heard()
    engine.embed("tiny", prompt(300), heard.events.put)
    (embedded,) = heard.all()
    expected = model.transformer(mx.array([prompt(300)]), None)[0].mean(axis=0)
    assert embedded.prompt_tokens == 300
    assert list(embedded.values) == pytest.approx(expected.tolist(), abs=1e-4)


def test_whoever_leaves_frees_the_row(engine: Engine, model: Model) -> None:
    heard = [ask(engine, prompt(500, i), 10_000) for i in range(20)]
    for each in heard:
        assert each.ticket is not None
        each.ticket.cancel()
    assert ask(engine, prompt(9), 5).tokens() == alone(model, prompt(9), 5)
    engine.close(30)  # a row goes, and is counted, after its last event
    figures = engine.statistics()
    assert (figures.rows, figures.queued, figures.reading, figures.reserved_bytes) == (0, 0, 0, 0)
    assert figures.cancelled + figures.finished == 21


def test_who_listens_no_more_is_as_one_who_leaves(engine: Engine, model: Model) -> None:
    def gone(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    engine.submit(Request("tiny", tuple(prompt(9)), 400, Sampler()), gone)
    assert ask(engine, prompt(9), 5).tokens() == alone(model, prompt(9), 5)
    engine.close(30)
    assert engine.statistics().rows == 0


def test_memory_bounds_what_runs_and_what_is_kept(model: Model, tiny_tokenizer: Tokenizer) -> None:
    weights = made(model).statistics().weight_bytes
    row = 256 * 2 * sum(model.config.num_kv_heads) * 16 * 4
    engine = made(model, tiny_tokenizer, max_memory=weights + 3 * row)
    heard = [ask(engine, prompt(150, i), 50) for i in range(5)]
    for i, each in enumerate(heard):
        assert each.tokens() == alone(model, prompt(150, i), 50)
        figures = engine.statistics()
        assert figures.weight_bytes + figures.reserved_bytes + figures.prefix_bytes <= figures.max_memory
    with pytest.raises(TooLarge, match="ask for fewer max_tokens"):
        made(model, max_memory=weights + row).submit(Request("tiny", tuple(prompt(200)), 57, Sampler()), print)
    engine.close(10)


def test_room_that_a_long_text_needed_goes_with_it(tiny_tokenizer: Tokenizer) -> None:
    config = tiny.scaled_config(tiny_tokenizer.vocab_size, max_context_length=8192, rope_max_length=16384)
    model = tiny.random_model(config)
    engine = made(model, tiny_tokenizer, prefix_bytes=0)
    endless: dict[str, Any] = {"sampler": Sampler(logit_bias={1: -100.0, 2: -100.0})}
    long = ask(engine, prompt(4000), 20, **endless)
    short = ask(engine, prompt(20), 400, **endless)
    assert isinstance(short.events.get(timeout=60), PromptRead)
    long.all()
    others = [ask(engine, prompt(20, i), 150, **endless) for i in range(1, 5)]
    for each in others:
        each.events.get(timeout=60)
    held = engine._batches["tiny"].rows.nbytes
    assert held <= 2 * engine.statistics().reserved_bytes
    single = made(model, tiny_tokenizer, prefix_bytes=0)
    for i, each in enumerate(others, start=1):
        assert each.tokens() == ask(single, prompt(20, i), 150, **endless).tokens()
    assert short.tokens() == ask(single, prompt(20), 400, **endless).tokens()
    for one in (engine, single):
        one.close(10)


def test_a_full_queue_is_said(model: Model) -> None:
    engine = made(model, max_rows=1, max_queue=2)
    ended: list[Heard] = []
    with pytest.raises(Busy, match="waiting already") as refused:
        ended.extend(ask(engine, prompt(9), 400) for _ in range(20))
    assert refused.value.retry_after >= 1
    engine.close(0)
    assert isinstance(ended[-1].all()[-1], Failed)


def test_closing_lets_answers_end(model: Model) -> None:
    engine = made(model)
    heard = [ask(engine, prompt(9, i), 50) for i in range(3)]
    engine.close(30)
    assert all(len(each.tokens()) == 50 for each in heard)
    with pytest.raises(Busy, match="stopping"):
        ask(engine, prompt(9))


def test_a_failure_ends_what_it_concerns(engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("[malloc] Unable to allocate")

    with monkeypatch.context() as patch:
        patch.setattr("elm_mlx.inference.rows.Rows.step", fail)
        (*_, failed) = ask(engine, prompt(9), 5).all()
    assert isinstance(failed, Failed) and "Unable to allocate" in str(failed.error)
    assert ask(engine, prompt(9), 5).tokens() == alone(model, prompt(9), 5)
    with monkeypatch.context() as patch:
        patch.setattr(Model, "head", fail)
        (failed,) = ask(engine, prompt(9), 5).all()
    assert isinstance(failed, Failed)
    assert ask(engine, prompt(9), 5).tokens() == alone(model, prompt(9), 5)


def test_what_cannot_be_is_refused_at_once(engine: Engine) -> None:
    for ids, options, message in (
        ([], {}, "the prompt is empty"),
        ([1, 320], {}, "token id 320"),
        ([1] * 600, {}, "600 tokens, .* context is 512"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1], {"stop": ("",)}, "a stop string is empty"),
        ([1], {"seed": -1}, "seed is -1"),
        ([1], {"model": "gpt"}, "no model 'gpt'; there are tiny"),
    ):
        with pytest.raises(InputError, match=message):
            ask(engine, ids, **options)  # type: ignore[arg-type]


def test_a_model_of_damaged_weights_fails_the_request_and_not_the_engine(tiny_tokenizer: Tokenizer) -> None:
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size))
    model.transformer.norm.weight = mx.full(model.transformer.norm.weight.shape, mx.nan)
    engine = made(model)
    for _ in range(2):
        events = ask(engine, prompt(9), 5).all()
        assert isinstance(events[-1], Failed) and "the model computes NaN" in str(events[-1].error)
    engine.close(10)


def test_penalties_and_biases_are_as_of_a_sampler_alone(engine: Engine, model: Model) -> None:
    samplers = [
        Sampler(presence_penalty=1.5), Sampler(1.0, frequency_penalty=0.7, presence_penalty=-0.3),
        Sampler(logit_bias={5: 3.0, 9: -100.0}), Sampler(0.7, top_p=0.8, logit_bias={7: 2.0}, repetition_penalty=1.1),
    ]  # fmt: skip
    heard = [ask(engine, prompt(9, i), 30, sampler=sampler, seed=i) for i, sampler in enumerate(samplers)]
    for i, (sampler, each) in enumerate(zip(samplers, heard, strict=True)):
        caches = make_prompt_cache(model)
        drawn = decode(
            model, caches, sampler, prefill(model, prompt(9, i), caches), sampler.start([prompt(9, i)], i), 30
        )
        assert [(scored.token, scored.logprob) for scored in each.tokens()] == list(drawn)
    with pytest.raises(InputError, match="logit_bias names token 320, outside the vocabulary of 320"):
        ask(engine, prompt(9), sampler=Sampler(logit_bias={320: 1.0}))


def test_a_grammar_holds_an_answer_among_others(engine: Engine, tiny_tokenizer: Tokenizer, model: Model) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "array", "items": {"enum": ["the", "fox"]}, "maxItems": 3, "minItems": 3}
    grammar = GrammarCompiler(tiny_tokenizer, (318,)).json_schema(schema)
    held = [ask(engine, prompt(5, i), 100, sampler=Sampler(1.0), seed=i, grammar=grammar) for i in range(3)]
    free = ask(engine, prompt(9), 30)
    for each in held:
        events = each.all()
        assert events[-1].finish_reason == "stop"
        assert set(json.loads("".join(event.text for event in events[1:]))) <= {"the", "fox"}
    assert free.tokens() == alone(model, prompt(9), 30)


def test_one_who_leaves_amid_a_prompt_is_forgotten_and_the_others_go_on(engine: Engine, model: Model) -> None:
    going = ask(engine, prompt(9), 400)
    for i in range(8):
        left = ask(engine, prompt(500, i), 10)
        time.sleep(0.003 * i)
        assert left.ticket is not None
        left.ticket.cancel()
        count = left.events.qsize()
        assert left.events.qsize() == count  # no event follows
    assert going.tokens() == alone(model, prompt(9), 400)
    engine.close(30)
    assert engine.statistics().reserved_bytes == 0


def test_an_answer_whose_last_token_was_chosen_fails_with_the_others(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after it, which it is no part of any more, fails."""
    real, steps = Rows.step, []

    def fail_later(rows: Rows, tokens: mx.array) -> mx.array:
        steps.append(len(rows))
        if len(rows) == 1 and 2 in steps:
            raise RuntimeError("[malloc] Unable to allocate")
        return real(rows, tokens)

    monkeypatch.setattr(Rows, "step", fail_later)
    heard = [ask(engine, prompt(9, 1), 300), ask(engine, prompt(9, 2), 30)]
    for each in heard:
        last = each.all()[-1]
        assert isinstance(last, Failed) and "Unable to allocate" in str(last.error)
    monkeypatch.undo()
    assert ask(engine, prompt(9), 5).tokens() == alone(model, prompt(9), 5)


def test_the_second_turn_of_a_network_with_states_reads_what_is_new(family_dirs: dict[str, Path]) -> None:
    model = load_model(family_dirs["mamba"])
    engine = made(model)
    first = [token % model.config.vocab_size for token in prompt(200)]
    answer = [scored.token for scored in ask(engine, first, 100).tokens()]
    longer = [*first, *answer, 7, 8, 9]
    events = ask(engine, longer, 10).all()
    assert events[0].cached_tokens == len(longer) // 128 * 128
    assert [event.scored.token for event in events[1:]] == [scored.token for scored in alone(model, longer, 10)]
    engine.close(10)


def test_an_engine_that_works_is_without_trouble_and_one_that_is_stuck_is_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, entered = threading.Event(), threading.Event()

    def stick(self: Engine) -> None:
        entered.set()
        held.wait(20)

    ask(engine, [1, 5, 6], 3).all()
    assert engine.trouble() is None
    monkeypatch.setattr(engine_module, "_STUCK_SECONDS", 0.05)
    monkeypatch.setattr(Engine, "_forget_cancelled", stick)
    heard = ask(engine, [1, 5, 6], 3)
    assert entered.wait(20)
    time.sleep(0.1)
    assert "one step" in str(engine.trouble())
    monkeypatch.undo()
    held.set()
    heard.all()
    assert engine.trouble() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_has_ended(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(self: Engine) -> None:
        raise SystemExit("of native code")

    monkeypatch.setattr(Engine, "_round", panic)
    (last,) = ask(engine, [1, 5, 6], 3).all()
    assert isinstance(last, Failed) and "has ended" in str(last.error)
    engine._thread.join(20)
    assert engine.trouble() == "the engine's thread has ended"
    with pytest.raises(Busy):
        ask(engine, [1, 5, 6], 3)


@pytest.mark.parametrize(("bits", "drafted"), [(8, 0), (4, 0), (8, 7)])
def test_answers_with_keys_in_few_bits_are_generates(tiny_tokenizer: Tokenizer, bits: int, drafted: int) -> None:
    """Alone and together, from the prefix tree and with guesses too; and they count for the bytes that they take."""
    model = tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size, head_dim=64, eos_token_id=(318,)), seed=2)
    engine = made(model, tiny_tokenizer, kv_bits=bits, drafted=drafted)
    whole = made(model, tiny_tokenizer)
    try:
        for _ in range(2):
            asked = [prompt(length, length) for length in (5, 129, 300, 7)]
            heard = [ask(engine, ids) for ids in asked]
            for ids, each in zip(asked, heard, strict=True):
                expected = alone(model, ids, prompt_cache=make_prompt_cache(model, bits))
                assert each.tokens() == expected
        assert engine.statistics().cached_tokens == 128 + 256
        repeated = [1, 9, 30, 41, 7, 12] * 8
        expected = alone(model, repeated, 60, prompt_cache=make_prompt_cache(model, bits))
        assert ask(engine, repeated, 60).tokens() == expected
        ratio = engine._batches["tiny"].bytes_of([200]) / whole._batches["tiny"].bytes_of([200])
        assert ratio == pytest.approx((64 * bits / 8 + 8) / 256, rel=0.01)
    finally:
        engine.close(10)
        whole.close(10)
