"""The prompt of a conversation as token ids: the part of it that fits the model's context."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from elm_mlx.errors import InputError
from elm_mlx.text.chat_template import Template
from elm_mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Exchange:
    """A message and its answer.

    Attributes:
        first: the number of the first exchange that the model was still shown for this answer.
        ids: all ids that it was shown, and its answer in the ids that it chose; empty if only the text is known.
    """

    question: str
    answer: str
    first: int = 0
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The `ids` to show the model, from exchange `first` on; `forgotten` names the part that just went."""

    ids: list[int]
    first: int = 0
    forgotten: str = ""


class Window(ABC):
    """Chooses the part of a conversation to show. When it fills up, the oldest goes, down to half of the context.

    Half, so that it does not happen again with every message: what is left has moved, and is read anew.

    Attributes:
        system: stays in front, whatever goes.
        stop_ids, stop_strings: tokens and texts that end an answer.
    """

    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]

    def __init__(self, context: int, system: str | None) -> None:
        self.context = context
        self.system = system

    @abstractmethod
    def prompt(self, before: Sequence[Exchange], question: str, max_tokens: int) -> Prompt:
        """Returns the prompt that asks `question` after the exchanges `before` it.

        Room is kept for `max_tokens` of answer, if that is not over a quarter of the context.

        Raises:
            InputError: the question alone is too long; both lengths are given.
        """

    def _limit(self, max_tokens: int) -> int:
        return self.context - min(max_tokens, self.context // 4)

    def _check_alone(self, length: int) -> None:
        if length >= self.context:
            beside = " with the system prompt" if self.system else ""
            raise InputError(
                f"the message has {length} tokens{beside}, and the model's context is {self.context}: shorten it"
            )


class Templated(Window):
    """A conversation by a chat template."""

    def __init__(self, template: Template, context: int, system: str | None = None) -> None:
        super().__init__(context, system)
        self._template = template
        self.stop_ids, self.stop_strings = template.stop_ids, template.stop_strings

    def prompt(self, before: Sequence[Exchange], question: str, max_tokens: int) -> Prompt:
        return self._shown(before, question, self._limit(max_tokens), self.context // 2)

    def grounded(
        self,
        before: Sequence[Exchange],
        question: str,
        written: Callable[[int], str],
        most: int,
        max_tokens: int,
    ) -> tuple[Prompt, int]:
        """Returns the prompt that asks `question` with passages of documents, and how many these are.

        The conversation before takes at most half of the room that the answer leaves, and goes down to a quarter as in
        `prompt`; passages take all that is left.

        Args:
            written: returns the message with so many passages.
            most: of these, at most.
        """
        limit = self._limit(max_tokens)
        prompt, count = self._shown(before, question, limit // 2, limit // 4), 0
        while count < most:
            middle = (count + most + 1) // 2
            ids = self._ids(before, prompt.first, written(middle))
            if len(ids) <= limit:
                prompt, count = replace(prompt, ids=ids), middle
            else:
                most = middle - 1
        return prompt, count

    def _shown(self, before: Sequence[Exchange], question: str, limit: int, then: int) -> Prompt:
        """Returns the prompt of at most `limit` tokens; where exchanges must go for that, of at most `then`."""
        first = before[-1].first if before else 0
        ids = self._ids(before, first, question)
        if len(ids) <= limit:
            return Prompt(ids, first)
        ids, oldest = self._ids(before, len(before), question), len(before)
        self._check_alone(len(ids))
        for candidate in range(len(before) - 1, first, -1):
            longer = self._ids(before, candidate, question)
            # The last exchange stays wherever it can: it is what the question most likely refers to.
            if len(longer) > (limit if candidate == len(before) - 1 else then):
                break
            ids, oldest = longer, candidate
        count = oldest - first
        return Prompt(ids, oldest, "exchange" if count == 1 else f"{count} exchanges" if count else "")

    def _ids(self, before: Sequence[Exchange], first: int, question: str) -> list[int]:
        messages = as_messages(self.system, before[first:])
        messages.append({"role": "user", "content": question})
        last = before[-1] if before else None
        if last is not None and last.ids and last.first == first:
            return self._template.extend(last.ids, messages)
        return self._template.encode(messages)


class Continued(Window):
    """One text that a base model and its user write in turn.

    What the user writes begins a new line, unless it begins with a space. No exchange is forgotten here as a
    whole, but the oldest tokens of the text.
    """

    def __init__(self, tokenizer: Tokenizer, context: int, system: str | None = None) -> None:
        super().__init__(context, system)
        self._tokenizer = tokenizer
        self.stop_ids, self.stop_strings = tokenizer.eos_ids, ()

    def prompt(self, before: Sequence[Exchange], question: str, max_tokens: int) -> Prompt:
        text = self._text(before)
        said = list(before[-1].ids) if before and before[-1].ids else self._tokenizer.encode(text)
        added = _joined(text, question)[len(text) :]
        new = self._tokenizer.encode_amid(added) if text else self._tokenizer.encode(added, add_bos=False)
        if len(said) + len(new) <= self._limit(max_tokens):
            return Prompt(self._checked(said + new))
        head = self._tokenizer.encode(self.system or "")
        self._check_alone(len(head) + len(new))
        room = max(0, self.context // 2 - len(head) - len(new))
        body = said[len(head) :]
        count = max(0, len(body) - room)
        return Prompt(self._checked(head + body[count:] + new), 0, f"{count} tokens" if count else "")

    def _text(self, exchanges: Sequence[Exchange]) -> str:
        text = self.system or ""
        for exchange in exchanges:
            text = _joined(text, exchange.question) + exchange.answer
        return text

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise InputError("there is no text yet to go on with")
        return ids


def as_messages(system: str | None, exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
    """Returns the conversation as templates and files have it."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answer})
    return messages


def _joined(text: str, line: str) -> str:
    apart = text and line and not text.endswith("\n") and not line[0].isspace()
    return f"{text}\n{line}" if apart else text + line
