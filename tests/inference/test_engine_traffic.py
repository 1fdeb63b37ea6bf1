"""Requests of every kind at random times, to every kind of network: each answer is the one that `generate` gives."""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_cases
import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from mlx.utils import tree_flatten

from elm_mlx import blas
from elm_mlx.inference.engine import Engine
from elm_mlx.inference.generation import stream_generate
from elm_mlx.inference.requests import Failed, Generated, PromptRead, Request, Ticket
from elm_mlx.inference.sampling import Sampler
from elm_mlx.model.network import Model
from elm_mlx.store import adapters, loading
from elm_mlx.store.loading import Loaded

PLENTY = 1 << 34
SAMPLERS = [
    Sampler(), Sampler(), Sampler(1.0), Sampler(0.8, top_p=0.9), Sampler(1.0, top_k=10, repetition_penalty=1.2),
    Sampler(repetition_penalty=1.4), Sampler(0.5, min_p=0.1),
]  # fmt: skip
LENGTHS = [1, 5, 7, 60, 127, 128, 129, 190, 199, 200, 201, 257, 300, 380]  # of prompts
to_the_bit = blas.OWN_FEW_ROWS in blas.status().name


def openelm(path: Path) -> Model:
    return tiny.random_model(tiny.scaled_config(64, eos_token_id=(2, 3)), seed=2)


def quantized(path: Path) -> Model:
    model = tiny.random_model(tiny.scaled_config(64, ffn_dim_divisor=32), seed=2)
    nn.quantize(model, group_size=32, bits=4)
    return model


def family(name: str) -> Callable[[Path], Model]:
    """A case whose contexts are long enough for several pieces of a prompt; LongRoPE changes at 200 tokens."""

    def load(path: Path) -> Model:
        family_cases.write(path / "model", name)
        values = json.loads((path / "model" / "config.json").read_text()) | {"max_position_embeddings": 600}
        if "original_max_position_embeddings" in values:
            values["original_max_position_embeddings"] = 200
        (path / "model" / "config.json").write_text(json.dumps(values))
        return loading.load_model(path / "model")

    return load


KINDS = {
    "openelm": openelm,
    "quantized": quantized,
    **{name: family(name) for name in ("llama", "phi3, longrope, partial, tied", "olmo3", "mamba")},
}


