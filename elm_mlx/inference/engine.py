"""The engine of a server: one thread that owns MLX, and computes requests of several clients together."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.continuous_batch import ContinuousBatch, ranked, top_tokens
from elm_mlx.inference.generation import TextStream, checked, encode_prompt
from elm_mlx.inference.prefix_tree import BLOCK, Layers, Node, PrefixTree
from elm_mlx.inference.requests import (
    GREEDY,
    Busy,
    Embedded,
    EngineStatistics,
    Event,
    Failed,
    OpenRequest,
    PromptRead,
    Request,
    ScoredToken,
    Ticket,
    TooLarge,
)
from elm_mlx.inference.rows import PREFILL_STEP
from elm_mlx.model import ops
from elm_mlx.model.cache import KVCache
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model
from elm_mlx.reading import check_seed
from elm_mlx.store.loading import Loaded

_GATHERED = 16 * 128  # tokens of prompts that are read while answers wait for their first step
_SHARE = 0.5, 4.0  # of a step's time, that prompts are read between two: at least and at most
_FIRST_TOKENS = 32  # that are read between two steps before it is known what that takes
_NEWEST = 0.3  # weight of the last measurement of it
_HEAD_VALUES = 1 << 24  # logits of a prompt that are computed at once
_STUCK_SECONDS = 180.0  # far more than a piece of a prompt takes the largest model on a slow machine


class Engine:
    """Computes requests in a thread of its own, which alone uses MLX, together where it can.

    Prompts are read one after the other, in the order that they came, in pieces of `PREFILL_STEP` tokens; every model's
    answers share its steps. Prompts that come while no answer takes steps are read before the first one, so that their
    answers take all steps together; first tokens are reported meanwhile. Later ones are read between two steps, some
    layers at a time, for a share of the time: the more of them wait for each answer that runs the more, within bounds.
    What is computed depends on no time.

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
        kv_bits: of keys and values, as of `make_prompt_cache`.
        drafted: tokens that are guessed for an answer's step at most, by what its text copies; 0 for none. The more
            answers share the step the fewer. The text is the same.
        draft_model: guesses in place of that for an answer that is alone, of every model: one of their vocabulary.
        predictions: by the names of models, those whose prompts are predicted, and not read (`model.kv_prediction`). In
            the prefix tree such a model shares nothing with any other, and what answers leave is not kept.

    Raises:
        InputError: the weights alone take more than `max_memory`; a model's keys cannot be quantized; the draft model
            has another vocabulary, or keeps a state that can't be taken back.
    """

    def __init__(
        self,
        models: Mapping[str, Loaded],
        *,
        max_memory: int,
        max_rows: int = 16,
        max_queue: int = 64,
        prefix_bytes: int,
        kv_bits: int | None = None,
        drafted: int = 0,
        draft_model: Model | None = None,
        predictions: Mapping[str, KVPrediction] | None = None,
    ) -> None:
        predictions = predictions or {}
        self.max_memory, self.max_rows, self.max_queue = max_memory, max_rows, max_queue
        self._batches = {
            name: ContinuousBatch(loaded, kv_bits, drafted, draft_model, predictions.get(name))
            for name, loaded in models.items()
        }
        held: list[Any] = [*(loaded.model for loaded in models.values()), *predictions.values()]
        held += [] if draft_model is None else [draft_model]
        weights = {id(array): array.nbytes for model in held for _, array in tree_flatten(model.parameters())}
        self._weight_bytes = sum(weights.values())
        if self._weight_bytes > max_memory:
            raise InputError(
                f"the weights take {self._weight_bytes:,} bytes, and the memory to use is {max_memory:,}: allow more"
            )
        self._tree, self._prefix_bytes = PrefixTree(prefix_bytes), prefix_bytes
        self._changed = threading.Condition()
        self._queue: deque[OpenRequest] = deque()
        self._reading: OpenRequest | None = None
        self._gathering_since: int | None = 0  # tokens read as the first answer began to wait; None as they take steps
        self._work: tuple[str, int, float] | None = None  # read after a step: model, tokens times layers, since when
        self._work_seconds: dict[str, float] = {}  # that a token takes in a layer, about, by model
        self._closing = self._stopping = False
        self._read = self._cached = self._generated = 0
        self._finished = self._cancelled = self._failed = self._refused = 0
        self._seconds = 1.0  # that a request takes, about
        self._round_since: float | None = None  # when the round that is computed now began
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Hands in a request, from any thread. `on_event` is called in the engine's thread, and must not block.

        Raises:
            InputError: the prompt is empty, too long for the context or outside the vocabulary; a setting is out of
                range; there is no such model; it predicts prompts, and their logits are wanted.
            Busy: too many requests wait, or the engine is closing.
            TooLarge: it would not fit `max_memory` even alone.
        """
        batch = self._batch(request.model)
        config = batch.model.config
        if request.max_tokens < (0 if request.prompt_logprobs else 1):
            raise InputError(f"max_tokens is {request.max_tokens}: it must be 1 or more")
        check_seed(request.seed)
        if batch.kvp is not None and request.prompt_logprobs:
            raise InputError(
                f"{request.model} predicts what prompts leave, and computes no log-probabilities of them: ask its base"
            )
        unknown = next((token for token in request.sampler.logit_bias if token >= config.vocab_size), None)
        if unknown is not None:
            raise InputError(f"logit_bias names token {unknown}, outside the vocabulary of {config.vocab_size}")
        encode_prompt(batch.model, None, request.ids)
        room = config.max_context_length - len(request.ids)
        stream = TextStream(
            batch.tokenizer, request.ids, request.stop, (*request.stop_ids, *config.eos_token_ids), request.max_tokens,
            room,
        )  # fmt: skip
        return self._enter(OpenRequest(request, on_event, stream, min(request.max_tokens, room)))

    def embed(self, model: str, ids: Sequence[int], on_event: Callable[[Embedded | Failed], None]) -> Ticket:
        """Hands in a text whose embedding is wanted: the mean of the last hidden states. As `submit` otherwise."""
        batch = self._batch(model)
        encode_prompt(batch.model, None, ids)
        request = Request(model, tuple(ids), 0, GREEDY)
        return self._enter(OpenRequest(request, on_event, TextStream(None, ()), 0, embedding=True))

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
                drafted_tokens=sum(batch.drafts[0] for batch in self._batches.values()),
                accepted_tokens=sum(batch.drafts[1] for batch in self._batches.values()),
                finished=self._finished,
                cancelled=self._cancelled,
                failed=self._failed,
                refused=self._refused,
            )

    def trouble(self) -> str | None:
        """Returns why no answer is to be expected, from any thread; None where the engine works, or waits for work."""
        if not self._thread.is_alive():
            return "the engine's thread has ended"
        since = self._round_since
        seconds = 0.0 if since is None else time.monotonic() - since
        return f"the engine has computed one step for {seconds:.0f} s" if seconds > _STUCK_SECONDS else None

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

    def _batch(self, model: str) -> ContinuousBatch:
        if model not in self._batches:
            raise InputError(f"no model {model!r}; there are {', '.join(self._batches)}")
        return self._batches[model]

    def _enter(self, task: OpenRequest) -> Ticket:
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

    def _reserved(self, task: OpenRequest | None = None) -> int:
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
        except BaseException as error:  # a defect that ends the thread: nobody shall wait for it
            self._closing = True
            self._fail_all(ElmError(f"the engine has ended: {type(error).__name__}"))
            raise
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
            self._round_since = time.monotonic()
            try:
                self._round()
            except Exception as error:  # whatever it is, the next request shall find an engine
                self._fail_all(error)
            self._round_since = None

    def _round(self) -> None:
        """Takes a step of every model's answers, reports the tokens while it runs, and reads on in a prompt."""
        self._forget_cancelled()
        self._admit()
        if self._gathers():
            self._read_layers(sys.maxsize)
        else:
            running = [batch for batch in self._batches.values() if batch.answers]
            for batch in running:
                if len(running) > 1 or self._work is not None:
                    batch.interrupt()
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

    def _gathers(self) -> bool:
        """Returns whether prompts are read before any answer takes a step."""
        if not self._rows():
            self._gathering_since = self._read
            return self._reading is not None
        if self._gathering_since is None:
            return False
        self._wait_for_logits()
        self._admit()  # who came while they were computed
        if self._reading is not None:
            task = self._reading
            there = task.caches[0].offset if task.caches else len(self._found(task)) * BLOCK
            if task.prompt_tokens - there <= _GATHERED - (self._read - self._gathering_since):
                return True
        self._gathering_since = None
        return False

    def _read_on(self) -> None:
        """Reads some layers of prompts between two steps: for as long as their share of the time is.

        Both are measured each time, a step by waiting for it. A number of tokens would not do: what one takes against a
        step depends on the machine, the model, and the answers that share the step.
        """
        began = time.perf_counter()  # now the step, for the tokens that it is fed with have come
        seconds = self._work_seconds
        if self._work is not None:
            model, work, since = self._work
            taken = (began - since) / work
            seconds[model] = seconds.get(model, taken) * (1 - _NEWEST) + taken * _NEWEST
            self._work = None
        task, rows = self._reading, self._rows()
        if task is None or not rows:
            return
        self._wait_for_logits()
        since, model, work = time.perf_counter(), task.request.model, 0
        may_take = (since - began) * min(max((len(self._queue) + 1) / rows, _SHARE[0]), _SHARE[1])
        layers = self._batches[model].model.config.num_layers
        most = int(may_take / seconds[model]) if model in seconds else _FIRST_TOKENS * layers
        most = max(most, PREFILL_STEP)  # a layer, or it would never be read
        while self._reading is not None and self._reading.request.model == model:
            read = self._read_layers(most - work)
            if not read:
                break
            work += read
            self._admit()
        self._work = (model, work, since) if work else None

    def _wait_for_logits(self) -> None:
        for batch in self._batches.values():
            if batch.logits is not None:
                self._guarded(batch, partial(mx.eval, batch.logits))

    def _read_layers(self, most: int) -> int:
        """Begins to compute layers of a piece of a prompt: `most` tokens times layers. Returns what it is in these."""
        task = self._reading
        assert task is not None
        try:
            batch = self._batches[task.request.model]
            if task.unread is None:
                self._begin_piece(batch, task)
            assert task.unread is not None
            layers = min(len(task.unread), most // task.piece)
            if layers:
                mx.async_eval(task.unread[:layers])
                del task.unread[:layers]
            if not task.unread:
                task.unread = None
                self._end_piece(batch, task)
            return layers * task.piece
        except Exception as error:
            self._reading = None
            self._end(task, Failed(_as_error(error)))
            mx.clear_cache()
            return 0

    def _begin_piece(self, batch: ContinuousBatch, task: OpenRequest) -> None:
        """Makes the graph of the next piece, of which nothing is computed yet."""
        ids = task.request.ids
        if not task.caches:
            self._restore(batch, task)
        start = task.caches[0].offset
        piece = ids[start : start + (BLOCK if batch.keeps_states else PREFILL_STEP)]
        if batch.kvp is not None and not task.embedding and start < len(ids) - 1:
            piece = piece[: len(ids) - 1 - start]
            batch.kvp.read(mx.array(piece)[None], task.own, task.caches)
            task.piece, task.unread = len(piece), [cache.state for cache in task.caches]
            task.unread[-1] = [task.unread[-1], [cache.state for cache in task.own]]
            return
        task.piece = len(piece)
        last = None if task.embedding or task.request.prompt_logprobs else 1
        task.hidden = batch.model.transformer(mx.array(piece)[None], task.caches, last=last)
        task.unread = [cache.state for cache in task.caches]

    def _restore(self, batch: ContinuousBatch, task: OpenRequest) -> None:
        """Makes the caches of a prompt, with what the prefix tree has of it."""
        ids, caches, own, found = task.request.ids, batch.new_caches(), batch.new_own_caches(), self._found(task)
        task.cached = len(found) * BLOCK
        for number, cache in enumerate((*caches, *own)):
            if found:
                cache.restore([node.layers[number] for node in found], task.cached)
            cache.text_length = len(ids)
        task.caches, task.own = caches, own

    def _found(self, task: OpenRequest) -> list[Node]:
        """Returns the blocks of a prompt that the prefix tree has, and that may be taken from there."""
        if task.request.prompt_logprobs or task.embedding:
            return []
        return self._tree.find(self._batches[task.request.model].name(task.prompt_tokens), task.request.ids)

    def _end_piece(self, batch: ContinuousBatch, task: OpenRequest) -> None:
        caches, ids, hidden = task.caches, task.request.ids, task.hidden
        stop = caches[0].offset
        self._read += task.piece
        task.hidden = None
        if task.embedding:
            assert hidden is not None
            total = hidden.astype(mx.float32).sum(axis=1)
            task.sum = total if task.sum is None else task.sum + total
            mx.async_eval(task.sum)
        if task.request.prompt_logprobs:
            assert hidden is not None
            _score(batch.model, hidden[0], task, stop - task.piece)
        if batch.keeps_states:
            task.keep_state(caches, 0, stop)
        if stop < len(ids):
            if self._gathering_since is not None:
                mx.eval([cache.state for cache in (*caches, *task.own)])
                mx.clear_cache()  # a GPU would keep each piece's buffers for the next
            return
        self._cached += task.cached
        if task.embedding:
            assert task.sum is not None
            self._reading = None
            self._end(task, Embedded(tuple((task.sum[0] / len(ids)).tolist()), len(ids)))
            return
        assert hidden is not None
        logits = batch.model.head(hidden[:, -1])
        mx.async_eval(logits)
        self._add(batch, task, [*caches, *task.own], 0, len(ids) if batch.kvp is None else len(ids) - 1)
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
        if self._gathering_since is not None and task.grammar is None:  # whose bias is of the next token from then on
            self._take(batch, *batch.show_first(task))

    def _deliver(self, batch: ContinuousBatch) -> None:
        self._take(batch, *batch.deliver())

    def _take(self, batch: ContinuousBatch, count: int, ended: Sequence[OpenRequest]) -> None:
        """Counts tokens that were reported, and lets the answers go that end with them."""
        self._generated += count
        batch.remove([row for row, answer in enumerate(batch.answers) if answer in ended], self._keep)
        for answer in ended:
            self._end(answer)

    def _keep(self, task: OpenRequest, row: int) -> None:
        """Puts what a row holds into the prefix tree, but where it was to be predicted, and was not."""
        batch = self._batches[task.request.model]
        if batch.kvp is None:
            self._add(batch, task, batch.rows.caches, row, min(batch.rows.lengths[row], len(task.ids)))

    def _add(self, batch: ContinuousBatch, task: OpenRequest, caches: Sequence[KVCache], row: int, length: int) -> None:
        def cut(start: int) -> Layers | None:
            if batch.keeps_states:
                return task.snapshots.get(start)
            return [cache.block(row, start, start + BLOCK) for cache in caches]

        left = self.max_memory - self._weight_bytes - self._reserved()
        self._tree.budget = max(0, min(self._prefix_bytes, left))
        self._tree.add(batch.name(length), task.ids[:length], cut, batch.block_bytes)

    def _end(self, task: OpenRequest, event: Event | Embedded | None = None) -> None:
        """Counts a request that ends, with `event` as its last one."""
        if event is not None:
            task.emit(event)
        if isinstance(event, Failed):
            self._failed += 1
        else:
            self._finished += 1
            self._seconds += 0.1 * (time.monotonic() - task.started - self._seconds)
        task.over = True
        task.caches, task.own, task.snapshots = [], [], {}

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

    def _guarded(self, batch: ContinuousBatch, work: Callable[[], object]) -> None:
        """Does `work`, whose failure, such as memory that is not there, ends the answers of `batch` alone."""
        try:
            work()
        except Exception as error:
            for answer in batch.reset():
                self._end(answer, Failed(_as_error(error)))
            mx.clear_cache()


def _score(model: Model, hidden: mx.array, task: OpenRequest, start: int) -> None:
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
        tops = top_tokens(logits, count) if count else ()
        mx.eval(logprobs, tops)
        likeliest = [ranked(*pair) for pair in zip(*(array.tolist() for array in tops), strict=True)] or [()] * len(
            part
        )
        for token, logprob, top in zip(part, logprobs.tolist(), likeliest, strict=True):
            task.scored.append(ScoredToken(token, checked(logprob), top))


def _as_error(error: Exception) -> ElmError:
    """Returns what a client is told of an exception."""
    return error if isinstance(error, ElmError) else ElmError(f"the answer could not be computed: {error}")
