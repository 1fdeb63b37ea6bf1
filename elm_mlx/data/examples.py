"""The examples of a data set: a split's records, encoded and held to a length, with an account of what became of them.

Imports no MLX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elm_mlx.data import records
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.columns import Columns
from elm_mlx.data.encoding import Encoder, Example
from elm_mlx.data.records import PlainText, Preference, Record
from elm_mlx.errors import InputError
from elm_mlx.model.config import Config
from elm_mlx.model.families import FamilyConfig
from elm_mlx.reading import counted
from elm_mlx.text.chat_template import Template
from elm_mlx.text.tokenizer import Tokenizer

_LONGEST = 2048  # tokens of an example where nobody says; the context of some families is a hundred times as much


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
        yield from records.remarks(records.Split((), self.ignored, self.missing, self.columns))
        if self.written:
            why = "they are trained as letters, and end nothing; the tokens themselves come around a text or message"
            yield "special", f"names of special tokens in the texts: {records.with_counts(self.written)}: {why}"
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
        encoder.check_template(record)
        try:
            made = encoder.encode_pair(record) if isinstance(record, Preference) else (encoder.encode(record),)
        except InputError as error:
            prepared.bad.append(f"{record.where}: {error}")
            continue
        prepared.written.update(encoder.names.find(records.texts(record)))
        prepared.counts[record.kind] += 1
        _fit(prepared, made, record)
    return prepared


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
