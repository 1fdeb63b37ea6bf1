"""A conversation with a model: messages in, answers out as they come, and files that keep it.

`window` decides how much of a history the model is shown, `prefix` reads only what is new of it.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elm_mlx import device, files, reading
from elm_mlx.documents.grounding import MOST_PASSAGES, QuestionsAndAnswers, grounded_message
from elm_mlx.errors import InputError
from elm_mlx.inference import sampling
from elm_mlx.inference.generation import TextStream, check_steps, encode_prompt
from elm_mlx.inference.prefix import PrefixCache
from elm_mlx.inference.sampling import Sampler, sampler_from
from elm_mlx.inference.speculation import MOST_DRAFTED, DraftFigures, speculation_for
from elm_mlx.inference.window import Continued, Exchange, Prompt, Templated, as_messages
from elm_mlx.model.kv_prediction import KVPrediction
from elm_mlx.model.network import Model
from elm_mlx.text.chat_template import Template, check_messages
from elm_mlx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from elm_mlx.documents.index_file import Passage
    from elm_mlx.documents.retrieval import DocumentIndex

DEFAULTS: dict[str, float] = {**sampling.DEFAULTS, "temp": 0.7, "top_p": 0.9, "max_tokens": 512}
# A base model has no end of its own to come to.
CONTINUING = {**DEFAULTS, "max_tokens": sampling.DEFAULTS["max_tokens"]}


@dataclass
class Statistics:
    """The figures of one answer: tokens, seconds, bytes.

    Attributes:
        prompt_tokens: all that the model was shown.
        read_tokens: the part of it that was not in the KV cache yet, and had to be read.
        predicted_tokens: those of them that a KV prediction read in place of the model.
        generation_tps: tokens a second after the first.
        drafts: how they fared; None where nothing is guessed.
    """

    prompt_tokens: int = 0
    read_tokens: int = 0
    predicted_tokens: int = 0
    generated_tokens: int = 0
    time_to_first_token: float = 0.0
    generation_tps: float = 0.0
    drafts: DraftFigures | None = None
    peak_memory: int = 0

    def count(self, elapsed: float) -> None:
        """Counts another token, `elapsed` seconds after the beginning."""
        self.generated_tokens += 1
        if self.generated_tokens == 1:
            self.time_to_first_token = elapsed
        else:
            self.generation_tps = (self.generated_tokens - 1) / (elapsed - self.time_to_first_token)


class Reply:
    """An answer: iterate, once, for its text as it comes. Made by `Chat.ask` and `Chat.retry`.

    It joins the conversation when the iteration ends: of itself, by `stopped`, or by leaving the loop. If
    nothing had been said by then, the conversation stays as it was, without the question too.

    Attributes:
        forgotten: the oldest part, which had to go to make room, such as "3 exchanges"; empty for nothing.
        finish_reason: "stop" (an end mark or a stop string), "length" (`max_tokens`), "context" (which is
            full) or "interrupted"; None before the end.
        statistics: whole at the end.
        sources: the passages of documents that the model was shown for it, by number from 1; None without documents.
    """

    def __init__(
        self,
        chat: Chat,
        before: Sequence[Exchange],
        question: str,
        prompt: Prompt,
        sources: tuple[Passage, ...] | None = None,
    ) -> None:
        self.before, self.question, self.prompt, self.sources = list(before), question, prompt, sources
        self.forgotten = prompt.forgotten
        self.finish_reason: str | None = None
        self.statistics = Statistics(prompt_tokens=len(prompt.ids))
        self._chat = chat

    def __iter__(self) -> Iterator[str]:
        return self.stream()

    def stream(self, stopped: Callable[[], bool] = lambda: False) -> Generator[str, None, None]:
        """Yields the text as it comes, without white space at its beginning. Calls `stopped` between steps."""
        return self._chat._answer(self, stopped)


class Chat:
    """A conversation.

    Args:
        template: the chat template; None for a base model, which just continues the text.
        system: stands in front of everything, for as long as the conversation lasts.
        options: those of DEFAULTS that are to be otherwise; see `stream_generate`.
        stop: strings that end an answer, besides the template's.
        seed: the same one with the same messages gives the same answers (with `kvp` in one course); None draws one.
        prompt_lookup, draft_model, num_draft_tokens: as in `stream_generate`: the same answers, sooner.
        kv_bits, max_kv_size: as of `make_prompt_cache`. With the latter nothing is forgotten as a whole: the model sees
            the beginning and the end of all that was said.
        kvp: as in `stream_generate`: answers that begin sooner, and are others. As of `PrefixCache`.
        documents: what questions are answered from. Each is shown with its passages, as many as there is room for, and
            is kept without them. A base model is then asked in plain text, see `grounding.QuestionsAndAnswers`.

    Attributes:
        exchanges: messages and their answers, oldest first.
        last: of the latest answer.

    Raises:
        InputError: an option is out of range; drafts can't be made for this model.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: Template | None = None,
        *,
        system: str | None = None,
        options: Mapping[str, float] | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        prompt_lookup: bool = False,
        draft_model: Model | None = None,
        num_draft_tokens: int = MOST_DRAFTED,
        kv_bits: int | None = None,
        max_kv_size: int | None = None,
        kvp: KVPrediction | None = None,
        documents: DocumentIndex | None = None,
    ) -> None:
        if documents is not None:
            if max_kv_size is not None:
                raise InputError("--max-kv-size forgets what documents say amid an answer: leave it out, or --docs")
            template = template or QuestionsAndAnswers(tokenizer)
        self.documents = documents
        context = model.config.max_context_length if max_kv_size is None else sys.maxsize
        self._window: Templated | Continued = (
            Continued(tokenizer, context, system) if template is None else Templated(template, context, system)
        )
        self.model, self.tokenizer = model, tokenizer
        self.options: dict[str, float] = {**DEFAULTS, **(options or {})}
        _sampler(self.options)
        self.stop = tuple(stop)
        TextStream(tokenizer, (), self.stop)  # which refuses an empty one
        self.seed = seed
        self.exchanges: list[Exchange] = []
        self._files: set[Path] = set()  # that this conversation was loaded from, or saved to
        self.last: Statistics | None = None
        self._speculation = speculation_for(model, prompt_lookup, draft_model, num_draft_tokens)
        self.cache = PrefixCache(model, kv_bits, max_kv_size, kvp)
        if max_kv_size is not None and self._speculation is not None:
            # An answer's last token is in the cache or not by how it was guessed, and so is read with the next message
            # or was before: other positions are dropped.
            raise InputError(
                "a conversation without end would forget other tokens by drafts: choose --max-kv-size or drafts"
            )

    @property
    def system(self) -> str | None:
        return self._window.system

    @property
    def continues(self) -> bool:
        """True for one text, of a base model and its user; False for a dialogue."""
        return isinstance(self._window, Continued)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, `role` and `content` of each, also those that the model is no longer shown."""
        return as_messages(self.system, self.exchanges)

    @property
    def seed(self) -> int | None:
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed = seed
        self._random = random.Random(seed)

    def ask(self, question: str) -> Reply:
        """Asks a question, or says anything. If that is nothing, a base model goes on from where it stopped.

        Raises:
            InputError: the message alone is too long for the context, or no valid Unicode. The conversation
                stays as it is.
        """
        return self._reply(self.exchanges, question)

    def retry(self) -> Reply:
        """Answers the last message anew. Until something has been said, the present answer stays.

        Raises:
            InputError: there is none.
        """
        if not self.exchanges:
            raise InputError("there is no answer yet to try again")
        return self._reply(self.exchanges[:-1], self.exchanges[-1].question)

    def undo(self) -> Exchange:
        """Drops the last message and its answer, and returns them. Raises InputError when there is none."""
        if not self.exchanges:
            raise InputError("there is nothing to undo")
        return self.exchanges.pop()

    def reset(self) -> None:
        """Drops all messages but the system prompt."""
        self.exchanges = []
        self._files.clear()

    def set(self, name: str, value: float) -> None:
        """Changes one of `options`. Raises InputError when there is no such one, or not with that value."""
        if name not in DEFAULTS:
            raise InputError(f"setting {name!r} is not one of {', '.join(DEFAULTS)}")
        kind = type(DEFAULTS[name])
        if kind is int and not float(value).is_integer():
            raise InputError(f"{name} is {value}: it must be a whole number")
        options = {**self.options, name: kind(value)}
        _sampler(options)
        self.options = options

    def save(self, path: Path) -> None:
        """Writes `messages` to a JSON file, whole or not at all.

        Raises:
            InputError: the file is there, and is no conversation, or another one than this.
            ElmError: it cannot be written.
        """
        path = reading.expanded(path).absolute()
        write_messages(path, self.messages, replace=path in self._files)
        self._files.add(path)

    def load(self, path: Path) -> None:
        """Loads the conversation of a file, its system prompt included, to go on with it.

        Raises:
            InputError: there is none, or the template does not take it. The present conversation stays.
        """
        system, pairs = read_messages(path)
        exchanges = [Exchange(question, answer) for question, answer in pairs]
        window = copy.copy(self._window)
        window.system = system
        try:
            window.prompt(exchanges, "?", 1)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        self._window, self.exchanges = window, exchanges
        self._files = {reading.expanded(path).absolute()}

    def _reply(self, before: Sequence[Exchange], question: str) -> Reply:
        max_tokens = int(self.options["max_tokens"])
        sources = None
        if self.documents is None or not isinstance(self._window, Templated):
            prompt = self._window.prompt(before, question, max_tokens)
        else:
            prompt, sources = grounded_prompt(
                self._window, self.tokenizer, self.documents, before, question, max_tokens
            )
        encode_prompt(self.model, None, prompt.ids, endless=self.cache.caches[0].limit is not None)
        return Reply(self, before, question, prompt, sources)

    def _answer(self, reply: Reply, stopped: Callable[[], bool]) -> Generator[str, None, None]:
        stop_strings = (*self._window.stop_strings, *self.stop)
        draft = Draft(self.tokenizer, reply.prompt.ids, self._window.stop_ids, stop_strings)
        try:
            yield from self._pieces(reply, draft, stopped)
        except GeneratorExit:  # the reader has left the loop
            draft.finish()
        reply.statistics.peak_memory = device.peak_memory()
        self.last = reply.statistics
        if reply.finish_reason is None:
            reply.finish_reason = "interrupted"
            if not draft.text.strip():
                return
        answer = draft.text if self.continues else draft.text.strip()
        ids = () if reply.sources else draft.ids()  # with passages they are no conversation to go on with
        self.exchanges = [*reply.before, Exchange(reply.question, answer, reply.prompt.first, ids)]

    def _pieces(self, reply: Reply, draft: Draft, stopped: Callable[[], bool]) -> Generator[str, None, None]:
        prompt, figures = reply.prompt.ids, reply.statistics
        sampler, seed = _sampler(self.options), self._random.getrandbits(32)
        room, wanted = self._window.context - len(prompt), int(self.options["max_tokens"])
        figures.read_tokens = len(prompt) - self.cache.shared(prompt)
        figures.predicted_tokens = figures.read_tokens - 1 if self.cache.predicts else 0
        start = time.perf_counter()
        logits = self.cache.read(prompt, stopped)
        if logits is None:
            return
        for token in self.cache.decode(logits, sampler, seed, min(room, wanted), self._speculation):
            elapsed = time.perf_counter() - start
            figures.count(elapsed)
            figures.drafts = None if self._speculation is None else self._speculation.figures
            piece = draft.add(token)
            if piece:
                yield piece
            if draft.ended:
                reply.finish_reason = "stop"
                break
            if stopped():
                break
        else:
            reply.finish_reason = "length" if wanted <= room else "context"
        rest = draft.finish()
        if rest:
            yield rest


def grounded_prompt(
    window: Templated,
    tokenizer: Tokenizer,
    documents: DocumentIndex,
    before: Sequence[Exchange],
    question: str,
    max_tokens: int,
) -> tuple[Prompt, tuple[Passage, ...]]:
    """Returns the prompt that asks `question` with passages of documents, and these; none where nothing was found.

    Raises:
        InputError: the question alone is too long; the index is damaged.
    """
    found = documents.search(question, [exchange.question for exchange in before], MOST_PASSAGES)
    prompt, count = window.grounded(
        before, question, lambda count: grounded_message(question, found[:count], tokenizer), len(found), max_tokens
    )
    return prompt, tuple(found[:count])


class Draft:
    """The answer to `prompt` as it grows.

    Attributes:
        tokens: all that came, an end mark too.
        text: their text, up to an end mark or stop string; characters that were cut off are left out.
        ended: an end mark or stop string came.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop_ids: Sequence[int], stop_strings: Sequence[str]
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self._tokenizer, self._prompt, self._stop_ids = tokenizer, prompt, stop_ids
        self._stream = TextStream(tokenizer, prompt, stop_strings, stop_ids)

    @property
    def ended(self) -> bool:
        return self._stream.finish_reason is not None

    def add(self, token: int) -> str:
        """Returns what to show now: the text, without white space at its beginning."""
        self.tokens.append(token)
        piece = self._stream.add(token)
        return self._shown(piece.rstrip("\ufffd") if token in self._stop_ids else piece)

    def finish(self) -> str:
        """Returns what to show when no more tokens come: the rest, but for the bytes of half a character."""
        return self._shown(self._stream.finish().rstrip("\ufffd"))

    def ids(self) -> tuple[int, ...]:
        """Returns prompt and answer, the tokens that make `text`; none where a stop string begins amid a token."""
        decoder = self._tokenizer.detokenizer(self._prompt)
        length = count = 0
        while length < len(self.text):
            length += len(decoder.add(self.tokens[count]))
            count += 1
        return (*self._prompt, *self.tokens[:count]) if length == len(self.text) else ()

    def _shown(self, piece: str) -> str:
        shown = piece if self.text.strip() else piece.lstrip()
        self.text += piece
        return shown


