"""Completions: what the engine reports of a request's answers, gathered into whole ones or the chunks of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from elm_mlx.inference.engine import Busy, Engine, Event, Failed, Generated, PromptRead, Request, ScoredToken, Ticket
from elm_mlx.serve.answers import DONE, KEEP_ALIVE, Answer, AnswerShape, error_answer, event, usage
from elm_mlx.serve.tool_calls import CallReader, Delta

IN_FLIGHT = 16  # answers of one request that the engine has at a time
KEEP_ALIVE_SECONDS = 10.0
_PAUSE = 0.2  # seconds until a place in the queue is looked for again


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


class OpenCompletion:
    """The answers to one HTTP request. Iterate over `chunks`, or await `whole`; to leave either is to cancel."""

    def __init__(
        self, engine: Engine, plans: Sequence[Plan], shape: AnswerShape, chat: bool, include_usage: bool
    ) -> None:
        self._engine, self._plans, self._shape = engine, plans, shape
        self._chat, self._include_usage = chat, include_usage
        self._answers = [Answer(index) for index in range(len(plans))]
        self._tickets: dict[int, Ticket] = {}
        self._next = 0  # of the plans: those before it are the engine's
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()  # bounded by the answers' max_tokens
        self._read: dict[int, tuple[int, int]] = {}  # tokens of each prompt, and how many of them were cached

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens so far. A prompt with several answers counts once."""
        prompts, cached = (sum(counts) for counts in zip(*self._read.values(), strict=True)) if self._read else (0, 0)
        return usage(prompts, sum(answer.tokens for answer in self._answers), cached)

    def begin(self) -> None:
        """Hands the first answers to the engine. Raises what `Engine.submit` raises, and then none has begun."""
        try:
            self._submit()
        except BaseException:
            self.cancel()
            raise

    async def whole(self) -> dict[str, Any]:
        """Returns the whole answer. Raises what the engine failed by."""
        async for index, happened in self._happenings():
            if happened is not None:
                delta, scored = self._taken(index, happened)
                self._answers[index].deltas += delta
                self._answers[index].scored += scored
        return self._shape.whole(self._answers, self.usage)

    async def chunks(self) -> AsyncIterator[str]:
        """Yields the events of the stream; an error after its beginning is one of them, and the last."""
        offsets = [0] * len(self._plans)
        try:
            if self._chat:
                for index in range(len(self._plans)):
                    yield self._shape.role(index)
            async for index, happened in self._happenings():
                if happened is None:
                    yield KEEP_ALIVE
                    continue
                deltas, scored = self._taken(index, happened)
                reason = self._answers[index].finish_reason
                if scored or (reason and not deltas):
                    deltas = deltas or [{}]
                for delta in deltas[:-1]:
                    yield self._shape.piece(index, delta)
                if deltas:
                    yield self._shape.piece(index, deltas[-1], scored, offsets[index], reason)
                    offsets[index] += sum(len(self._shape.text_of(each.token)) for each in scored)
            if self._include_usage:
                yield self._shape.counted(self.usage)
            yield DONE
        except Exception as error:
            yield event(error_answer(error).body)

    def cancel(self) -> None:
        """Ends what has not ended."""
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets.clear()

    async def _happenings(self) -> AsyncIterator[tuple[int, Event | None]]:
        """Yields the events of all answers, and None where nothing has happened for a while. Raises what failed."""
        left = len(self._plans)
        try:
            while left:
                try:
                    index, happened = await asyncio.wait_for(self._events.get(), KEEP_ALIVE_SECONDS)
                except asyncio.TimeoutError:
                    yield -1, None
                    continue
                if isinstance(happened, Failed):
                    raise happened.error
                ended = self._ends(index, happened)
                yield index, happened
                if ended:
                    left -= 1
                    self._tickets.pop(index, None)
                    await self._submit_more()
        finally:
            self.cancel()

    def _ends(self, index: int, happened: Event) -> bool:
        if isinstance(happened, Generated):
            return happened.finish_reason is not None
        return self._plans[index].request.max_tokens == 0

    def _submit(self) -> None:
        loop = asyncio.get_running_loop()

        def report(index: int, happened: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, happened))

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
            await asyncio.sleep(_PAUSE)

    def _taken(self, index: int, happened: Event) -> tuple[list[Delta], Sequence[ScoredToken]]:
        """Returns what an event adds to an answer."""
        plan, answer = self._plans[index], self._answers[index]
        if isinstance(happened, PromptRead):
            self._read.setdefault(plan.prompt, (happened.prompt_tokens, happened.cached_tokens))
            if plan.request.max_tokens == 0:
                answer.finish_reason = "length"
            return ([{"content": plan.echo}] if plan.echo else []), happened.scored
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
        return deltas, (happened.scored,) if self._shape.likeliest is not None else ()
