"""The engine of a server: one thread that owns MLX, and computes requests of several clients together."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.generation import TextStream, checked, encode_prompt
from elm_mlx.inference.grammar import Grammar, GrammarState
from elm_mlx.inference.prefix_tree import BLOCK, Layers, PrefixTree
from elm_mlx.inference.rows import PREFILL_STEP, Rows
from elm_mlx.inference.sampling import Sampler, State
from elm_mlx.model import ops
from elm_mlx.model.cache import KVCache, make_prompt_cache, row_capacity, row_slots
from elm_mlx.model.network import Model
from elm_mlx.reading import check_seed
from elm_mlx.store.loading import Loaded

_GREEDY = Sampler()
_PARTS = 4  # of a piece of a prompt, for one between two steps; the whole piece, where as many prompts wait
_HEAD_VALUES = 1 << 24  # logits of a prompt that are computed at once


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

    def __init__(self, task: _Task, wake: Callable[[], None]) -> None:
        self._task, self._wake = task, wake

    def cancel(self) -> None:
        """Ends the request, from any thread, at any time. No event follows; what it held is free after the step or
        piece of a prompt that is running now."""
        self._task.cancel()
        self._wake()


class _Task:
    """A request on its way through the engine.

    Attributes:
        ids: the prompt, and what has been generated so far.
        most: tokens that may be generated.
        snapshots: the states of a network without keys after each block of the prompt.
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
        self.snapshots: dict[int, Layers] = {}
        self.scored: list[ScoredToken] = []
        self.hidden: mx.array | None = None  # of the piece of the prompt that is being read
        self.unread: list[Any] | None = None  # what its layers leave in the caches, of those that are not computed yet
        self.sum: mx.array | None = None  # of hidden states, for an embedding
        self.state = State()
        self.grammar: GrammarState | None = None
        self.bias: mx.array | None = None
        self.over = False
        self._on_event = on_event
        self._lock = threading.RLock()

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.ids)

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.prompt_tokens + self.most - len(self.ids)

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

    def plain(self) -> bool:
        """Returns whether the likeliest token is always the next."""
        return self.request.sampler == _GREEDY and self.grammar is None


