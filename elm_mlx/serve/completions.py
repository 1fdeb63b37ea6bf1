"""Completions: what the engine reports of a request's answers, gathered into whole ones or the chunks of a stream."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from elm_mlx.inference.engine import Engine
from elm_mlx.inference.requests import Busy, Event, Failed, Generated, PromptRead, Request, ScoredToken, Ticket
from elm_mlx.serve.answers import DONE, KEEP_ALIVE, Answer, AnswerShape, usage
from elm_mlx.serve.call_reader import CallReader, Delta

IN_FLIGHT = 16  # answers of one request that the engine has at a time
KEEP_ALIVE_SECONDS = 10.0
PAUSE = 0.2  # seconds until a place in the queue is looked for again

Item = TypeVar("Item")


@dataclass
class Plan:
    """An answer to be made: the engine's request, and how its text is read.

    Attributes:
        prompt: the number of its prompt among those of the HTTP request.
        echo: the prompt's text, which the answer begins with; empty for none.
        reader: of tool calls; None where there are none, and the text is content.
    """

    request: Request
    prompt: int = 0
    echo: str = ""
    reader: CallReader | None = None


class _Post:
    """What other threads put into queues of a loop. What comes before it looks wakes it once: a step's tokens do."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._woken = False

    def put(self, queue: asyncio.Queue[Item], item: Item) -> None:
        self._items.append((queue, item))
        if not self._woken and (loop := self._loop()) is not None:
            self._woken = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first: what is put from now on may not be seen below
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)


_posts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Post] = weakref.WeakKeyDictionary()


def putting_into(queue: asyncio.Queue[Item]) -> Callable[[Item], None]:
    """Returns what puts an item into a queue of this loop, from any thread."""
    loop = asyncio.get_running_loop()
    return partial(_posts.setdefault(loop, _Post(loop)).put, queue)


