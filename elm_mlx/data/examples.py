"""A split's records as token ids, by the same template as chat, with the tokens that the loss counts marked.

What stands before an answer is encoded as chat encodes it, and the answer by itself as its continuation, so that the
model is trained on the very ids that it will be asked with. An answer's tokens, with what ends it, are trained; what
the template writes after that, the model never has to say. Imports no MLX.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from elm_mlx.data import records
from elm_mlx.data.records import Completion, Conversation, Instruction, Record, Text
from elm_mlx.errors import InputError, counted
from elm_mlx.model.families import Config, FamilyConfig
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


_LONGEST = 2048  # tokens of an example where nobody says; the context of some families is a hundred times as much
_PURPOSES = {"valid": "validate"}
_KEYS = 8  # keys without meaning that are named


@dataclass
class Prepared:
    """A split's examples, and what became of the rest.

    Attributes:
        max_length, truncate, context: as they were prepared.
        examples: each at most `max_length` tokens.
        sources: file and line of each example.
        lengths: tokens of each whole record, before anything was cut.
        counts: records of each format, by its class's name.
        bad: of each record that gave no example because it isn't whole, where it stands and what is wrong.
        ignored: keys of records that mean nothing here, each with how many records have it.
        missing: what is told where shards of the data are not there.
        written: names of special tokens that stand in the records' texts, with how often.
        longest: the longest record's tokens, and where it stands.
        split: texts that were split, into `windows` examples.
        cut: answers that lost their end.
        left_out: records that were too long; where they were to be cut, their answer began too late.
    """

    max_length: int
    truncate: bool = False
    context: int | None = None
    examples: list[Example] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    missing: str | None = None
    written: Counter[str] = field(default_factory=Counter)
    longest: tuple[int, str] = (0, "")
    split: int = 0
    windows: int = 0
    cut: int = 0
    left_out: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(sum(example.trained) for example in self.examples)

    def remarks(self) -> Iterator[tuple[str, str]]:
        """What of the data is not used as it might seem, each under a label."""
        if self.missing is not None:
            yield "files", self.missing
        if self.ignored:
            named = [f"{key} ({count:,})" for key, count in self.ignored.most_common(_KEYS)]
            more = len(self.ignored) - len(named)
            yield "ignored", f"keys without meaning here: {', '.join(named)}{f' and {more:,} more' if more else ''}"
        if self.written:
            named = [f"{name} ({count:,})" for name, count in self.written.most_common(_KEYS)]
            more = len(self.written) - len(named)
            what = f"names of special tokens in the texts: {', '.join(named)}{f' and {more:,} more' if more else ''}"
            why = "they are trained as letters, and end nothing; the tokens themselves come around a text or message"
            yield "special", f"{what}: {why}"
        for warning in self.warnings():
            yield "length", warning

    def warnings(self) -> list[str]:
        """A line for each thing that happened to examples for the sake of their length."""
        over = f"longer than {self.max_length:,} tokens"
        longest = f"the longest, {self.longest[1]}, has {self.longest[0]:,}"
        lines = []
        if self.split:
            lines.append(f"{counted(self.split, 'text')} {over} split into {self.windows:,} examples; {longest}")
        if self.cut:
            lines.append(
                f"{self.cut:,} of {counted(len(self.lengths), 'record')} {over}: their end is cut off; {longest}"
            )
        if self.left_out:
            why = ", as cut they would teach nothing" if self.truncate else ""
            remedies = ", ".join(self._remedies())
            left_out = f"{self.left_out:,} of {counted(len(self.lengths), 'record')} {over}: left out{why}; {longest}"
            lines.append(f"{left_out}; {remedies}" if remedies else left_out)
        return lines

    def _remedies(self) -> Iterator[str]:
        """What would keep records that were left out."""
        if not self.truncate:
            yield "--truncate cuts them"
        if self.context is None or self.max_length < self.context:
            all_fit = self.context is None or self.longest[0] <= self.context
            yield f"a larger --max-seq-length keeps {'them' if all_fit else 'more'}"


def longest(config: Config) -> int:
    """Tokens of an example at most, unless someone says otherwise."""
    most = config.max_context_length
    return min(most, _LONGEST) if isinstance(config, FamilyConfig) else most


class BadRecords(InputError):
    """Records are not whole. `reasons` has a line for each: where it stands, and what is wrong."""

    def __init__(self, reasons: Sequence[str]) -> None:
        others = f"{len(reasons) - 1:,} more {'is' if len(reasons) == 2 else 'are'} bad"
        more = f" ({others}; `elm-mlx data` names them all)" if len(reasons) > 1 else ""
        super().__init__(f"{reasons[0]}{more}; mend the data, or --skip-bad leaves such records out")
        self.reasons = tuple(reasons)


def load(
    path: Path,
    tokenizer: Tokenizer,
    template: Template | None,
    max_length: int,
    *,
    context: int | None = None,
    format: str | None = None,
    train_on_prompt: bool = False,
    truncate: bool = False,
    skip_bad: bool = False,
) -> dict[str, Prepared]:
    """All the examples of a file or directory by split, `train` first; see `records.read` and `prepare`.

    Args:
        context: tokens that the model reads, if it is known: `max_length` is no more.
        skip_bad: leave bad records out; `Prepared.bad` names them.

    Raises:
        BadRecords: some are, and not to be skipped.
        InputError: no example is left of a split; as `check_length`, or as `records.read`.
        ElmError: as `records.read`.
    """
    check_length(max_length, context)
    splits = {
        name: prepare(split, tokenizer, template, max_length, train_on_prompt, truncate, context)
        for name, split in records.read(path, format).items()
    }
    check(path, splits, skip_bad)
    return splits


def check_length(max_length: int, context: int | None) -> None:
    """Raises InputError where examples of `max_length` tokens are none, or more than the model reads."""
    if max_length < 2:
        raise InputError(f"--max-seq-length {max_length}: an example has two tokens or more")
    if context is not None and max_length > context:
        raise InputError(
            f"--max-seq-length {max_length}: the model reads {context} tokens at most, its context; give no more"
        )


def check(path: Path, splits: Mapping[str, Prepared], skip_bad: bool) -> None:
    """Whether all records of `path` are whole, or `skip_bad`, and each split has an example. Raises as `load`."""
    bad = [reason for split in splits.values() for reason in split.bad]
    if bad and not skip_bad:
        raise BadRecords(bad)
    for name, split in splits.items():
        if not split.examples:
            lost = "; ".join(split.warnings()) or split.bad[0]
            raise InputError(f"{path}: no example is left to {_PURPOSES.get(name, name)} on: {lost}")


def without_template(where: str, messages: Messages) -> InputError:
    """The error of a model that cannot read `messages`."""
    what = "has a system prompt" if messages[0]["role"] == "system" else "is a conversation"
    hint = "--template openelm-instruct, or a file, gives it one"
    return InputError(f"{where}: {what}, and the model has no chat template; {hint}")


def prepare(
    split: records.Split,
    tokenizer: Tokenizer,
    template: Template | None,
    max_length: int,
    train_on_prompt: bool = False,
    truncate: bool = False,
    context: int | None = None,
) -> Prepared:
    """Encodes a split's records and holds them to `max_length` tokens, two or more.

    A longer text is split into examples that overlap by a token, so that each token is learnt once, after as much
    of the text as fits. Other records that are longer are left out. With `truncate` all of them lose their end.

    Args:
        template: None for a base model, which continues plain text.
        train_on_prompt: the loss counts every token.
        context: tokens that the model reads, if it is known; for what is told of records that are left out.

    Raises:
        InputError: there are conversations, and no template.
    """
    encoder = Encoder(tokenizer, template, train_on_prompt)
    prepared = Prepared(
        max_length, truncate, context, bad=list(split.bad), ignored=split.ignored, missing=split.missing
    )
    for record in split.records:
        if template is None and isinstance(record, Conversation):
            raise without_template(record.where, record.messages)
        try:
            example = encoder.encode(record)
        except InputError as error:
            prepared.bad.append(f"{record.where}: {error}")
            continue
        prepared.written.update(encoder.names.find(records.texts(record)))
        kind = type(record).__name__
        prepared.counts[kind] = prepared.counts.get(kind, 0) + 1
        _fit(prepared, example, record, truncate)
    return prepared


def _fit(prepared: Prepared, example: Example, record: Record, truncate: bool) -> None:
    """Adds what of the example fits."""
    size, length = prepared.max_length, len(example.ids)
    prepared.lengths.append(length)
    prepared.longest = max(prepared.longest, (length, record.where), key=lambda longest: longest[0])
    fitting = [example]
    if length > size and isinstance(record, Text) and not truncate:
        starts = range(0, length - 1, size - 1)
        fitting = [_slice(example, start, start + size) for start in starts]
        prepared.split += 1
        prepared.windows += len(fitting)
    elif length > size:
        begun = _slice(example, 0, size)
        fitting = [begun] if truncate and any(begun.trained) else []
        prepared.cut += len(fitting)
        prepared.left_out += not fitting
    prepared.examples += fitting
    prepared.sources += [record.where] * len(fitting)


def _slice(example: Example, start: int, end: int) -> Example:
    return Example(example.ids[start:end], (False, *example.trained[start + 1 : end]))