class _Batch:
    """The answers of one model that are being decoded, and the step that they share.

    Attributes:
        answers: in the order of `rows`.
        logits: `(rows, vocab_size)`, of each answer's next token.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.model: Model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.rows = Rows(loaded.model)
        self.answers: list[_Task] = []
        self.logits: mx.array | None = None
        self._chosen: tuple[list[_Task], mx.array, mx.array, dict[int, tuple[mx.array, mx.array]]] | None = None
        probe = make_prompt_cache(loaded.model)
        mx.eval(loaded.model.transformer(mx.array([[0]]), probe), [cache.state for cache in probe])
        per_row = sum(cache.nbytes for cache in probe)
        self._position_bytes, self._state_bytes = (
            (per_row // probe[0].capacity, 0) if probe[0].is_trimmable() else (0, per_row)
        )

    def bytes_of(self, lengths: Sequence[int]) -> int:
        """Returns what the caches of rows take that grow to `lengths`."""
        if not lengths:
            return 0
        slots, capacity = row_slots(len(lengths)), row_capacity(max(lengths))
        states = sum(1 + length // BLOCK for length in lengths)  # those after each block are kept for the prefix tree
        return slots * capacity * self._position_bytes + states * self._state_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the prefix tree."""
        return BLOCK * self._position_bytes + self._state_bytes

    @property
    def keeps_states(self) -> bool:
        """Returns whether the network keeps states in place of keys and values."""
        return self._state_bytes > 0

    def name(self, length: int) -> tuple[int, bool]:
        """Returns what texts of `length` have in common: this model, and how it rotates them."""
        switch = self.model.config.rope_switch
        return id(self), switch is not None and length > switch

    def lengths(self) -> list[int]:
        """Returns how long each text may become."""
        return [answer.prompt_tokens + answer.most for answer in self.answers]

    def join(self, task: _Task, logits: mx.array) -> None:
        """Adds a row: the prompt of `task` is in its caches, and `logits` `(1, vocab_size)` follow it."""
        self.rows.join(task.caches, task.ids)
        task.caches = []
        self.answers.append(task)
        self.logits = logits if self.logits is None else mx.concatenate([self.logits, logits])

    def launch(self, leaving: Callable[[_Task, int], None]) -> None:
        """Chooses every row's next token, and computes the logits after it, without waiting.

        `leaving` is called for the rows whose last token this is, before they are removed.
        """
        tokens, logprobs, tops = self._choose()
        mx.async_eval(tokens, logprobs, tops)
        self._chosen = (list(self.answers), tokens, logprobs, tops)
        kept = self.remove([row for row, answer in enumerate(self.answers) if answer.left == 1], leaving)
        if self.answers:
            fed = tokens if len(kept) == tokens.size else tokens[mx.array(kept)]
            self.logits = self.rows.step(fed)
            if self.keeps_states:
                for row, (answer, length) in enumerate(zip(self.answers, self.rows.lengths, strict=True)):
                    answer.keep_state(self.rows.caches, row, length)
            # Snapshots too, or they would hold on to what they are cut from.
            snapshots = [answer.snapshots for answer in self.answers]
            mx.async_eval(self.logits, [cache.state for cache in self.rows.caches], snapshots)

    def deliver(self) -> tuple[int, list[_Task]]:
        """Reports the tokens that `launch` chose, while what it launched is running. Returns their number, and
        the answers that end."""
        assert self._chosen is not None
        answers, tokens, logprobs, tops = self._chosen
        ended: list[_Task] = []
        for row, (answer, token, logprob) in enumerate(zip(answers, tokens.tolist(), logprobs.tolist(), strict=True)):
            if answer.over:
                continue
            try:
                likeliest = _pairs(*(array.tolist() for array in tops[row])) if row in tops else ()
                finished = _deliver(answer, ScoredToken(token, checked(logprob), likeliest))
            except Exception as error:
                answer.emit(Failed(error))
                finished = True
                answer.ids = []  # nothing of it is worth keeping
            if finished:
                answer.over = True
                ended.append(answer)
        self._chosen = None
        return len(answers), ended

    def remove(self, rows: Sequence[int], leaving: Callable[[_Task, int], None]) -> list[int]:
        """Removes rows. Returns the former places of those that are left, in their order now."""
        order = list(range(len(self.answers)))
        for row in sorted(rows, reverse=True):
            leaving(self.answers[row], row)
            self.rows.leave(row)
            for places in (order, self.answers):
                places[row] = places[-1]  # type: ignore[assignment]
                places.pop()
        if not order:
            self.logits = None
        elif rows and self.logits is not None:
            self.logits = self.logits[mx.array(order)]
        return order

    def reset(self) -> list[_Task]:
        """Empties the batch, whatever state it is in. Returns the answers that were in it, or wait for a last token."""
        chosen = [] if self._chosen is None else self._chosen[0]
        answers = [*self.answers, *(answer for answer in chosen if answer not in self.answers)]
        self.answers, self.rows, self.logits, self._chosen = [], Rows(self.model), None, None
        return answers

    def _choose(self) -> tuple[mx.array, mx.array, dict[int, tuple[mx.array, mx.array]]]:
        """Returns tokens and log-probabilities `(rows,)`, and by row the likeliest tokens and theirs, where wanted."""
        assert self.logits is not None
        logits = self.logits.astype(mx.float32)
        tops = {
            row: _likeliest(logits[row], answer.request.top_logprobs)
            for row, answer in enumerate(self.answers)
            if answer.request.top_logprobs
        }
        plain = [row for row, answer in enumerate(self.answers) if answer.plain()]
        if len(plain) == len(self.answers):
            return *_GREEDY(logits, State())[:2], tops
        order, parts = list(plain), []
        if plain:
            parts.append(_GREEDY(logits[mx.array(plain)], State())[:2])
        for row, answer in enumerate(self.answers):
            if not answer.plain():
                token, logprob, answer.state = answer.request.sampler(logits[row : row + 1], answer.state, answer.bias)
                order.append(row)
                parts.append((token, logprob))
        tokens, logprobs = (mx.concatenate(arrays) for arrays in zip(*parts, strict=True))
        back = mx.array(sorted(range(len(order)), key=order.__getitem__))
        return tokens[back], logprobs[back], tops


