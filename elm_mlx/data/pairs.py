"""Pairs of answers to one prompt, of which the first is preferred: from files to ids, and from ids to batches.

Knows the layouts of such records, and that both answers of a pair are asked for by the same ids. Reading, encoding,
order and packing are those of every other training: a pair is one example to them, of two segments. Knows nothing of
losses and models; its arrays are NumPy's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from elm_mlx.data import examples, records
from elm_mlx.data.batches import Batch, Batches, Row
from elm_mlx.data.data_files import BadRecord
from elm_mlx.data.examples import Encoder, Example, Prepared
from elm_mlx.data.records import Completion, Conversation
from elm_mlx.errors import InputError
from elm_mlx.text.chat_template import Template
from elm_mlx.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
_KNOWN = {"prompt", *records.PAIR, *records.KNOWN}


@dataclass(frozen=True)
class Preference:
    """A record. `where` is its file and line.

    Attributes:
        prompt: a text, or the messages that stand before the answer.
    """

    where: str
    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str


def preference(where: str, value: Any) -> Preference:
    """The record that a JSON value is.

    `chosen` and `rejected` are texts, with `prompt` a text or a list of messages. Or they are lists of messages that
    end with an answer, and begin alike: with the prompt, as UltraFeedback's do, or else `prompt` comes before them.

    Raises:
        BadRecord: it is none.
    """
    records.check_keys(value)
    missing = next((key for key in records.PAIR if key not in value), None)
    if missing:
        lora = any(all(key in value for key in keys) for _, keys in records.FORMATS.values())
        hint = "; `elm-mlx lora` trains on such records" if lora else ""
        raise BadRecord(f"`{missing}` is missing; a pair has `prompt`, `chosen` and `rejected`{hint}")
    (before, chosen), (same, rejected) = (_answer(value[key], key) for key in records.PAIR)
    if before != same:
        raise BadRecord("`chosen` and `rejected` differ in more than their last answer")
    if chosen == rejected:
        raise BadRecord("`chosen` and `rejected` are the same")
    prompt = _prompt(value.get("prompt"), before, isinstance(value["chosen"], str))
    made = Preference(where, _after(records.system_of(value), prompt), chosen, rejected)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        try:
            _record(made, answer)
        except BadRecord as error:
            raise BadRecord(f"`{key}`: {error}") from None
    return made


def _answer(value: Any, key: str) -> tuple[tuple[Message, ...], str]:
    """What stands before an answer, and the answer."""
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        *before, last = _turns(value, key)
        if last["role"] != "assistant" or not isinstance(last["content"], str):
            raise BadRecord(f"`{key}` doesn't end with a message of the assistant's")
        if not records.is_trained(value[-1], f"`{key}` "):
            raise BadRecord(f"`{key}` ends with an answer that is not to be trained on")
        value, messages = last["content"], tuple(before)
    else:
        messages = ()
    if not isinstance(value, str):
        raise BadRecord(f"`{key}` is neither a text nor a list of messages")
    if not value.strip():
        raise BadRecord(f"`{key}` is empty")
    return messages, value


def _turns(messages: Sequence[Mapping[str, Any]], key: str) -> tuple[Message, ...]:
    """Messages with nothing but `role` and `content`, which need not be what they should. Raises BadRecord."""
    for number, message in enumerate(messages, 1):
        records.check_message(message, f"`{key}`, message {number} ")
    return tuple({name: message.get(name) for name in ("role", "content")} for message in messages)


def _after(system: str, prompt: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
    """A prompt after the record's system prompt, if it has one, which must not be another than that in it."""
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if not system:
        return prompt
    if messages[0]["role"] != "system":
        return ({"role": "system", "content": system}, *messages)
    if messages[0]["content"] != system:
        raise BadRecord("has a system prompt beside its messages, and another one in them: keep one")
    return messages