def write_messages(path: Path, messages: Sequence[dict[str, str]], *, replace: bool = False) -> None:
    """Writes a conversation to a file, `{"messages": [{"role": …, "content": …}, …]}`, whole or not at all.

    Args:
        replace: another conversation that is there, and not just the beginning of this one.

    Raises:
        InputError: a file is there already that is no conversation, or another one that is not to be replaced.
        ElmError: the file cannot be written.
    """
    path = reading.expanded(path)
    if path.exists():
        try:
            system, pairs = read_messages(path)
        except InputError:
            raise InputError(f"{path}: exists, and is no saved conversation; choose another name") from None
        there = as_messages(system, [Exchange(question, answer) for question, answer in pairs])
        if not replace and there != list(messages)[: len(there)]:
            raise InputError(f"{path}: holds another conversation; /load goes on with it, or choose another name")
    files.write_json(path, {"messages": list(messages)})


def read_messages(path: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """Returns the system prompt of a conversation in a file, None where it has none, and each message with its answer.

    Raises:
        InputError: the file cannot be read, or holds something else; says where.
    """
    record = reading.json_value(reading.expanded(path))
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list):
        raise InputError(f"{path}: not a conversation: an object with a list `messages` is needed")
    try:
        said = [*check_messages(messages)] if messages else []
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    system = said.pop(0)["content"] if said and said[0]["role"] == "system" else None
    for number, message in enumerate(said):
        role, expected = message["role"], ("user", "assistant")[number % 2]
        if role != expected:
            place = number + 1 + (system is not None)
            raise InputError(f"{path}: message {place} is from {role!r}: it must be from {expected!r}")
    if len(said) % 2:
        raise InputError(f"{path}: the last message has no answer")
    contents = [message["content"] for message in said]
    return system, list(zip(contents[::2], contents[1::2], strict=True))


def _sampler(options: Mapping[str, float]) -> Sampler:
    check_steps(int(options["max_tokens"]), 1)
    return sampler_from(options)