def _deliver(answer: _Task, scored: ScoredToken) -> bool:
    """Reports a token. Returns whether it is the last."""
    answer.ids.append(scored.token)
    text, stream = answer.stream.add(scored.token), answer.stream
    if answer.grammar is not None and stream.finish_reason is None:
        answer.grammar.accept(scored.token)
        if answer.grammar.finished:
            text, stream.finish_reason = text + stream.finish(), "stop"
        else:
            answer.bias = answer.grammar.bias()
    answer.emit(Generated(text, scored, stream.finish_reason))
    return stream.finish_reason is not None


def _likeliest(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Returns ids and log-probabilities of the `count` likeliest tokens of logits `(..., vocab_size)`, in no order."""
    count = min(count, logits.shape[-1])
    ids = mx.argpartition(-logits, count - 1, axis=-1)[..., :count]
    chosen = mx.take_along_axis(logits, ids, axis=-1)
    return ids, chosen - ops.logsumexp(logits)[..., None]


def _pairs(ids: list[int], logprobs: list[float]) -> tuple[tuple[int, float], ...]:
    """Returns tokens with their log-probabilities, likeliest first."""
    return tuple(sorted(zip(ids, logprobs, strict=True), key=lambda pair: (-pair[1], pair[0])))


class Engine:
    """Computes requests in a thread of its own, which alone uses MLX, together where it can.

    Prompts are read one after the other, in the order that they came, in pieces of `PREFILL_STEP` tokens, of which some
    layers are computed between two steps of the answers; every model's answers share its steps.

    Greedy text, and sampled text with a seed, is that of `generate`, to the bit of the log-probabilities where `Rows`
    says so: a prompt is read in the same pieces, wherever it begins to be read, and each row draws by its own key. What
    an answer has left in the prefix tree was computed a token at a time: a prompt that goes on from there equals one
    that is read anew to rounding.

    Args:
        models: by the names that requests use.
        max_memory: bytes that weights, caches of running requests and prefix tree may take together. The tree gives
            way first.
        max_rows: answers that are decoded at once.
        max_queue: requests that may wait beside those that run.
        prefix_bytes: of the prefix tree at most.

    Raises:
        InputError: the weights alone take more than `max_memory`.
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
        self.max_memory, self.max_rows, self.max_queue = max_memory, max_rows, max_queue
        self._batches = {name: _Batch(loaded) for name, loaded in models.items()}
        weights = {id(array): array.nbytes for loaded in models.values() for _, array in _parameters(loaded)}
        self._weight_bytes = sum(weights.values())
        if self._weight_bytes > max_memory:
            raise InputError(
                f"the weights take {self._weight_bytes:,} bytes, and the memory to use is {max_memory:,}: allow more"
            )
        self._tree, self._prefix_bytes = PrefixTree(prefix_bytes), prefix_bytes
        self._changed = threading.Condition()
        self._queue: deque[_Task] = deque()
        self._reading: _Task | None = None
        self._closing = self._stopping = False
        self._read = self._cached = self._generated = 0
        self._finished = self._cancelled = self._failed = self._refused = 0
        self._seconds = 1.0  # that a request takes, about
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Hands in a request, from any thread. `on_event` is called in the engine's thread, and must not block.

        Raises:
            InputError: the prompt is empty, too long for the context or outside the vocabulary; a setting is out of
                range; there is no such model.
            Busy: too many requests wait, or the engine is closing.
            TooLarge: it would not fit `max_memory` even alone.
        """
        batch = self._batch(request.model)
        config = batch.model.config
        if request.max_tokens < (0 if request.prompt_logprobs else 1):
            raise InputError(f"max_tokens is {request.max_tokens}: it must be 1 or more")
        check_seed(request.seed)
        unknown = next((token for token in request.sampler.logit_bias if token >= config.vocab_size), None)
        if unknown is not None:
            raise InputError(f"logit_bias names token {unknown}, outside the vocabulary of {config.vocab_size}")
        encode_prompt(batch.model, None, request.ids)
        room = config.max_context_length - len(request.ids)
        stream = TextStream(
            batch.tokenizer, request.ids, request.stop, (*request.stop_ids, *config.eos_token_ids), request.max_tokens,
            room,
        )  # fmt: skip
        return self._enter(_Task(request, on_event, stream, min(request.max_tokens, room)))

    def embed(self, model: str, ids: Sequence[int], on_event: Callable[[Embedded | Failed], None]) -> Ticket:
        """Hands in a text whose embedding is wanted: the mean of the last hidden states. As `submit` otherwise."""
        batch = self._batch(model)
        encode_prompt(batch.model, None, ids)
        request = Request(model, tuple(ids), 0, _GREEDY)
        return self._enter(_Task(request, on_event, TextStream(None, ()), 0, embedding=True))

    def statistics(self) -> EngineStatistics:
        """Returns the figures of this moment, from any thread."""
        with self._changed:
            return EngineStatistics(
                rows=self._rows(),
                reading=int(self._reading is not None),
                queued=len(self._queue),
                weight_bytes=self._weight_bytes,
                reserved_bytes=self._reserved(),
                prefix_bytes=self._tree.nbytes,
                max_memory=self.max_memory,
                read_tokens=self._read,
                cached_tokens=self._cached,
                generated_tokens=self._generated,
                finished=self._finished,
                cancelled=self._cancelled,
                failed=self._failed,
                refused=self._refused,
            )

    def close(self, timeout: float) -> None:
        """Refuses new requests, gives those that run or wait `timeout` seconds, fails the others, stops the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _batch(self, model: str) -> _Batch:
        if model not in self._batches:
            raise InputError(f"no model {model!r}; there are {', '.join(self._batches)}")
        return self._batches[model]

    def _enter(self, task: _Task) -> Ticket:
        batch = self._batches[task.request.model]
        needed = batch.bytes_of([task.prompt_tokens + task.most])
        with self._changed:
            if self._closing:
                raise Busy("the server is stopping", 5)
            if self._weight_bytes + needed > self.max_memory:
                raise TooLarge(
                    f"{task.prompt_tokens} tokens and {task.most} more take {needed:,} bytes beside the weights' "
                    f"{self._weight_bytes:,}, and {self.max_memory:,} may be used: ask for fewer max_tokens"
                )
            if len(self._queue) >= self.max_queue:
                self._refused += 1
                wait = self._seconds * (len(self._queue) + 1) / max(1, self._rows())
                raise Busy(f"{len(self._queue)} requests are waiting already", max(1, min(60, math.ceil(wait))))
            self._queue.append(task)
            self._changed.notify_all()
        return Ticket(task, self._wake)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _rows(self) -> int:
        return sum(len(batch.answers) for batch in self._batches.values())

    def _reserved(self, task: _Task | None = None) -> int:
        """Returns the bytes of all rows' caches at their longest, those of `task` or the one that is read included."""
        task = self._reading if task is None else task
        total = 0
        for name, batch in self._batches.items():
            lengths = batch.lengths()
            if task is not None and task.request.model == name:
                if lengths:  # until it joins them it has caches of its own
                    total += batch.bytes_of([task.prompt_tokens])
                lengths.append(task.prompt_tokens + task.most)
            total += batch.bytes_of(lengths)
        return total

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            mx.synchronize()
            mx.clear_streams()  # MLX makes them for each thread, and a process that ends with them is aborted

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._queue or self._reading or self._rows()):
                    if self._closing:
                        return
                    self._changed.wait()
                stopping = self._stopping
            if stopping:
                self._fail_all(Busy("the server is stopping", 5))
                return
            try:
                self._round()
            except Exception as error:  # whatever it is, the next request shall find an engine
                self._fail_all(error)

    def _round(self) -> None:
        """Takes a step of every model's answers, reports the tokens while it runs, and reads on in a prompt."""
        self._forget_cancelled()
        self._admit()
        running = [batch for batch in self._batches.values() if batch.answers]
        for batch in running:
            self._guarded(batch, partial(batch.launch, self._keep))
        for batch in running:
            self._guarded(batch, partial(self._deliver, batch))
        self._read_on()
        if mx.get_active_memory() + mx.get_cache_memory() > self.max_memory:  # freed buffers that MLX keeps
            mx.clear_cache()

    def _forget_cancelled(self) -> None:
        with self._changed:
            kept = [task for task in self._queue if not task.over]
            self._cancelled += len(self._queue) - len(kept)
            self._queue = deque(kept)
        if self._reading is not None and self._reading.over:
            self._cancelled += 1
            self._reading = None
        for batch in self._batches.values():
            gone = [row for row, answer in enumerate(batch.answers) if answer.over]
            self._cancelled += len(gone)
            if gone:
                self._guarded(batch, partial(batch.remove, gone, self._keep))

    def _admit(self) -> None:
        """Begins to read the request that has waited longest, where there is room for it."""
        if self._reading is not None or not self._queue or self._rows() >= self.max_rows:
            return
        task = self._queue[0]
        left = self.max_memory - self._weight_bytes - self._reserved(task)
        if left < 0:
            return
        self._tree.shrink(left)
        with self._changed:
            self._queue.popleft()
            self._reading = task

    def _read_on(self) -> None:
        """Reads prompts: a piece where no answer waits for its next token, else a part of one between two steps.

        That is counted in layers times tokens, and not timed: what a piece takes against a step depends on the machine
        and hardly on the model, and a step's own time changes with each answer that joins.
        """
        alone, done = not self._rows(), 0
        most = min(len(self._queue) + 1, _PARTS) * PREFILL_STEP // _PARTS
        while self._reading is not None:
            task = self._reading
            try:
                batch = self._batches[task.request.model]
                if task.unread is None:
                    self._begin_piece(batch, task)
                assert task.unread is not None and task.hidden is not None
                tokens = task.hidden.shape[1]
                fitting = max((most * len(task.caches) - done) // tokens, 0 if done else 1)
                layers = len(task.unread) if alone else min(len(task.unread), fitting)
                if layers <= 0:
                    return
                mx.async_eval(task.unread[:layers])
                del task.unread[:layers]
                done += layers * tokens
                if not task.unread:
                    task.unread = None
                    self._end_piece(batch, task)
            except Exception as error:
                self._reading = None
                self._end(task, Failed(_as_error(error)))
                mx.clear_cache()
            if alone:
                return
            self._admit()

    def _begin_piece(self, batch: _Batch, task: _Task) -> None:
        """Makes the graph of the next piece, of which nothing is computed yet."""
        ids = task.request.ids
        if not task.caches:
            self._restore(batch, task)
        start = task.caches[0].offset
        piece = ids[start : start + (BLOCK if batch.keeps_states else PREFILL_STEP)]
        task.hidden = batch.model.transformer(mx.array(piece)[None], task.caches)
        task.unread = [cache.state for cache in task.caches]

    def _restore(self, batch: _Batch, task: _Task) -> None:
        """Makes the caches of a prompt, with what the prefix tree has of it."""
        ids, caches = task.request.ids, make_prompt_cache(batch.model)
        found = [] if task.request.prompt_logprobs or task.embedding else self._tree.find(batch.name(len(ids)), ids)
        task.cached = len(found) * BLOCK
        for number, cache in enumerate(caches):
            if found:
                cache.restore([node.layers[number] for node in found], task.cached)
            cache.text_length = len(ids)
        task.caches = caches

    def _end_piece(self, batch: _Batch, task: _Task) -> None:
        caches, ids, hidden = task.caches, task.request.ids, task.hidden
        assert hidden is not None
        stop = caches[0].offset
        self._read += hidden.shape[1]
        task.hidden = None
        if task.embedding:
            total = hidden.astype(mx.float32).sum(axis=1)
            task.sum = total if task.sum is None else task.sum + total
            mx.async_eval(task.sum)
        if task.request.prompt_logprobs:
            _score(batch.model, hidden[0], task, stop - hidden.shape[1])
        if batch.keeps_states:
            task.keep_state(caches, 0, stop)
        if stop < len(ids):
            if not self._rows():
                mx.eval([cache.state for cache in caches])
                mx.clear_cache()  # a GPU would keep each piece's buffers for the next
            return
        self._cached += task.cached
        if task.embedding:
            assert task.sum is not None
            self._reading = None
            self._end(task, Embedded(tuple((task.sum[0] / len(ids)).tolist()), len(ids)))
            return
        logits = batch.model.head(hidden[:, -1])
        mx.async_eval(logits)
        self._add(batch, task, caches, 0, len(ids))
        self._reading = None
        read = PromptRead(len(ids), task.cached, tuple(task.scored))
        task.scored = []
        if not task.most:
            self._end(task, read)
            return
        task.emit(read)
        task.state = task.request.sampler.start([ids], task.request.seed)
        if task.request.grammar is not None:
            task.grammar = task.request.grammar.start()
            task.bias = task.grammar.bias()
        batch.join(task, logits)

    def _deliver(self, batch: _Batch) -> None:
        count, ended = batch.deliver()
        self._generated += count
        batch.remove([row for row, answer in enumerate(batch.answers) if answer in ended], self._keep)
        for answer in ended:
            self._end(answer)

    def _keep(self, task: _Task, row: int) -> None:
        """Puts what a row holds into the prefix tree."""
        batch = self._batches[task.request.model]
        self._add(batch, task, batch.rows.caches, row, min(batch.rows.lengths[row], len(task.ids)))

    def _add(self, batch: _Batch, task: _Task, caches: Sequence[KVCache], row: int, length: int) -> None:
        def cut(start: int) -> Layers | None:
            if batch.keeps_states:
                return task.snapshots.get(start)
            return [cache.block(row, start, start + BLOCK) for cache in caches]

        left = self.max_memory - self._weight_bytes - self._reserved()
        self._tree.budget = max(0, min(self._prefix_bytes, left))
        self._tree.add(batch.name(length), task.ids[:length], cut, batch.block_bytes)

    def _end(self, task: _Task, event: Event | Embedded | None = None) -> None:
        """Counts a request that ends, with `event` as its last one."""
        if event is not None:
            task.emit(event)
        if isinstance(event, Failed):
            self._failed += 1
        else:
            self._finished += 1
            self._seconds += 0.1 * (time.monotonic() - task.started - self._seconds)
        task.over = True
        task.caches, task.snapshots = [], {}

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            tasks = [*self._queue, *([] if self._reading is None else [self._reading])]
            self._queue.clear()
            self._reading = None
        for batch in self._batches.values():
            tasks += batch.reset()
        for task in tasks:
            self._end(task, Failed(_as_error(error)))
        self._tree.clear()
        mx.clear_cache()

    def _guarded(self, batch: _Batch, work: Callable[[], object]) -> None:
        """Does `work`, whose failure, such as memory that is not there, ends the answers of `batch` alone."""
        try:
            work()
        except Exception as error:
            for answer in batch.reset():
                self._end(answer, Failed(_as_error(error)))
            mx.clear_cache()


def _score(model: Model, hidden: mx.array, task: _Task, start: int) -> None:
    """Scores the tokens after those whose `hidden` states `(length, model_dim)` begin at `start`."""
    ids, most = task.request.ids, max(1, _HEAD_VALUES // model.config.vocab_size)
    if start == 0:
        task.scored.append(ScoredToken(ids[0], None))
    following = ids[start + 1 : start + 1 + hidden.shape[0]]
    for first in range(0, len(following), most):
        part = following[first : first + most]
        logits = model.head(hidden[first : first + len(part)]).astype(mx.float32)
        chosen = mx.take_along_axis(logits, mx.array(part)[:, None], axis=-1)
        logprobs = (chosen - ops.logsumexp(logits)[..., None])[:, 0]
        count = task.request.top_logprobs
        tops = _likeliest(logits, count) if count else ()
        mx.eval(logprobs, tops)
        likeliest = [_pairs(*pair) for pair in zip(*(array.tolist() for array in tops), strict=True)] or [()] * len(
            part
        )
        for token, logprob, top in zip(part, logprobs.tolist(), likeliest, strict=True):
            task.scored.append(ScoredToken(token, checked(logprob), top))


def _parameters(loaded: Loaded) -> list[tuple[str, mx.array]]:
    return tree_flatten(loaded.model.parameters())


def _as_error(error: Exception) -> ElmError:
    """Returns what a client is told of an exception."""
    return error if isinstance(error, ElmError) else ElmError(f"the answer could not be computed: {error}")