def _prompt(prompt: Any, before: tuple[Message, ...], plain: bool) -> str | tuple[Message, ...]:
    """What both answers answer.

    Args:
        before: messages that the answers come with.
        plain: the answers are texts.
    """
    if isinstance(prompt, str) and prompt.strip():
        if before:
            if all(str(message.get("content")).strip() != prompt.strip() for message in before):
                raise BadRecord("`prompt` is not what `chosen` and `rejected` answer")
            return before
        return prompt if plain else ({"role": "user", "content": prompt},)
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        asked = _turns(prompt, "prompt")
        if before and before != asked:
            raise BadRecord("`prompt` is not what `chosen` and `rejected` answer")
        return asked
    if prompt is None and before:
        return before
    raise BadRecord("`prompt` is " + ("missing" if prompt is None else "neither a text nor a list of messages"))


def _record(made: Preference, answer: str) -> Completion | Conversation:
    """One of its answers as a record of its own. Raises BadRecord."""
    if isinstance(made.prompt, str):
        return Completion(made.where, made.prompt, answer)
    make, _ = records.FORMATS["messages"]
    conversation = make(made.where, {"messages": [*made.prompt, {"role": "assistant", "content": answer}]})
    assert isinstance(conversation, Conversation)
    return conversation


def are_pairs(path: Path) -> bool:
    """Whether the first record to train on is a pair. Raises InputError, ElmError as `load`."""
    entries = records.values(records.files(path)["train"].paths, records.PAIR)
    return records.is_pair(next((value for _, value in entries if isinstance(value, dict)), None))


def load(
    path: Path,
    tokenizer: Tokenizer,
    template: Template | None,
    max_length: int,
    *,
    context: int | None = None,
    truncate: bool = False,
    skip_bad: bool = False,
) -> dict[str, Prepared]:
    """All the pairs of a file or directory by split, `train` first; see `records.read` and `prepare`.

    Raises:
        BadRecords, InputError, ElmError: as `examples.load`.
    """
    examples.check_length(max_length, context)
    splits = {}
    for name, found in records.files(path).items():
        entries = records.values(found.paths, _KNOWN)
        splits[name] = prepare(entries, tokenizer, template, max_length, truncate, context)
        splits[name].missing = found.missing
    examples.check(path, splits, skip_bad)
    return splits


def prepare(
    entries: Iterable[tuple[str, Any]],
    tokenizer: Tokenizer,
    template: Template | None,
    max_length: int,
    truncate: bool = False,
    context: int | None = None,
) -> Prepared:
    """Encodes pairs and holds both answers, each with its prompt, to `max_length` tokens.

    A pair of which one is longer is left out. With `truncate` it loses its ends, as long as what is left differs.

    Args:
        entries: values with where they stand, as `records.values`.
        template: None for a base model, which continues plain text.
        context: as of `examples.prepare`.

    Returns:
        Of each pair two examples, the preferred answer's first: all else counts pairs, of which a length is that of
        the longer answer.

    Raises:
        InputError: there are messages, and no template.
    """
    encoder = Encoder(tokenizer, template)
    prepared = Prepared(max_length, truncate, context)
    for where, value in entries:
        try:
            if isinstance(value, BadRecord):
                raise value
            record = preference(where, value)
        except BadRecord as error:
            prepared.bad.append(f"{where}: {error}")
            continue
        if template is None and not isinstance(record.prompt, str):
            raise examples.without_template(where, record.prompt)
        try:
            pair = encode(encoder, record)
        except InputError as error:
            prepared.bad.append(f"{where}: {error}")
            continue
        prepared.ignored.update(records.ignored(value, _KNOWN))
        asked = [record.prompt] if isinstance(record.prompt, str) else [each["content"] for each in record.prompt]
        prepared.written.update(encoder.names.find([*asked, record.chosen, record.rejected]))
        prepared.counts["Preference"] = prepared.counts.get("Preference", 0) + 1
        _fit(prepared, pair, where, truncate)
    return prepared


def encode(encoder: Encoder, record: Preference) -> tuple[Example, Example]:
    """The chosen answer and the rejected one, each after the same prompt, marked alone.

    Raises:
        InputError: the template doesn't take it, or the tokenizer doesn't. The text is the reason alone.
    """
    chosen, rejected = (
        _last_answer(encoder.encode(_record(record, answer))) for answer in (record.chosen, record.rejected)
    )
    if _prompt_ids(chosen) != _prompt_ids(rejected):
        raise InputError("the chat template writes the prompt in another way before each answer")
    if chosen.ids == rejected.ids:
        raise InputError("`chosen` and `rejected` are the same to the tokenizer")
    return chosen, rejected


