"""Questions and texts as token ids: a continuation is scored after its context, a text in windows.

Questions are cut into context and continuation as LM Evaluation Harness cuts them. Of other records the answers are
scored, after the same ids that training puts before them. Perplexity is that of the model's own tokens; bits per byte
compare models whose tokenizers differ, for the bytes are the text's own.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from elm_mlx.data import records
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.columns import Columns
from elm_mlx.data.encoding import Encoder
from elm_mlx.data.examples import BadRecords
from elm_mlx.data.records import Conversation, Instruction, PlainText, PromptAnswer, Record
from elm_mlx.errors import InputError
from elm_mlx.evaluate.scores import Score
from elm_mlx.text.chat_template import Template
from elm_mlx.text.tokenizer import Tokenizer, check_unicode


@dataclass(frozen=True)
class Scored:
    """Token ids, scored from index `start` on, which is at least 1; `cut` of them were left out in front."""

    ids: list[int]
    start: int
    cut: int = field(default=0, compare=False)


def encode(requests: Sequence[tuple[str, str]], tokenizer: Tokenizer, context: int) -> list[Scored]:
    """Encodes pairs of context and continuation, BOS in front, cut from the left to what the model can read.

    Spaces at the context's end go to the continuation. The whole and the context are encoded, and the tokens of the
    whole past the context's number of them are scored, after the context's own tokens (which are not the whole's where
    a token spans the border).

    Args:
        context: tokens that the model can read at once; the last one that is scored is never read.

    Raises:
        InputError: a continuation is longer than that, or has no tokens.
    """
    known: dict[str, list[int]] = {}  # contexts, which choices share
    first = _first(tokenizer)
    found = []
    for text, after in requests:
        bare = text.rstrip()
        if text == "":
            read = [] if first is None else [first]
            scored = tokenizer.encode(after, add_bos=False)
            if not read or (scored and scored[0] == first):
                read, scored = scored[:1], scored[1:]
        else:
            if bare not in known:
                known[bare] = tokenizer.encode(bare)
            read = known[bare]
            scored = tokenizer.encode(text + after)[len(read) :]
        if not scored or not read:
            raise InputError(f"nothing to score in {after[:60]!r} after {text[-60:]!r}")
        if len(scored) > context:
            raise InputError(
                f"an answer of {len(scored)} tokens exceeds the model's context of {context}: {after[:60]!r}"
            )
        ids = (read + scored)[-(context + 1) :]
        found.append(Scored(ids, len(ids) - len(scored), len(read) + len(scored) - len(ids)))
    return found


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes a text after the token that predicts its first one, as the harness: BOS, or else EOS."""
    ids, first = tokenizer.encode(text), _first(tokenizer)
    return ids if first is None or ids[:1] == [first] else [first, *ids]


def _first(tokenizer: Tokenizer) -> int | None:
    return tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id


def digest(sequences: Sequence[Scored]) -> str:
    """A hash of an item's ids and of which of them are scored."""
    state = hashlib.blake2b(digest_size=8)
    for each in sequences:
        state.update(array("q", [len(each.ids), each.start, *each.ids]).tobytes())
    return state.hexdigest()


@dataclass(frozen=True)
class TextWindows:
    """Windows over all documents of a data set. `logprobs` below has the summed log-probability of each window.

    Attributes:
        documents: the number of each window's document.
        bytes: of each document's scored text, in UTF-8.
        digest: a hash of all the documents, whatever the tokenizer.
        split: the one that was read; empty for a file.
        bad: place and reason of each record that was left out.
        remarks: lines for people, under labels, as of `records.remarks`.
    """

    windows: list[Scored]
    documents: list[int]
    bytes: list[int]
    digest: str
    split: str = ""
    bad: tuple[str, ...] = ()
    remarks: tuple[tuple[str, str], ...] = ()

    def bits_per_byte(self, logprobs: Sequence[float]) -> Score:
        """Returns bits per byte over all documents; the standard error is over documents, where there are several."""
        nats, total, count = self._by_document(logprobs), sum(self.bytes), len(self.bytes)
        value = -sum(nats) / total / math.log(2)
        if count < 2:
            return Score(value, None, count)
        # Of a ratio of sums, to first order.
        rest = [-each / math.log(2) - value * size for each, size in zip(nats, self.bytes, strict=True)]
        return Score(value, math.sqrt(count / (count - 1) * sum(each**2 for each in rest)) / total, count)

    def shares(self, logprobs: Sequence[float]) -> list[float]:
        """Returns each document's part in `bits_per_byte`, which is their mean; empty for one document.

        Two models' can be compared document by document, as they share the bytes.
        """
        nats, total, count = self._by_document(logprobs), sum(self.bytes), len(self.bytes)
        return [-each / math.log(2) * count / total for each in nats] if count > 1 else []

    def perplexity(self, logprobs: Sequence[float]) -> Score:
        """Returns the perplexity of the model's own tokens, which cannot be compared between tokenizers."""
        scored = sum(len(each.ids) - each.start for each in self.windows)
        return Score(math.exp(min(700.0, -sum(logprobs) / scored)), None, len(self.bytes))

    def _by_document(self, logprobs: Sequence[float]) -> list[float]:
        nats = [0.0] * len(self.bytes)
        for document, value in zip(self.documents, logprobs, strict=True):
            nats[document] += value
        return nats