class OpenCompletion:
    """The answers to one HTTP request. Iterate over `chunks`, or await `whole`; to leave either is to cancel."""

    def __init__(self, engine: Engine, plans: Sequence[Plan], shape: AnswerShape) -> None:
        self._engine, self._plans, self._shape = engine, plans, shape
        self._answers = [Answer(index) for index in range(len(plans))]
        self._tickets: dict[int, Ticket] = {}
        self._next = 0  # of the plans: those before it are the engine's
        # Bounded by the answers' max_tokens; None where nothing has come for a while.
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._decoders: dict[int, tuple[Any, int]] = {}  # of scored texts, and how long these are
        self._read: dict[int, tuple[int, int]] = {}  # tokens of each prompt, and how many of them were cached

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens so far. A prompt with several answers counts once."""
        prompts, cached = (sum(counts) for counts in zip(*self._read.values(), strict=True)) if self._read else (0, 0)
        return usage(prompts, sum(answer.tokens for answer in self._answers), cached)

    def begin(self) -> None:
        """Hands the first answers to the engine, as many as its queue takes.

        Raises what `Engine.submit` raises, and then none has begun.
        """
        try:
            self._submit()
        except BaseException as error:
            if isinstance(error, Busy) and self._tickets:
                return  # when these end, there is room for the others
            self.cancel()
            raise

    async def whole(self) -> dict[str, Any]:
        """Returns the whole answer. Raises what the engine failed by."""
        async for happenings in self._happenings():
            for index, happened in happenings:
                delta, scored, places = self._taken(index, happened)
                answer = self._answers[index]
                answer.deltas += delta
                answer.scored += scored
                answer.places += places
        # In a thread, for log-probabilities may make it long.
        return await asyncio.to_thread(self._shape.whole, self._answers, self.usage)

    async def chunks(self) -> AsyncIterator[str]:
        """Yields the events of the stream, several at once where they came so. Raises what the engine failed by."""
        now = asyncio.get_running_loop().time
        spoken = now()
        async for happenings in self._happenings():
            chunks = "".join(self._chunks_of(*each) for each in happenings)
            if not chunks and (not happenings or now() - spoken > KEEP_ALIVE_SECONDS):  # of a call that comes whole
                chunks = KEEP_ALIVE
            if chunks:
                spoken = now()
                yield chunks
        yield (self._shape.counted(self.usage) if self._shape.include_usage else "") + DONE

    def _chunks_of(self, index: int, happened: Event) -> str:
        chunks = self._shape.role(index) if self._shape.chat and isinstance(happened, PromptRead) else ""
        deltas, scored, places = self._taken(index, happened)
        reason = self._answers[index].finish_reason
        if scored or (reason and not deltas):
            deltas = deltas or [{}]
        for delta in deltas[:-1]:
            chunks += self._shape.piece(index, delta)
        return chunks + (self._shape.piece(index, deltas[-1], scored, places, reason) if deltas else "")

    def cancel(self) -> None:
        """Ends what has not ended."""
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets.clear()

    async def _happenings(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yields what has happened to the answers since the last time, nothing after a while. Raises what failed."""
        left = len(self._plans)
        try:
            while left:
                happenings, failure = await self._some()
                ended = [index for index, happened in happenings if self._ends(index, happened)]
                if happenings or failure is None:
                    yield happenings
                if failure is not None:
                    raise failure
                for index in ended:
                    self._tickets.pop(index, None)
                left -= len(ended)
                if ended:
                    await self._submit_more()
        finally:
            self.cancel()

    async def _some(self) -> tuple[list[tuple[int, Event]], Exception | None]:
        """Waits for the next events. Returns them up to the first failure, and that."""
        happenings: list[tuple[int, Event]] = []
        # Not `asyncio.wait_for`, which makes a task of each token, two more rounds of the loop.
        quiet = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._events.put_nowait, None)
        try:
            waiting = [await self._events.get()]
        finally:
            quiet.cancel()
        while not self._events.empty():
            waiting.append(self._events.get_nowait())
        for index, happened in filter(None, waiting):
            if isinstance(happened, Failed):
                return happenings, happened.error
            happenings.append((index, happened))
        return happenings, None

    def _ends(self, index: int, happened: Event) -> bool:
        if isinstance(happened, Generated):
            return happened.finish_reason is not None
        return self._plans[index].request.max_tokens == 0

    def _submit(self) -> None:
        put = putting_into(self._events)

        def report(index: int, happened: Event) -> None:
            put((index, happened))

        while self._next < len(self._plans) and len(self._tickets) < IN_FLIGHT:
            index = self._next
            self._tickets[index] = self._engine.submit(self._plans[index].request, partial(report, index))
            self._next += 1

    async def _submit_more(self) -> None:
        """Hands in further answers. Where the queue is full it waits for one of its own, or for a place in it."""
        while True:
            with suppress(Busy):
                self._submit()
            if self._tickets or self._next == len(self._plans):
                return
            await asyncio.sleep(PAUSE)

    def _taken(self, index: int, happened: Event) -> tuple[list[Delta], Sequence[ScoredToken], Sequence[int]]:
        """Returns what an event adds to an answer: deltas, and tokens with the places where they begin."""
        plan, answer = self._plans[index], self._answers[index]
        wanted = self._shape.likeliest is not None
        if isinstance(happened, PromptRead):
            self._read.setdefault(plan.prompt, (happened.prompt_tokens, happened.cached_tokens))
            if plan.request.max_tokens == 0:
                answer.finish_reason = "length"
            scored = happened.scored if wanted else ()
            return ([{"content": plan.echo}] if plan.echo else []), scored, self._places(index, scored)
        assert isinstance(happened, Generated)
        answer.tokens += 1
        if plan.reader is None:
            deltas: list[Delta] = [{"content": happened.text}] if happened.text else []
        else:
            deltas = plan.reader.add(happened.text, happened.scored.token)
        if happened.finish_reason is not None:
            answer.finish_reason = "length" if happened.finish_reason == "context" else happened.finish_reason
            if plan.reader is not None:
                deltas += plan.reader.finish()
                answer.finish_reason = plan.reader.finish_reason(answer.finish_reason)
        said = wanted and not (
            self._shape.chat and happened.scored.token in plan.request.stop_ids
        )  # what ends a message
        scored = (happened.scored,) if said else ()
        return deltas, scored, self._places(index, scored)

    def _places(self, index: int, scored: Sequence[ScoredToken]) -> list[int]:
        """Returns where in the text of a text completion tokens begin."""
        if self._shape.chat or not scored:
            return []
        if index not in self._decoders:
            request = self._plans[index].request
            self._decoders[index] = self._shape.decoder(() if request.prompt_logprobs else request.ids), 0
        decoder, length = self._decoders[index]
        places = []
        for each in scored:
            places.append(length)
            length += len(decoder.add(each.token))
        self._decoders[index] = decoder, length
        return places