def drawn(draw: random.Random, model: str, texts: list[list[int]]) -> Request:
    """A request that begins as others do, or not."""
    length = draw.choice(LENGTHS)
    begin = draw.choice(texts)[: draw.choice([0, length // 2, length])]
    ids = (begin + [draw.randrange(64) for _ in range(length)])[:length]
    sampler = draw.choice(SAMPLERS)
    return Request(
        model, tuple(ids), draw.choice([1, 2, 5, 20, 60]), sampler, draw.randrange(99) if sampler.temp else None,
        stop_ids=(7,), top_logprobs=draw.choice([0, 0, 3]),
    )  # fmt: skip


def heard(events: queue.Queue[Any]) -> list[Any]:
    found = []
    while True:
        found.append(events.get(timeout=100))
        assert not isinstance(found[-1], Failed), found[-1].error
        if isinstance(found[-1], Generated) and found[-1].finish_reason:
            return found


def assert_as_alone(model: Model, request: Request, events: list[Any]) -> None:
    sampler = request.sampler
    alone = list(stream_generate(
        model, None, request.ids, max_tokens=request.max_tokens, temp=sampler.temp, top_p=sampler.top_p,
        top_k=sampler.top_k, min_p=sampler.min_p, repetition_penalty=sampler.repetition_penalty, seed=request.seed,
        stop_ids=request.stop_ids,
    ))  # fmt: skip
    assert isinstance(events[0], PromptRead) and events[0].prompt_tokens == len(request.ids)
    assert [event.scored.token for event in events[1:]] == [response.token for response in alone]
    assert [event.finish_reason for event in events[1:]] == [response.finish_reason for response in alone]
    logprobs = [response.logprob for response in alone]
    exact = logprobs if to_the_bit else pytest.approx(logprobs, abs=1e-3)
    assert [event.scored.logprob for event in events[1:]] == exact
    assert all(len(event.scored.top) == request.top_logprobs for event in events[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_generates(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind](tmp_path)
    draw = random.Random(kind)
    engine = Engine({"one": Loaded(model, None, "", ())}, max_memory=PLENTY, max_rows=16, prefix_bytes=1 << 22)
    texts = [[draw.randrange(64) for _ in range(400)] for _ in range(2)]
    asked: list[tuple[Request, queue.Queue[Any]]] = []
    for number in range(24):
        request, events = drawn(draw, "one", texts), queue.Queue[Any]()
        if number % 12 == 0:
            request = replace(request, ids=(*texts[0][:190], number))
        ticket = engine.submit(request, events.put)
        if draw.random() < 0.15:
            time.sleep(draw.random() * 0.02)
            ticket.cancel()
        else:
            asked.append((request, events))
        if draw.random() < 0.3:
            time.sleep(draw.random() * 0.05)
    found = [(request, heard(events)) for request, events in asked]
    assert sum(events[0].cached_tokens for _, events in found) > 0
    engine.close(30)  # a row goes, and is counted, after its last event
    figures = engine.statistics()
    assert (figures.rows, figures.reading, figures.queued, figures.reserved_bytes, figures.failed) == (0, 0, 0, 0, 0)
    for request, events in found:
        assert_as_alone(model, request, events)


def test_models_and_adapters_run_in_turns(tmp_path: Path) -> None:
    config = tiny.scaled_config(64, eos_token_id=(2,))
    base, adapted, other = tiny.random_model(config, seed=2), Model(config), tiny.random_model(config, seed=3)
    adapted.update(base.parameters())
    alone = Engine({"base": Loaded(base, None, "", ())}, max_memory=PLENTY, prefix_bytes=0)
    weights = alone.statistics().weight_bytes
    alone.close(5)
    adapters.attach(adapted, adapters.plan(config, rank=4))
    for name, value in tree_flatten(adapted.trainable_parameters()):
        if name.endswith("lora_b"):
            adapted.load_weights([(name, mx.random.normal(value.shape, key=mx.random.key(1)))], strict=False)
    models = {"base": base, "adapter": adapted, "other": other}
    engine = Engine(
        {name: Loaded(model, None, "", ()) for name, model in models.items()}, max_memory=PLENTY, prefix_bytes=1 << 22
    )
    shared = engine.statistics().weight_bytes - 2 * weights
    assert 0 < shared < weights / 2  # the adapter costs itself alone
    draw = random.Random(1)
    text = [draw.randrange(64) for _ in range(400)]
    asked = []
    for number in range(15):
        request, events = drawn(draw, list(models)[number % 3], [text]), queue.Queue[Any]()
        engine.submit(request, events.put)
        asked.append((request, events))
    found = [(request, heard(events)) for request, events in asked]
    engine.close(30)
    for request, events in found:
        assert_as_alone(models[request.model], request, events)
    said = {name: [e.scored.token for r, es in found for e in es[1:] if r.model == name] for name in models}
    assert len({tuple(tokens[:20]) for tokens in said.values()}) == 3


def test_nothing_grows_over_two_thousand_requests() -> None:
    model = openelm(Path())
    budget = 1 << 18
    engine = Engine({"one": Loaded(model, None, "", ())}, max_memory=1 << 30, max_rows=6, prefix_bytes=budget)
    draw = random.Random(0)
    running: list[tuple[Ticket, queue.Queue[Any]]] = []
    memory: list[int] = []
    for number in range(2000):
        length = draw.choice([1, 3, 20]) if number % 40 else 200
        ids = tuple(draw.randrange(64) for _ in range(length))
        events: queue.Queue[Any] = queue.Queue()
        sampler = Sampler(1.0) if number % 9 == 0 else Sampler()
        ticket = engine.submit(Request("one", ids, draw.choice([1, 2, 4]), sampler), events.put)
        if number % 7 == 0:
            ticket.cancel()
        else:
            running.append((ticket, events))
        while len(running) > 12:
            heard(running.pop(0)[1])
        if number % 500 == 499:
            while running:
                heard(running.pop(0)[1])
            memory.append(mx.get_active_memory())
            assert engine.statistics().prefix_bytes <= budget
    before = threading.active_count()
    engine.close(10)
    assert threading.active_count() == before - 1
    figures = engine.statistics()
    assert figures.finished + figures.cancelled == 2000 and figures.cancelled > 100
    assert (figures.rows, figures.reading, figures.queued, figures.reserved_bytes) == (0, 0, 0, 0)
    assert max(memory) - memory[0] < 1 << 20


def test_several_llamas_answers_are_mlx_lms(family_dirs: dict[str, Path]) -> None:
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    theirs, values = load_model(family_dirs["llama"])
    engine = Engine({"one": loading.open_model(family_dirs["llama"])}, max_memory=PLENTY, prefix_bytes=1 << 22)
    draw = random.Random(5)
    texts = [[draw.randrange(values["vocab_size"]) for _ in range(length)] for length in (3, 200, 40, 130)]
    asked: list[queue.Queue[Any]] = [queue.Queue() for _ in texts]
    for ids, events in zip(texts, asked, strict=True):
        engine.submit(Request("one", tuple(ids), 12, Sampler()), events.put)
    for ids, events in zip(texts, asked, strict=True):
        found = heard(events)
        said = [token for token, _ in generate_step(mx.array(ids), theirs, max_tokens=12)]
        assert [event.scored.token for event in found[1:]] == said[: len(found) - 1]
        text = mx.array([[*ids, *said]])
        logits = theirs(text)[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for place, event in enumerate(found[1:], start=len(ids) - 1):
            assert event.scored.logprob == pytest.approx(logprobs[place, event.scored.token].item(), abs=1e-4)
    engine.close(10)