def read_text(
    source: str | Path,
    tokenizer: Tokenizer,
    window: int,
    stride: int,
    template: Callable[[], Template | None] = lambda: None,
    columns: Columns | None = None,
    skip_bad: bool = False,
) -> TextWindows:
    """Reads a data set of any kind that training takes: of a directory its `test`, or else `valid`, or else `train`.

    A text is scored whole, but for the end that training puts after it. Of prompts with completions, instructions and
    conversations, what training would learn is scored, end tokens too, and the rest is context.

    Args:
        window: tokens read at once.
        stride: tokens scored in each window but the first; all before them is context.
        template: gives the chat template, where a record needs to know it.
        columns, skip_bad: as of `examples.load`.

    Raises:
        BadRecords: some are, and not to be skipped.
        InputError: the file cannot be read, holds no text, or the stride does not fit the window.
    """
    if not 1 <= stride <= window:
        raise InputError(f"--stride {stride}: must lie between 1 and the window, {window}")
    splits = records.read(source, columns=columns)
    name = next(name for name in ("test", "valid", "train") if name in splits)
    split, bad, encoder = splits[name], list[str](), None
    windows, documents, sizes, state = list[Scored](), list[int](), list[int](), hashlib.blake2b(digest_size=8)
    for record in split.records:
        if isinstance(record, BadRecord):
            bad.append(str(record))
            continue
        if encoder is None and not isinstance(record, PlainText):
            encoder = Encoder(tokenizer, template())
        if encoder is not None:
            encoder.check_template(record)
        try:
            scored = list(_windows(record, tokenizer, encoder, window, stride))
        except InputError as error:
            bad.append(f"{record.where}: {error}")
            continue
        learnt = _learnt(record)
        for text in (*records.texts(record), *([] if isinstance(record, PlainText) else [learnt])):
            state.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        windows += scored
        documents += [len(sizes)] * len(scored)
        sizes.append(len(learnt.encode()))
    if bad and not skip_bad:
        raise BadRecords(bad)
    if not windows:
        raise InputError(f"{source}: holds no text" + (f": {bad[0]}" if bad else ""))
    said = tuple(records.remarks(split))
    if name == "train" and Path(source).is_dir():
        said = (("read", "its train, for it has no test and no valid"), *said)
    shown = name if len(splits) > 1 else ""
    return TextWindows(windows, documents, sizes, state.hexdigest(), shown, tuple(bad), said)


def _windows(
    record: Record, tokenizer: Tokenizer, encoder: Encoder | None, window: int, stride: int
) -> Iterator[Scored]:
    """Windows over what is scored of a record. Raises InputError."""
    if isinstance(record, PlainText):
        check_unicode(record.text)
        yield from slide(encode_text(record.text, tokenizer), window, stride)
        return
    assert encoder is not None
    example = encoder.encode(record)
    end = 0
    for trained, run in groupby(example.trained):
        begin, end = end, end + len(list(run))
        if trained:
            yield from slide(example.ids[:end], window, stride, begin)


def _learnt(record: Record) -> str:
    """The text that a model learns of a record, whatever its template."""
    if isinstance(record, PlainText):
        return record.text
    if isinstance(record, PromptAnswer):
        return record.completion
    if isinstance(record, Instruction):
        return record.output
    assert isinstance(record, Conversation)
    answers = (
        message
        for number, message in enumerate(record.messages)
        if message["role"] == "assistant" and number not in record.untrained
    )
    return "".join(
        message["content"] + "".join(json.dumps(call["function"]) for call in message.get("tool_calls", ()))
        for message in answers
    )


def slide(ids: Sequence[int], window: int, stride: int, first: int = 1) -> Iterator[Scored]:
    """Windows over `ids`: all from number `first` on are scored once, and no more than `window` are read for each."""
    end = first
    while end < len(ids):
        scored = min(max(window + 1 - end, stride), len(ids) - end)
        end += scored
        start = max(0, end - 1 - window)
        yield Scored(list(ids[start:end]), end - start - scored)
