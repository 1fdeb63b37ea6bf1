"""A split's records as token ids, by the same template as chat, with the tokens that the loss counts marked.

What stands before an answer is encoded as chat encodes it, and the answer by itself as its continuation, so that the
model is trained on the very ids that it will be asked with. An answer's tokens, with what ends it, are trained; what
the template writes after that, the model never has to say. Imports no MLX.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from elm_mlx.data import records
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.columns import Columns
from elm_mlx.data.records import Conversation, Instruction, PlainText, Preference, PromptAnswer, Record
from elm_mlx.errors import InputError
from elm_mlx.model.config import Config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.reading import counted
from elm_mlx.text.chat_template import Messages, Part, Template, Tools
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

_LONGEST = 2048  # tokens of an example where nobody says; the context of some families is a hundred times as much
_NAMED = 8  # keys, or names, in a remark

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
        parts, *begun = self._template.parts_of([(messages, False), *asked, *answered], tools or None)
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


@dataclass
class Prepared:
    """A split's examples, and an account of the records that gave none, or shorter ones.

    Attributes:
        max_length, truncate, context: as they were prepared.
        examples: each at most `max_length` tokens. Of a pair there are two, the preferred answer's first; all else
            counts pairs, of which a length is that of the longer answer.
        parts: the sources, and how many of the examples each gave.
        sources: file and line of each example.
        lengths: tokens of each whole record, before anything was cut.
        counts: records of each kind.
        bad: place and reason of each record that gave no example because it cannot be used.
        ignored: keys of records without meaning here, each with how many records have it.
        missing: a line about shards that are not there.
        columns, formats: as `records.Split` has them.
        written: names of special tokens that stand in the records' texts, with how often.
        longest: the longest record's tokens, and its place.
        split: texts that were split, into `windows` examples.
        cut: answers that lost their end.
        left_out: records that were too long; where they were to be cut, their answer began too late.
    """

    max_length: int
    truncate: bool = False
    context: int | None = None
    examples: list[Example] = field(default_factory=list)
    parts: list[tuple[str, int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    missing: str | None = None
    columns: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
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
        """Yields a line for each part of the data that is not used as it might seem, under a label."""
        if self.missing is not None:
            yield "files", self.missing
        for chosen, files in self.columns.items():
            yield "columns", chosen if files == 1 else f"{chosen}; {counted(files, 'file')}"
        if self.ignored:
            yield "ignored", f"keys without meaning here: {_listed(self.ignored)}"
        if self.written:
            why = "they are trained as letters, and end nothing; the tokens themselves come around a text or message"
            yield "special", f"names of special tokens in the texts: {_listed(self.written)}: {why}"
        for warning in self.warnings():
            yield "length", warning

    def warnings(self) -> list[str]:
        """Returns a line for each thing that happened to examples for the sake of their length."""
        over = f"longer than {self.max_length:,} tokens"
        of_all = f"of {counted(len(self.lengths), 'record')} {over}"
        longest = f"the longest, {self.longest[1]}, has {self.longest[0]:,}"
        lines = []
        if self.split:
            lines.append(f"{counted(self.split, 'text')} {over} split into {self.windows:,} examples; {longest}")
        if self.cut:
            lines.append(f"{self.cut:,} {of_all}: their end is cut off; {longest}")
        if self.left_out:
            why = ", as cut they would teach nothing" if self.truncate else ""
            remedies = [] if self.truncate else ["--truncate cuts them"]
            if self.context is None or self.max_length < self.context:
                all_fit = self.context is None or self.longest[0] <= self.context
                remedies.append(f"a larger --max-seq-length keeps {'them' if all_fit else 'more'}")
            remedy = f"; {', '.join(remedies)}" if remedies else ""
            lines.append(f"{self.left_out:,} {of_all}: left out{why}; {longest}{remedy}")
        return lines


def _listed(counts: Counter[str]) -> str:
    named = [f"{key} ({count:,})" for key, count in counts.most_common(_NAMED)]
    more = len(counts) - len(named)
    return f"{', '.join(named)}{f' and {more:,} more' if more else ''}"


def longest(config: Config) -> int:
    """Returns the most tokens that an example has by default."""
    most = config.max_context_length
    return min(most, _LONGEST) if isinstance(config, FamilyConfig) else most


class BadRecords(InputError):
    """Records cannot be used. `reasons` has a line for each: its place and what is wrong."""

    def __init__(self, reasons: Sequence[str]) -> None:
        others = f"{len(reasons) - 1:,} more {'is' if len(reasons) == 2 else 'are'} bad"
        more = f" ({others}; `elm-mlx data` names them all)" if len(reasons) > 1 else ""
        super().__init__(f"{reasons[0]}{more}; mend the data, or --skip-bad leaves such records out")
        self.reasons = tuple(reasons)


def load(
    path: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    template: Template | None,
    max_length: int,
    *,
    context: int | None = None,
    format: str | None = None,
    paired: bool = False,
    columns: Columns | None = None,
    train_on_prompt: bool = False,
    truncate: bool = False,
    skip_bad: bool = False,
) -> dict[str, Prepared]:
    """Loads the examples of a file, directory or data set by split, `train` first; see `records.read` and `prepare`.

    Args:
        path: one, or several, whose examples follow one another; `Prepared.parts` has how many each gave.
        context: tokens that the model reads, if it is known: `max_length` is no more.
        paired: the records are pairs of answers; those are trained alone.
        columns: that are taken, as in `records.read`.
        skip_bad: leave bad records out; `Prepared.bad` names them.

    Raises:
        BadRecords: some are, and not to be skipped.
        InputError: no example is left of a split; examples of `max_length` tokens are none, or more than the model
            reads; or as `records.read` and `prepare`.
        ElmError: as `records.read`.
    """
    if max_length < 2:
        raise InputError(f"--max-seq-length {max_length}: must be 2 or more")
    if context is not None and max_length > context:
        raise InputError(
            f"--max-seq-length {max_length}: the model reads {context} tokens at most, its context; give no more"
        )
    found: dict[str, list[Prepared]] = {}
    for source in [path] if isinstance(path, (str, Path)) else path:
        for name, split in records.read(source, format, paired=paired, columns=columns).items():
            made = prepare(split, tokenizer, template, max_length, train_on_prompt, truncate, context)
            made.parts = [(str(source), len(made.examples))]
            found.setdefault(name, []).append(made)
    bad = [reason for splits in found.values() for each in splits for reason in each.bad]
    if bad and not skip_bad:
        raise BadRecords(bad)
    for name, prepared in ((name, each) for name, splits in found.items() for each in splits):
        if not prepared.examples:
            lost = "; ".join(prepared.warnings()) or prepared.bad[0]
            purpose = "validate" if name == "valid" else name
            raise InputError(f"{prepared.parts[0][0]}: no example is left to {purpose} on: {lost}")
    return {name: _joined(found[name]) for name in ("train", "valid", "test") if name in found}


def _joined(splits: Sequence[Prepared]) -> Prepared:
    """The same split of several sources as one."""
    whole = splits[0]
    if len(splits) > 1:
        for each in splits:
            each.columns = Counter({f"{each.parts[0][0]}: {how}": files for how, files in each.columns.items()})
    for other in splits[1:]:
        whole.examples += other.examples
        whole.sources += other.sources
        whole.lengths += other.lengths
        whole.parts += other.parts
        whole.bad += other.bad
        for name in ("counts", "ignored", "columns", "formats", "written"):
            getattr(whole, name).update(getattr(other, name))
        whole.missing = "; ".join(filter(None, (whole.missing, other.missing))) or None
        whole.longest = max(whole.longest, other.longest, key=lambda longest: longest[0])
        whole.split, whole.windows = whole.split + other.split, whole.windows + other.windows
        whole.cut, whole.left_out = whole.cut + other.cut, whole.left_out + other.left_out
    return whole


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
    of the text as fits. Other records that are longer are left out. With `truncate` all of them lose their end; a pair
    loses its ends as long as what is left differs.

    Args:
        template: None for a base model, which continues plain text.
        train_on_prompt: the loss counts every token.
        context: tokens that the model reads, if it is known; for the remedies that warnings name.

    Raises:
        InputError: there are conversations, and no template.
    """
    encoder = Encoder(tokenizer, template, train_on_prompt)
    prepared = Prepared(
        max_length, truncate, context, ignored=split.ignored, missing=split.missing, columns=split.columns,
        formats=split.formats,
    )  # fmt: skip
    for record in split.records:
        if isinstance(record, BadRecord):
            prepared.bad.append(str(record))
            continue
        if template is None:
            _check_plain(record)
        try:
            made = encoder.encode_pair(record) if isinstance(record, Preference) else (encoder.encode(record),)
        except InputError as error:
            prepared.bad.append(f"{record.where}: {error}")
            continue
        prepared.written.update(encoder.names.find(records.texts(record)))
        prepared.counts[record.kind] += 1
        _fit(prepared, made, record)
    return prepared


