"""Whatever comes together in the engine, every answer is the one that `generate` gives alone."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny

from elm_mlx.inference.engine import (
    Busy, Embedded, Engine, Event, Failed, Generated, PromptRead, Request, Scored, Ticket, TooLarge,
)  # fmt: skip
from elm_mlx.inference.generation import stream_generate
from elm_mlx.inference.sampling import Sampler
from elm_mlx.model.network import Model
from elm_mlx.store.loading import Loaded
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

    def tokens(self) -> list[Scored]:
        heard = self.all()
        assert not isinstance(heard[-1], Failed), heard[-1].error
        return [event.scored for event in heard if isinstance(event, Generated)]


def ask(engine: Engine, ids: Sequence[int], max_tokens: int = 20, model: str = "tiny", **options: Any) -> Heard:
    heard = Heard()
    sampler = options.pop("sampler", Sampler())
    request = Request(model, tuple(ids), max_tokens, sampler, **options)
    heard.ticket = engine.submit(request, heard.events.put)
    return heard


def alone(model: Model, ids: Sequence[int], max_tokens: int = 20, sampler: Sampler | None = None, **options: Any) -> Any:
    settings = {} if sampler is None else {
        name: getattr(sampler, name) for name in ("temp", "top_p", "top_k", "min_p", "repetition_penalty")
    }  # fmt: skip
    found = stream_generate(model, None, ids, max_tokens=max_tokens, **settings, **options)
    return [Scored(response.token, response.logprob) for response in found]


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Model:
    return tiny.random_model(tiny.scaled_config(tiny_tokenizer.vocab_size), seed=2)


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


def test_six_answers_together_have_the_bits_of_each_alone(engine: Engine, model: Model) -> None:
    lengths = (3, 130, 17, 300, 250, 64)
    heard = [ask(engine, prompt(length, length), 40) for length in lengths]
    for length, each in zip(lengths, heard, strict=True):
        assert each.tokens() == alone(model, prompt(length, length), 40)
