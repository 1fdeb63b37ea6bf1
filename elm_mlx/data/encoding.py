"""Records as token ids, by the same template as chat, with the tokens that the loss counts marked.

What stands before an answer is encoded as chat encodes it, and the answer by itself as its continuation, so that the
model is trained on the very ids that it will be asked with. An answer's tokens, with what ends it, are trained; what
the template writes after that, the model never has to say. Imports no MLX.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from elm_mlx.data.records import Conversation, Instruction, PlainText, Preference, PromptAnswer, Record
from elm_mlx.errors import InputError
from elm_mlx.text.chat_template import Messages, Part, Template, Tools
from elm_mlx.text.jinja import TemplateInput
from elm_mlx.text.tokenizer import Tokenizer

# Stanford Alpaca's prompts, in the wording and with the line's end that models fine-tuned on them have seen.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

# But for the roles, which the OpenELM-instruct template itself writes so, in letters.
_LIKE_CONTROLS = r"<\|(?!(?:system|user|assistant)\|)[^\s<>|]+\|>|</?s>"

Place = tuple[int, int]  # a part of a conversation, and a character in it
Span = tuple[Place, Place]


@dataclass(frozen=True)
class Example:
    """The token ids of a record, and which of them the loss counts.

    Attributes:
        ids: two or more.
        trained: as long as `ids`; whether predicting that token counts. The first is False: nothing predicts it.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


class Names:
    """Names of control tokens, written out in a text: the tokenizer reads them as letters.

    Its own, and what is written like another model's, unless it is a piece that text can have.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        own = tokenizer.names_of_controls().pattern
        self._pattern = re.compile(f"{own}|{_LIKE_CONTROLS}")
        self._controls, self._id_of = tokenizer.control_ids, tokenizer.id_of

    def find(self, texts: Iterable[str]) -> Iterator[str]:
        """Yields each name in `texts`, as often as it is there."""
        return (found for text in texts for found in self._pattern.findall(text) if self._is_one(found))

    def marked(self, text: str) -> str:
        """Returns `text` with each name in ‹ ›."""
        return self._pattern.sub(lambda found: f"‹{found[0]}›" if self._is_one(found[0]) else found[0], text)

    def _is_one(self, name: str) -> bool:
        return name in self._controls or self._id_of(name) is None


class Encoder:
    """Makes an Example of a record.

    Args:
        template: None for a base model.
        train_on_prompt: mark every token.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template | None, train_on_prompt: bool = False) -> None:
        self._tokenizer, self._template, self._all = tokenizer, template, train_on_prompt
        self._bos: list[Part] = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._eos: list[Part] = [*tokenizer.eos_ids[:1]]
        self.names = Names(tokenizer)
        self._ids: dict[int, int] = {}  # the objects that all examples share: half the memory

    def check_template(self, record: Record) -> None:
        """Raises InputError where a record needs a template and there is none: nothing of its kind can be read then."""
        messages = record.prompt if isinstance(record, Preference) else getattr(record, "messages", "")
        if self._template is None and not isinstance(messages, str):
            what = "has a system prompt" if messages[0]["role"] == "system" else "is a conversation"
            hint = "--template openelm-instruct, or a file, gives it one"
            raise InputError(f"{record.where}: {what}, and the model has no chat template; {hint}")

    def encode(self, record: Record) -> Example:
        """Encodes a whole record, however long; not a pair.

        Raises:
            InputError: the template doesn't take it, or the tokenizer doesn't. The text is the reason alone.
        """
        if isinstance(record, Conversation):
            example = self._conversation(record.messages, record.untrained, record.tools)
        elif isinstance(record, PlainText):
            example = self._marked([*self._bos, record.text, *self._eos], [((0, 0), (3, 0))])
        elif isinstance(record, PromptAnswer):
            example = self._answer(record.prompt, record.completion)
        else:
            assert isinstance(record, Instruction)
            asked = record.question
            if self._template is None:
                prompt = ALPACA_WITH_INPUT if record.input else ALPACA
                asked = prompt.format(instruction=record.instruction, input=record.input)
            example = self._answer(asked, record.output)
        if len(example.ids) < 2:
            raise InputError("is one token, and a loss needs two")
        return Example(example.ids, (False, *example.trained[1:]))

    def encode_pair(self, record: Preference) -> tuple[Example, Example]:
        """Encodes the chosen answer and the rejected one, each after the same prompt, and trained alone.

        Raises:
            InputError: as `encode`; or the prompt's ids differ, or the answers' don't.
        """
        (chosen, prompt), (rejected, same) = (
            _last_answer(self.encode(record.answered(answer))) for answer in (record.chosen, record.rejected)
        )
        if prompt != same:
            raise InputError("the chat template renders the prompt differently before each answer")
        if chosen.ids == rejected.ids:
            raise InputError("`chosen` and `rejected` are the same to the tokenizer")
        return chosen, rejected

    def _answer(self, question: str, answer: str) -> Example:
        if self._template is not None:
            return self._conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))
        parts = [*self._bos, question + answer, *self._eos]
        return self._marked(parts, [((len(self._bos), len(question)), (len(parts), 0))])

    def _conversation(self, messages: Messages, untrained: Collection[int] = (), tools: Tools = ()) -> Example:
        """Encodes messages; every answer is trained but those of the messages that `untrained` numbers from 0."""
        assert self._template is not None
        self._check_tools(messages, tools)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [i for i in answers if self._all or i not in untrained]
        asked = [(messages[:i], True) for i in wanted]
        answered = [(messages[: i + 1], False) for i in wanted if i + 1 < len(messages)]
        conversations = ((messages, False), *asked, *answered)
        parts, *begun = self._template.parts_of([TemplateInput(*each, tools or None) for each in conversations])
        begun.append(parts)  # up to and with the last answer, if that is the end
        spans: dict[int, Span] = {}
        for i, before, after in zip(wanted, begun, begun[len(wanted) :], strict=False):
            ends = self._template.stop_ids if "tool_calls" in messages[i] else None
            spans[i] = _span(parts, before, after, i + 1, ends)
            _check_calls(messages[i], parts, spans[i], i + 1)
        last = max(spans)
        if last + 1 == len(messages) and spans[last][1] == _end(parts) and isinstance(parts[-1], str):
            parts = [*parts, *self._eos]  # the template ends an answer by nothing of its own
            spans[last] = (spans[last][0], _end(parts))
        trained, others = ([span for i, span in spans.items() if (i in untrained) is left] for left in (False, True))
        return self._marked(parts, trained, others)

    def _check_tools(self, messages: Messages, tools: Tools) -> None:
        """Raises InputError where the template would leave out what messages are about."""
        assert self._template is not None
        if tools and not self._template.takes_tools:
            raise InputError("has `tools`, and the chat template shows none to the model: give another by --template")
        for number, message in enumerate(messages, 1):
            if message["role"] not in self._template.roles:
                raise InputError(f"message {number} is a {message['role']}'s, and the chat template takes none")

    def _marked(self, parts: Sequence[Part], spans: Sequence[Span], others: Sequence[Span] = ()) -> Example:
        """Encodes parts up to the last span; the loss counts those within `spans`, or all but those within `others`."""

        def marked(place: Place) -> bool:
            within = any(start <= place < end for start, end in (others if self._all else spans))
            return not within if self._all else within

        ids: list[int] = []
        trained: list[bool] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids += self._tokenizer.checked([part])
                trained.append(marked((index, 0)))
                continue
            offsets = {0, len(part), *(offset for span in (*spans, *others) for at, offset in span if at == index)}
            for start, end in pairwise(sorted(offsets)):
                run = self._continuation(part[:start], part[start:end], later=index > 0)
                ids += run
                trained += [marked((index, start))] * len(run)
        size = len(ids) if self._all or True not in trained else len(ids) - trained[::-1].index(True)
        return Example(tuple(map(self._ids.setdefault, ids[:size], ids)), tuple(trained[:size]))

    def _continuation(self, before: str, text: str, later: bool) -> list[int]:
        """The ids of `text` after those of `before`: of the two together, or where they would merge, by itself.

        `later`: whether anything stands before both.
        """
        encode = self._tokenizer.encode_later if later else partial(self._tokenizer.encode, add_bos=False)
        if not before:
            return encode(text)
        for beginning in (before, "\n"):  # with which a text's own first piece rarely merges
            first, both = encode(beginning), encode(beginning + text)
            if both[: len(first)] == first:
                return both[len(first) :]
        return encode(text)