def _check_plain(record: Record) -> None:
    """Raises InputError where a record needs a template."""
    messages = record.prompt if isinstance(record, Preference) else getattr(record, "messages", "")
    if not isinstance(messages, str):
        what = "has a system prompt" if messages[0]["role"] == "system" else "is a conversation"
        hint = "--template openelm-instruct, or a file, gives it one"
        raise InputError(f"{record.where}: {what}, and the model has no chat template; {hint}")


def _fit(prepared: Prepared, made: Sequence[Example], record: Record) -> None:
    """Adds what fits of a record's examples."""
    size, length = prepared.max_length, max(len(example.ids) for example in made)
    prepared.lengths.append(length)
    prepared.longest = max(prepared.longest, (length, record.where), key=lambda longest: longest[0])
    if length > size and isinstance(record, PlainText) and not prepared.truncate:
        made = [_slice(made[0], start, start + size) for start in range(0, length - 1, size - 1)]
        prepared.split += 1
        prepared.windows += len(made)
    elif length > size:
        made = [_slice(example, 0, size) for example in made]
        differ = len({example.ids for example in made}) == len(made)
        if prepared.truncate and differ and all(any(example.trained) for example in made):
            prepared.cut += 1
        else:
            prepared.left_out += 1
            made = []
    prepared.examples += made
    prepared.sources += [record.where] * len(made)


def _slice(example: Example, start: int, end: int) -> Example:
    return Example(example.ids[start:end], (False, *example.trained[start + 1 : end]))
