"""A split's records as examples that are no longer than they may be, and what became of the rest.

Knows lengths, and what is done with a record that is too long or not whole. Knows nothing of how a record becomes
tokens, of files' formats and of batches; imports no MLX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elm_mlx.data import records
from elm_mlx.data.encoding import Encoder, Example
from elm_mlx.data.records import Conversation, Record, Text
from elm_mlx.errors import InputError, counted
from elm_mlx.model.families import Config, FamilyConfig
from elm_mlx.text.chat_template import Messages, Template
from elm_mlx.text.tokenizer import Tokenizer

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