def _last_answer(example: Example) -> Example:
    """The example with no other answer marked; it ends with this one."""
    length = example.trained[::-1].index(False)
    before = len(example.ids) - length
    return Example(example.ids, (False,) * before + (True,) * length)


def _prompt_ids(example: Example) -> tuple[int, ...]:
    return example.ids[: len(example.ids) - sum(example.trained)]


def _fit(prepared: Prepared, pair: tuple[Example, Example], where: str, truncate: bool) -> None:
    """Adds the pair, if it fits."""
    size, length = prepared.max_length, max(len(example.ids) for example in pair)
    prepared.lengths.append(length)
    prepared.longest = max(prepared.longest, (length, where), key=lambda longest: longest[0])
    if length > size:
        chosen, rejected = (Example(example.ids[:size], example.trained[:size]) for example in pair)
        if not truncate or not any(chosen.trained) or not any(rejected.trained) or chosen.ids == rejected.ids:
            prepared.left_out += 1
            return
        prepared.cut += 1
        pair = chosen, rejected
    prepared.examples += pair
    prepared.sources += [where, where]


@dataclass(frozen=True)
class PairBatch(Batch):
    """A batch whose segments are 1 for the chosen and 2 for the rejected answer of a row's first pair, 3 and 4 for
    its second, and so on.

    Attributes:
        pairs: (batch, most) int32: the numbers of each row's pairs; -1 where it has no more. `most` is the same for
            every row, and a power of two.
        reference: (batch, most, 2) float32: the reference's log-probabilities of the answers, 0 where there are none.
    """

    pairs: npt.NDArray[np.int32]
    reference: npt.NDArray[np.float32]

    def rows(self, at: slice) -> PairBatch:
        batch = super().rows(at)
        return PairBatch(**vars(batch), pairs=self.pairs[at], reference=self.reference[at])


class PairBatches(Batches):
    """Batches of pairs, every pair in one row. Otherwise as `Batches`, in whose `steps` and order a pair is an example.

    Args:
        pairs: two examples of each, as `prepare` gives them.
        row_length: positions of a row, at least as many as the tokens of a pair, less one.

    Attributes:
        reference: (pairs, 2): what the batches' `reference` is taken from; noughts, unless it is set.
    """

    def __init__(
        self,
        pairs: Sequence[Example],
        batch_size: int,
        row_length: int,
        *,
        packed: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        joined = Joined(pairs)
        super().__init__(joined, batch_size, row_length, packed=packed, seed=seed, rank=rank, world=world)
        self._pairs = pairs
        self.reference = np.zeros((len(joined), 2), np.float32)

    def _batch(self, rows: list[Row]) -> PairBatch:
        batch = super()._batch(rows)
        own = rows[self._rank :: self._world]
        most = 1 << (max(map(len, own), default=1) - 1).bit_length()
        size = len(batch.inputs)
        segments, pairs = np.zeros(batch.inputs.shape, np.int32), np.full((size, most), -1, np.int32)
        reference = np.zeros((size, most, 2), np.float32)
        for i, row in enumerate(own):
            pairs[i, : len(row)], reference[i, : len(row)] = row, self.reference[row]
            start = 0
            for segment, number in enumerate(row):
                # The chosen answer's last token is read too, and predicts nothing.
                middle = start + len(self._pairs[2 * number].ids)
                end = middle + len(self._pairs[2 * number + 1].ids) - 1
                segments[i, start:middle], segments[i, middle:end] = 2 * segment + 1, 2 * segment + 2
                start = end
        return PairBatch(batch.inputs, batch.targets, batch.trained, segments, batch.tokens, pairs, reference)


class Joined(Sequence[Example]):
    """Pairs as single examples, put together when asked for: prompt, chosen answer, prompt, rejected answer."""

    def __init__(self, pairs: Sequence[Example]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs) // 2

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...
    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        chosen, rejected = self._pairs[2 * number], self._pairs[2 * number + 1]
        return Example(chosen.ids + rejected.ids, chosen.trained + rejected.trained)
