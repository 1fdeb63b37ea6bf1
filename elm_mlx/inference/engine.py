"""The engine of a server: one thread that owns MLX, and computes requests of several clients together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from elm_mlx.errors import ElmError
from elm_mlx.inference.sampling import Sampler
from elm_mlx.store.loading import Loaded


class Busy(ElmError):
    """The queue is full, or the engine is closing; after `retry_after` seconds it is worth another try."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLarge(ElmError):
    """The request would not fit the memory even alone."""


class GrammarState(Protocol):
    """Where one answer is in its grammar.

    Attributes:
        finished: the answer is whole: only a token that ends it may follow.
    """

    @property
    def finished(self) -> bool: ...

    def bias(self) -> mx.array:
        """Returns `(vocab_size,)` float32, to be added to the next token's logits: 0 where allowed, else -inf."""

    def accept(self, token: int) -> None:
        """Moves on by a token."""


class Grammar(Protocol):
    """What an answer must look like. One may serve many requests."""

    def start(self) -> GrammarState:
        """Returns the state before an answer's first token."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        model: one of the names that the engine was given.
        ids: the prompt.
        max_tokens: at most so many; fewer where the context ends. 0 for the prompt's log-probabilities alone.
        sampler: all settings of sampling, without `choose` and `processors`.
        seed: the same one gives the same tokens as `generate`; None draws one.
        stop: strings that end the text, and are no part of it.
        stop_ids: tokens that end it beside EOS.
        top_logprobs: so many of the likeliest tokens are reported with each token.
        prompt_logprobs: report how likely the prompt's own tokens are.
        grammar: what the answer must look like; None for any text.
    """

    model: str
    ids: tuple[int, ...]
    max_tokens: int
    sampler: Sampler
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Scored:
    """A token and how likely the model found it.

    Attributes:
        logprob: natural logarithm of the model's own probability, before temperature and filters; None for a prompt's
            first token, which nothing comes before.
        top: the likeliest tokens at its place and their log-probabilities, likeliest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptRead:
    """The first event: the prompt is read, of which `cached_tokens` were in the prefix tree.

    `scored` are the prompt's tokens, where the request asks for them. It is the only event when `max_tokens` is 0.
    """

    prompt_tokens: int
    cached_tokens: int
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Generated:
    """A token of the answer.

    Attributes:
        text: what is final with this token; may be empty, or flush what earlier tokens held back.
        finish_reason: None but for the last: "stop" (EOS, a stop id or a stop string), "length" (`max_tokens`) or
            "context" (the model's context is full).
    """

    text: str
    scored: Scored
    finish_reason: str | None


@dataclass(frozen=True)
class Embedded:
    """The mean of the last hidden states over all positions, in float32; the only event of `Engine.embed`."""

    values: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be computed."""

    error: Exception


Event = PromptRead | Generated | Failed  # the last one is a Generated with a finish_reason, or as their docstrings say


@dataclass(frozen=True)
class EngineStatistics:
    """What the engine is doing and has done.

    Attributes:
        rows: answers that are being decoded.
        reading: prompts that are being read: 0 or 1.
        queued: requests that wait.
        weight_bytes, reserved_bytes, prefix_bytes, max_memory: of the models, of the caches of running requests at
            their longest, of the prefix tree, and what all of them may take together.
        read_tokens, cached_tokens, generated_tokens: of prompts, those that were computed and those that were found
            in the prefix tree, and of answers, since the start.
        finished, cancelled, failed, refused: requests since the start; those `refused` had no place in the queue.
    """

    rows: int
    reading: int
    queued: int
    weight_bytes: int
    reserved_bytes: int
    prefix_bytes: int
    max_memory: int
    read_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: int
    cancelled: int
    failed: int
    refused: int


class Ticket:
    """A request that was handed in."""

    def cancel(self) -> None:
        """Ends the request, from any thread, at any time. No event follows; what it held is free after the step or
        piece of a prompt that is running now."""
        raise NotImplementedError


class Engine:
    """Computes requests in a thread of its own, which alone uses MLX, together where it can.

    Args:
        models: by the names that requests use.
        max_memory: bytes that weights, caches of running requests and prefix tree may take together.
        max_rows: answers that are decoded at once.
        max_queue: requests that may wait beside those that run.
        prefix_bytes: of the prefix tree at most.
    """

    def __init__(
        self,
        models: Mapping[str, Loaded],
        *,
        max_memory: int,
        max_rows: int = 16,
        max_queue: int = 64,
        prefix_bytes: int,
    ) -> None:
        raise NotImplementedError

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Hands in a request, from any thread. `on_event` is called in the engine's thread, and must not block.

        Raises:
            InputError: the prompt is empty, too long for the context or outside the vocabulary; a setting is out of
                range.
            Busy: too many requests wait, or the engine is closing.
            TooLarge: it would not fit `max_memory` even alone.
        """
        raise NotImplementedError

    def embed(self, model: str, ids: Sequence[int], on_event: Callable[[Embedded | Failed], None]) -> Ticket:
        """Hands in a text whose embedding is wanted. As `submit` otherwise."""
        raise NotImplementedError

    def statistics(self) -> EngineStatistics:
        """Returns the figures of this moment, from any thread."""
        raise NotImplementedError

    def close(self, timeout: float) -> None:
        """Refuses new requests, gives those that run or wait `timeout` seconds, ends the others, stops the thread."""
        raise NotImplementedError