def _last_answer(example: Example) -> tuple[Example, tuple[int, ...]]:
    """The example with no answer trained but its last, with which it ends; and the ids before that."""
    length = example.trained[::-1].index(False)
    before = len(example.ids) - length
    return Example(example.ids, (False,) * before + (True,) * length), example.ids[:before]


def _span(
    parts: list[Part], asked: list[Part], answered: list[Part], number: int, ends: Collection[int] | None = None
) -> Span:
    """The span from the model's first token of an answer to the end of its last.

    Args:
        parts: the whole conversation.
        asked: it, up to the answer, and what makes the model answer.
        answered: it, up to and with the answer, which is message `number`.
        ends: the control tokens that may end it, for calls have others in them; None for any.
    """
    start = _end(asked)
    first = start[0] + (start[1] > 0)
    closing = next(
        (
            i
            for i in range(first, len(answered))
            if isinstance(answered[i], int) and (ends is None or answered[i] in ends)
        ),
        None,
    )
    end = _end(answered) if closing is None else (closing + 1, 0)
    if _begins(parts, asked) and _begins(parts, answered if closing is None else answered[: closing + 1]):
        return start, end
    raise InputError(
        f"message {number}: the chat template renders a past answer differently from one to be given, "
        "so its tokens cannot be told from the rest"
    )


def _check_calls(message: Mapping[str, Any], parts: Sequence[Part], span: Span, number: int) -> None:
    """Raises InputError where a call of a function is not in what the template makes of its message."""
    (first, start), (last, end) = span
    for call in message.get("tool_calls", ()):
        texts = (
            part[start if i == first else 0 : end if i == last else None]
            for i, part in enumerate(parts)
            if isinstance(part, str) and first <= i <= last
        )
        if not any(call["function"]["name"] in text for text in texts):
            raise InputError(f"message {number}: the chat template leaves out its calls of functions")


def _end(parts: Sequence[Part]) -> Place:
    last = parts[-1]
    return (len(parts), 0) if isinstance(last, int) else (len(parts) - 1, len(last))


def _begins(parts: list[Part], beginning: list[Part]) -> bool:
    """Tells whether `parts` begin so; the last run of text may go on."""
    *whole, last = beginning
    if len(parts) < len(beginning) or parts[: len(whole)] != whole:
        return False
    found = parts[len(whole)]
    return found.startswith(last) if isinstance(found, str) and isinstance(last, str) else found == last
