"""What an engine is asked and what it reports: requests, their events, and a request on its way through it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from elm_mlx.errors import ElmError
from elm_mlx.inference.drafts import DraftSource
from elm_mlx.inference.generation import TextStream
from elm_mlx.inference.grammar import Grammar, GrammarState
from elm_mlx.inference.prefix_tree import BLOCK, Layers
from elm_mlx.inference.sampling import Sampler, State
from elm_mlx.model.cache import KVCache

GREEDY = Sampler()


class Busy(ElmError):
    """The queue is full, or the engine is closing; after `retry_after` seconds it is worth another try."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLarge(ElmError):
    """The request would not fit the memory even alone."""


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
class ScoredToken:
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
    scored: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class Generated:
    """A token of the answer.

    Attributes:
        text: what is final with this token; may be empty, or flush what earlier tokens held back.
        finish_reason: None but for the last: "stop" (EOS, a stop id or a stop string), "length" (`max_tokens`) or
            "context" (the model's context is full).
    """

    text: str
    scored: ScoredToken
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
    """The engine's figures: requests and tokens, at this moment and so far.

    Attributes:
        rows: answers that are being decoded.
        reading: prompts that are being read: 0 or 1.
        queued: requests that wait.
        weight_bytes, reserved_bytes, prefix_bytes, max_memory: of the models, of the caches of running requests at
            their longest, of the prefix tree, and what all of them may take together.
        read_tokens, cached_tokens, generated_tokens: of prompts, those that were computed and those that were found
            in the prefix tree, and of answers, since the start.
        drafted_tokens, accepted_tokens: those that were guessed and verified, and those of them that were right, since
            the start.
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
    drafted_tokens: int
    accepted_tokens: int
    finished: int
    cancelled: int
    failed: int
    refused: int


class Ticket:
    """A request that was handed in."""

    def __init__(self, task: OpenRequest, wake: Callable[[], None]) -> None:
        self._task, self._wake = task, wake

    def cancel(self) -> None:
        """Ends the request, from any thread, at any time. No event follows; what it held is free after the step or
        piece of a prompt that is running now."""
        self._task.cancel()
        self._wake()


class OpenRequest:
    """A request on its way through the engine.

    Attributes:
        ids: the prompt, and what has been generated so far.
        most: tokens that may be generated.
        own: caches of the auxiliary model that predicts what the prompt leaves in `caches`; none without one.
        snapshots: the states of a network without keys after each block of the prompt.
        drafts: guesses how `ids` go on; None where nothing is guessed.
        first: what was chosen after the prompt, where it was reported before the first step; the last of `ids` is it,
            until that step.
    """

    def __init__(
        self,
        request: Request,
        on_event: Callable[[Any], None],
        stream: TextStream,
        most: int,
        embedding: bool = False,
    ) -> None:
        self.request = request
        self.embedding = embedding
        self.ids = list(request.ids)
        self.most = most
        self.stream = stream
        self.cached = 0
        self.started = time.monotonic()
        self.caches: list[KVCache] = []
        self.own: list[KVCache] = []
        self.snapshots: dict[int, Layers] = {}
        self.scored: list[ScoredToken] = []
        self.piece = 0  # tokens of the prompt that are being read
        self.hidden: mx.array | None = None  # of these, or of the last of them
        self.unread: list[Any] | None = None  # what its layers leave in the caches, of those that are not computed yet
        self.sum: mx.array | None = None  # of hidden states, for an embedding
        self.state = State()
        self.grammar: GrammarState | None = None
        self.bias: mx.array | None = None
        self.drafts: DraftSource | None = None
        self.first: tuple[mx.array, mx.array] | None = None
        self.over = False
        self._on_event = on_event
        self._lock = threading.RLock()

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.ids)

    @property
    def left(self) -> int:
        """Tokens that may still be generated, with the one that the next step is fed."""
        return self.prompt_tokens + self.most - len(self.ids) + (self.first is not None)

    def cancel(self) -> None:
        with self._lock:
            self.over = True

    def emit(self, event: Event | Embedded) -> None:
        """Reports an event, unless the request is over."""
        with self._lock:
            if not self.over:
                try:
                    self._on_event(event)
                except Exception:  # whoever listened is gone
                    self.over = True

    def keep_state(self, caches: Sequence[KVCache], row: int, length: int) -> None:
        """Keeps the state of `row` where a block ends with its `length`."""
        if length and length % BLOCK == 0:
            self.snapshots[length - BLOCK] = [cache.block(row, length - BLOCK, length) for cache in caches]

    def chooses_as(self, other: OpenRequest) -> bool:
        """Returns whether one call of a sampler can choose the next token of both."""
        return (
            self.first is other.first is None
            and self.request.sampler == other.request.sampler
            and (self.bias is None) == (other.bias is None)
            and (self.state.counts is None) == (other.state.counts is None)
        )
