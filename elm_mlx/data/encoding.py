"""A record as token ids, by the same template as chat, with the tokens that the loss counts marked.

Knows templates and tokenizers. Knows nothing of how long an example may be, of files and of batches; imports no MLX.

What stands before an answer is encoded as chat encodes it, and the answer by itself as its continuation, so that the
model is trained on the very ids that it will be asked with. An answer's tokens, with what ends it, are trained; what
the template writes after that, the model never has to say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from elm_mlx.data.records import Completion, Conversation, Instruction, Record, Text
from elm_mlx.errors import InputError
from elm_mlx.text.chat_template import Messages, Part, Template
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

Position = tuple[int, int]  # a part of a conversation, and a character in it


@dataclass(frozen=True)
class Example:
    """What the model reads, and what of it the loss counts.

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
        """Each of them in `texts`, as often as it is there."""
        return (found for text in texts for found in self._pattern.findall(text) if self._is_one(found))

    def marked(self, text: str) -> str:
        """`text` with each of them in ‹ ›."""
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

    def encode(self, record: Record) -> Example:
        """The whole record, however long.

        Raises:
            InputError: the template doesn't take it, or the tokenizer doesn't. The text is the reason alone.
        """
        if isinstance(record, Text):
            example = self._marked([*self._bos, record.text, *self._eos], [((0, 0), (3, 0))])
        elif isinstance(record, Conversation):
            example = self._conversation(record.messages, record.untrained)
        else:
            example = self._answer(*_question(record, self._template is None))
        if len(example.ids) < 2:
            raise InputError("is one token, which nothing predicts")
        return replace(example, trained=(False, *example.trained[1:]))

    def _answer(self, question: str, answer: str) -> Example:
        if self._template is not None:
            return self._conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))
        parts = [*self._bos, question + answer, *self._eos]
        return self._marked(parts, [((len(self._bos), len(question)), (len(parts), 0))])

    def _conversation(self, messages: Messages, untrained: Collection[int] = ()) -> Example:
        """Every answer is trained but those of the messages that `untrained` numbers from 0."""
        assert self._template is not None
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [i for i in answers if self._all or i not in untrained]
        asked = [(messages[:i], True) for i in wanted]
        answered = [(messages[: i + 1], False) for i in wanted if i + 1 < len(messages)]
        parts, *begun = self._template.parts_of([(messages, False), *asked, *answered])
        begun.append(parts)  # up to and with the last answer, if that is the end
        spans: dict[int, tuple[Position, Position]] = {}
        for i, before, after in zip(wanted, begun, begun[len(wanted) :], strict=False):
            spans[i] = _span(parts, before, after, i + 1)
        last = max(spans)
        if last + 1 == len(messages) and spans[last][1] == _end(parts) and isinstance(parts[-1], str):
            parts = [*parts, *self._eos]  # the template ends an answer by nothing of its own
            spans[last] = (spans[last][0], _end(parts))
        trained, others = ([span for i, span in spans.items() if (i in untrained) is left] for left in (False, True))
        return self._marked(parts, trained, others)

    def _marked(
        self,
        parts: Sequence[Part],
        spans: Sequence[tuple[Position, Position]],
        others: Sequence[tuple[Position, Position]] = (),
    ) -> Example:
        """The parts' ids, those within `spans` marked. What follows the last span is left out.

        Where all is wanted, everything is marked but what is within `others`.
        """
        bounds = [*spans, *others]

        def marked(position: Position) -> bool:
            return not _within(position, others) if self._all else _within(position, spans)

        ids: list[int] = []
        trained: list[bool] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids += self._tokenizer.checked([part])
                trained.append(marked((index, 0)))
                continue
            offsets = {0, len(part), *(offset for span in bounds for at, offset in span if at == index)}
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


def _question(record: Completion | Instruction, plain: bool) -> tuple[str, str]:
    """What is asked, and the answer; `plain` for a model without a template."""
    if isinstance(record, Completion):
        return record.prompt, record.completion
    if plain:
        prompt = ALPACA_WITH_INPUT if record.input else ALPACA
        return prompt.format(instruction=record.instruction, input=record.input), record.output
    return record.question, record.output


def _span(parts: list[Part], asked: list[Part], answered: list[Part], number: int) -> tuple[Position, Position]:
    """From where the model begins to answer to the end of what ends the answer.

    Args:
        parts: the whole conversation.
        asked: it, up to the answer, and what makes the model answer.
        answered: it, up to and with the answer, which is message `number`.
    """
    start = _end(asked)
    first = start[0] + (start[1] > 0)
    closing = next((i for i in range(first, len(answered)) if isinstance(answered[i], int)), None)
    end = _end(answered) if closing is None else (closing + 1, 0)
    if _begins(parts, asked) and _begins(parts, answered if closing is None else answered[: closing + 1]):
        return start, end
    raise InputError(
        f"message {number}: the chat template shows a past answer otherwise than it has the model give it, "
        "so its tokens cannot be told from the rest"
    )


def _end(parts: Sequence[Part]) -> Position:
    last = parts[-1]
    return (len(parts), 0) if isinstance(last, int) else (len(parts) - 1, len(last))


def _begins(parts: list[Part], beginning: list[Part]) -> bool:
    """Whether `parts` begin so; the last run of text may go on."""
    *whole, last = beginning
    if len(parts) < len(beginning) or parts[: len(whole)] != whole:
        return False
    found = parts[len(whole)]
    return found.startswith(last) if isinstance(found, str) and isinstance(last, str) else found == last


def _within(position: Position, spans: Sequence[tuple[Position, Position]]) -> bool:
    return any(start <= position < end for start, end in spans)
