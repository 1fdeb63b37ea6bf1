"""Records of training data, read from a file or a directory of splits; a bad one is named by file, line and reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from elm_mlx.data import columns as choose
from elm_mlx.data import data_files, hub_data, messages, split_files
from elm_mlx.data.bad_record import BadRecord, key_of, keys_of, kind_of
from elm_mlx.data.columns import KEYS, Columns
from elm_mlx.data.hub_data import HubData
from elm_mlx.data.messages import Turns
from elm_mlx.data.split_files import SplitFiles
from elm_mlx.errors import InputError
from elm_mlx.reading import counted

_BLOCK = 1024  # records
_NAMED = 8  # keys, or names, in a remark
_PAIR = ("chosen", "rejected")
_FOR_DPO = "is a pair of answers, `chosen` and `rejected`: `elm-mlx dpo` trains on those"
_FOR_LORA = "`elm-mlx lora` trains on such records"
_SYSTEM = ("system", "system_prompt")  # of a record, beside whatever else it has

# Of a record, keys that say something which nothing here does.
_NOT_USED = dict.fromkeys(
    ("documents", "chat_template_kwargs", "images", "audios", "videos"), messages.NO_TEMPLATE
) | {
    "history": "earlier turns: write all of them as `messages`",
    "loss_mask": "and what is trained on is decided here: a message may have a `weight` of 0",
}  # fmt: skip


@dataclass(frozen=True)
class PlainText:
    """Text to continue as it stands. `where` is its file and line, here and in the others."""

    kind: ClassVar = "text"
    where: str
    text: str


@dataclass(frozen=True)
class PromptAnswer:
    """A prompt and its completion."""

    kind: ClassVar = "completion"
    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """`messages`, as `messages.turns` makes them; at least one is the assistant's and not in `untrained`.

    Attributes:
        untrained: which messages, from 0, the loss does not count although they may be the assistant's.
        tools: functions that the assistant may call.
    """

    kind: ClassVar = "conversation"
    where: str
    messages: Turns
    untrained: frozenset[int] = frozenset()
    tools: Turns = ()


@dataclass(frozen=True)
class Instruction:
    """Alpaca's. `input` is what the instruction is about, often empty."""

    kind: ClassVar = "instruction"
    where: str
    instruction: str
    input: str
    output: str

    @property
    def question(self) -> str:
        """The text that a user would write."""
        return "\n\n".join(filter(None, (self.instruction, self.input)))


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the first one preferred.

    Attributes:
        prompt: a text, or the messages that stand before the answer.
        tools: functions that the assistant may call.
    """

    kind: ClassVar = "pair"
    where: str
    prompt: str | Turns
    chosen: str
    rejected: str
    tools: Turns = ()

    def answered(self, answer: str) -> PromptAnswer | Conversation:
        """Returns the prompt with one answer as a record of its own. Raises BadRecord."""
        if isinstance(self.prompt, str):
            return PromptAnswer(self.where, self.prompt, answer)
        whole = [*self.prompt, {"role": "assistant", "content": answer}]
        return _conversation(self.where, {"messages": whole, "tools": list(self.tools)})


Record = PlainText | PromptAnswer | Conversation | Instruction | Preference


def texts(record: Record) -> Iterator[str]:
    """The texts that a record holds."""
    for value in (value for name, value in vars(record).items() if name != "where"):
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from (message["content"] for message in value if "content" in message)


@dataclass
class Split:
    """One split's records, read as one goes over them; the rest is known once one has.

    Attributes:
        records: in place of one that cannot be used, a BadRecord that says where and why.
        ignored: keys without meaning here, each with how many of the other records have it.
        missing: a line about shards that are not there.
        columns: a line for each choice of columns of which keys have other names, with the number of files.
        formats: how many records were taken for each format.
    """

    records: Iterable[Record | BadRecord] = ()
    ignored: Counter[str] = field(default_factory=Counter)
    missing: str | None = None
    columns: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)


def remarks(of: Split) -> Iterator[tuple[str, str]]:
    """Yields a line for each part of a split's files that is not used as it might seem, under a label."""
    if of.missing is not None:
        yield "files", of.missing
    for chosen, files in of.columns.items():
        yield "columns", chosen if files == 1 else f"{chosen}; {counted(files, 'file')}"
    if of.ignored:
        yield "ignored", f"keys without meaning here: {with_counts(of.ignored)}"


def with_counts(counts: Counter[str]) -> str:
    """Lists what is most frequent, each with its count."""
    named = [f"{key} ({count:,})" for key, count in counts.most_common(_NAMED)]
    more = len(counts) - len(named)
    return f"{', '.join(named)}{f' and {more:,} more' if more else ''}"


def read(
    path: str | Path, format: str | None = None, *, paired: bool = False, columns: Columns | None = None
) -> dict[str, Split]:
    """Reads the records of a file, as split `train`, or of a directory's splits, as `split_files.find` finds them; or
    those of a data set on the hub, as `HubData` does.

    Args:
        format: one of FORMATS, for every record; by default each one's own keys tell.
        paired: the records are pairs of answers.
        columns: that are taken, by the keys of a record; by default those of its keys' names, and of a table those
            that can be guessed.

    Raises:
        InputError: there is no such file or data set. Later, while reading: a file holds nothing that can be read, such
            as Parquet that is damaged, or its first record is for the other way of training, and no format is asked
            for.
        ElmError: later: Parquet, and pyarrow is not installed.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"--format {format}: is not one of {', '.join(FORMATS)}")
    splits = {}
    for name, files in _files(path).items():
        split = splits[name] = Split(missing=files.missing)
        split.records = _in_blocks(_records(files.paths, split, "pairs" if paired else format, columns))
    return splits


def _files(path: str | Path) -> dict[str, SplitFiles]:
    """The files that a path, or the name of a data set, means."""
    name = str(path)
    return HubData.parse(name).files() if name.startswith(hub_data.PREFIX) else split_files.find(path)


def are_pairs(path: str | Path, columns: Columns | None = None) -> bool:
    """Tells whether the first record to train on is a pair of answers. Raises InputError, ElmError as `read`."""
    if columns is not None:
        return columns.taken.keys() >= {*_PAIR}
    paths = _files(path)["train"].paths
    heading = data_files.heading_of(paths[0])
    if heading is not None:
        return {*_PAIR} <= {*heading.names} or choose.guess(heading.names, "pairs") is not None
    found = data_files.read_all(paths, _PAIR)
    return _is_pair(next((value for _, value in found if isinstance(value, dict)), None))


def record_of(where: str, value: Any, format: str | None = None) -> tuple[Record, str, list[str]]:
    """Returns the record that a JSON value is, its format, and its keys without meaning. Raises BadRecord.

    Args:
        format: one of FORMATS, or `pairs`; by default the value's keys tell.
    """
    if isinstance(value, BadRecord):
        raise value
    if messages.is_list(value):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise BadRecord(f"is {kind_of(value)}, not an object")
    messages.refuse(value, _NOT_USED, "")
    if value.get("weight") not in (None, 1, "", "1"):  # of CSV, a text
        raise BadRecord("has a `weight`, but all records count the same; a message may have one, 0 or 1")
    format = _format_of(value) if format is None else format
    layout = _LAYOUTS[format]
    missing = next((key for key in layout.keys if key not in value), None)
    if missing and layout.keys == _PAIR:
        hint = f"; {_FOR_LORA}" if _has_a_format(value) else ""
        raise BadRecord(f"`{missing}` is missing; a pair has `prompt`, `chosen` and `rejected`{hint}")
    if missing:
        raise BadRecord(f"`{missing}` is missing; it has {keys_of(value)}")
    record = layout.make(where, value)
    if "mapping" in layout.keys:  # of a program that writes many more, about each conversation
        return record, format, []
    said = next((messages.unpacked(value[key]) for key in layout.keys if key in ("messages", "conversations")), ())
    inner = dict.fromkeys(key for message in said for key in message if key not in messages.KNOWN)
    ignored = [key_of(key) for key in value if key not in layout.known]
    return record, format, ignored + [f"{key_of(key)} of messages" for key in inner]


def _records(
    paths: Sequence[Path], split: Split, format: str | None, asked: Columns | None
) -> Iterator[Record | BadRecord]:
    """Reads the records in files; keys without meaning, and columns, are counted in `split`."""
    count = of_lora = 0
    for path in paths:
        columns = asked
        if (heading := data_files.heading_of(path)) is not None:
            columns = choose.of_table(heading, asked, format)
            split.columns[heading.kind if columns is None else f"{heading.kind}; {columns}"] += 1
        elif columns is not None:
            split.columns[str(columns)] += 1
        for _, where, value in data_files.read(path, _wanted(columns, format)):
            if not count and format is None and _is_pair(value):
                raise InputError(f"{where}: {_FOR_DPO}, and `elm-mlx data` shows them")
            count += 1
            try:
                record, found, ignored = _taken(where, value, format, columns)
            except BadRecord as error:
                of_lora += str(error).endswith(_FOR_LORA)
                yield BadRecord(f"{where}: {error}")
                continue
            split.ignored.update(ignored)
            split.formats[found] += 1
            yield record
    names = ", ".join(map(str, paths))
    if not count:
        raise InputError(f"{names}: holds no records")
    if of_lora == count:
        raise InputError(f"{names}: holds no pairs of answers, `chosen` and `rejected`; {_FOR_LORA}")


def _wanted(columns: Columns | None, format: str | None) -> Collection[str]:
    """The columns of Parquet that are read."""
    if columns is not None:
        return columns.taken.values()
    return _LAYOUTS["pairs"].known if format == "pairs" else _COLUMNS


def _taken(where: str, value: Any, format: str | None, columns: Columns | None) -> tuple[Record, str, list[str]]:
    """The record in some columns of a value, as `record_of`. Raises BadRecord, in the words of the file."""
    if columns is None or not isinstance(value, dict):
        return record_of(where, value, format)
    chosen, others = columns.renamed(value)
    try:
        return *record_of(where, chosen, format)[:2], others
    except BadRecord as error:
        raise BadRecord(columns.by_column(str(error))) from None


def _in_blocks(found: Iterator[Record | BadRecord]) -> Iterator[Record | BadRecord]:
    """The same records, many read at once: to parse and encode in turn, one by one, takes a tenth more time."""
    while block := list(islice(found, _BLOCK)):
        yield from block


def _format_of(value: Mapping[str, Any]) -> str:
    """The first of FORMATS whose keys a record has: with values, or at least by name. Raises BadRecord."""
    if _is_pair(value):
        raise BadRecord(_FOR_DPO)
    for has in (lambda key: value.get(key) is not None, lambda key: key in value):
        found = next((name for name in FORMATS if all(map(has, _LAYOUTS[name].keys))), None)
        if found is not None:
            return found
    wanted = "; ".join(", ".join(f"`{key}`" for key in _LAYOUTS[name].keys) for name in FORMATS)
    hint = choose.hint(value)
    raise BadRecord(f"has none of these sets of keys: {wanted}; it has {keys_of(value)}{hint}")


def _has_a_format(value: Mapping[str, Any]) -> bool:
    return any(value.keys() >= set(_LAYOUTS[name].keys) for name in FORMATS)


def _is_pair(value: Any) -> bool:
    return isinstance(value, dict) and all(value.get(key) is not None for key in _PAIR)


def _system_of(value: Mapping[str, Any]) -> str:
    """The record's system prompt beside its other keys, or nothing. Raises BadRecord."""
    found = {text for key in _SYSTEM if (text := _optional(value, key))}
    if len(found) > 1:
        raise BadRecord(f"has two system prompts, {' and '.join(f'`{key}`' for key in _SYSTEM)}: keep one")
    return found.pop() if found else ""


def _after_system(value: Mapping[str, Any], turns: Turns) -> Turns:
    """The messages after the record's system prompt, if it has one beside them. Raises BadRecord."""
    system = _system_of(value)
    if not system or turns[0] == {"role": "system", "content": system}:
        return turns
    if turns[0]["role"] == "system":
        raise BadRecord("has a system prompt beside its messages, and another one in them: keep one")
    return ({"role": "system", "content": system}, *turns)


def _optional(value: Mapping[str, Any], key: str) -> str:
    """A text that may be missing, null or empty, which are all nothing. Raises BadRecord."""
    return "" if value.get(key) in (None, "") else _text(value, key)


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise BadRecord(f"`{key}` is {kind_of(text)}, not a string")
    if not text.strip():
        raise BadRecord(f"`{key}` is {'white space alone' if text else 'empty'}")
    return text


def _plain_text(where: str, value: Mapping[str, Any]) -> Record:
    if _system_of(value) or messages.tools_of(value):
        what = "a system prompt" if _system_of(value) else "tools"
        raise BadRecord(f"has {what} beside `text`, which is trained on as it stands: write what the model sees")
    return PlainText(where, _text(value, "text"))


def _prompt_answer(where: str, value: Mapping[str, Any]) -> Record:
    if value.get("label") is False or str(value.get("label")).lower() == "false":  # KTO's
        raise BadRecord("`label` is false: `completion` is an answer that is not wanted")
    made = PromptAnswer(where, _text(value, "prompt"), _text(value, "completion"))
    return _with_system(value, made, made.prompt, made.completion)


def _instruction(where: str, value: Mapping[str, Any]) -> Record:
    made = Instruction(where, _text(value, "instruction"), _optional(value, "input"), _text(value, "output"))
    return _with_system(value, made, made.question, made.output)


def _with_system(value: Mapping[str, Any], made: Record, question: str, answer: str) -> Record:
    """The record; or, where it has a system prompt or tools, which need a template, the conversation that it is."""
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    every, tools = _after_system(value, turns), messages.tools_of(value)
    return made if every is turns and not tools else Conversation(made.where, every, tools=tools)


def _conversation(where: str, value: Mapping[str, Any], key: str = "messages") -> Conversation:
    said = messages.unpacked(value[key])
    if not isinstance(said, list) or not all(isinstance(message, dict) for message in said):
        raise BadRecord(f"`{key}` is not a list of objects")
    if not said:
        raise BadRecord("a conversation needs a message")
    turns = messages.turns(said)
    untrained = frozenset(
        i for i, turn in enumerate(turns) if not _is_trained(said[i], turn["role"], f"message {i + 1} ")
    )
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    for i in answers:
        if not turns[i]["content"].strip() and "tool_calls" not in turns[i]:
            raise BadRecord(f"message {i + 1}: the assistant says nothing")
    if turns[0]["role"] == "assistant":
        raise BadRecord("message 1 is the assistant's: it answers nothing")
    if not answers:
        raise BadRecord("no message is the assistant's: there is nothing to learn")
    if untrained.issuperset(answers):
        raise BadRecord("no answer of the assistant's is to be trained on: each has the weight 0")
    every = _after_system(value, turns)
    untrained = frozenset(i + len(every) - len(turns) for i in untrained)
    return Conversation(where, every, untrained, messages.tools_of(value))


def _exported(where: str, value: Mapping[str, Any]) -> Conversation:
    return _conversation(where, {"messages": messages.of_chatgpt(value)})


def _is_trained(message: Mapping[str, Any], role: str, whose: str) -> bool:
    """Tells whether the loss counts a message if it is the assistant's, as OpenAI's, Mistral's and others' keys say."""
    marks = {key: message[key] for key in messages.MARKS if message.get(key) is not None}
    for key, mark in marks.items():
        if not isinstance(mark, (int, float)) or mark not in (0, 1):
            raise BadRecord(f"{whose}has the `{key}` {repr(mark)[:40]}: 0 (not to be trained on) or 1 is needed")
        if mark and role != "assistant":
            raise BadRecord(f"{whose}has the `{key}` {mark!r}, and the assistant's messages alone are trained on")
    if len({bool(mark) for mark in marks.values()}) > 1:
        raise BadRecord(f"{whose}has {' and '.join(f'`{key}`' for key in marks)}, which contradict each other")
    return all(marks.values())


def _preference(where: str, value: Mapping[str, Any]) -> Preference:
    """`chosen` and `rejected` are texts, with `prompt` a text or a list of messages. Or they are lists of messages that
    end with an answer, and begin alike: with the prompt, as UltraFeedback's do, or else `prompt` comes before them.
    """
    (before, chosen), (same, rejected) = (_answer(value[key], key) for key in _PAIR)
    if before != same:
        raise BadRecord("`chosen` and `rejected` differ in more than their last answer")
    if chosen == rejected:
        raise BadRecord("`chosen` and `rejected` are the same")
    asked = next((value[key] for key in ("prompt", "messages", "conversations") if value.get(key) is not None), None)
    prompt = _prompt(messages.unpacked(asked), before, isinstance(value["chosen"], str))
    tools = messages.tools_of(value)
    if _system_of(value) or tools:
        prompt = _after_system(value, ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt)
    made = Preference(where, prompt, chosen, rejected, tools)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        try:
            made.answered(answer)
        except BadRecord as error:
            raise BadRecord(f"`{key}`: {error}") from None
    return made


def _answer(value: Any, key: str) -> tuple[Turns, str]:
    """The messages before an answer, and the answer."""
    before: Turns = ()
    value = [value] if isinstance(value, dict) else messages.unpacked(value)
    if messages.is_list(value):
        *before, last = messages.turns(value, f"`{key}`, ")  # type: ignore[assignment]
        if last["role"] != "assistant":
            raise BadRecord(f"`{key}` doesn't end with a message of the assistant's")
        if "tool_calls" in last:
            raise BadRecord(f"`{key}` ends with a call of a function, and answers alone are compared")
        if not _is_trained(value[-1], "assistant", f"`{key}` "):
            raise BadRecord(f"`{key}` ends with an answer that is not to be trained on")
        value = last["content"]
    if not isinstance(value, str):
        raise BadRecord(f"`{key}` is neither a string nor a list of messages")
    if not value.strip():
        raise BadRecord(f"`{key}` is empty")
    return tuple(before), value


def _prompt(prompt: Any, before: Turns, plain: bool) -> str | Turns:
    """The prompt of both answers.

    Args:
        before: messages that the answers come with.
        plain: the answers are texts.
    """
    if isinstance(prompt, str) and prompt.strip():
        if before and all(str(message.get("content")).strip() != prompt.strip() for message in before):
            raise BadRecord("`prompt` is not what `chosen` and `rejected` answer")
        return before or (prompt if plain else ({"role": "user", "content": prompt},))
    if messages.is_list(prompt):
        asked = messages.turns(prompt, "`prompt`, ")
        if before and before != asked:
            raise BadRecord("`prompt` is not what `chosen` and `rejected` answer")
        return asked
    if prompt is None and before:
        return before
    raise BadRecord("`prompt` is " + ("missing" if prompt is None else "neither a string nor a list of messages"))


class _Layout:
    """A format: how its record is made, the keys that it must have, and all that are known."""

    def __init__(
        self, name: str, make: Callable[[str, Mapping[str, Any]], Record], others: Collection[str] = ()
    ) -> None:
        self.make, (self.keys, may) = make, KEYS[name]
        self.known = {*self.keys, *may, *others, *_SYSTEM, *_NOT_USED, "tools", "functions", "weight"}


# In the order in which a record's keys are tried: Alpaca's own files have a `text` too.
_LAYOUTS = {
    "completion": _Layout("completion", _prompt_answer, ["label"]),
    "messages": _Layout("messages", _conversation),
    "sharegpt": _Layout("sharegpt", partial(_conversation, key="conversations")),
    "chatgpt": _Layout("chatgpt", _exported),
    "alpaca": _Layout("alpaca", _instruction),
    "text": _Layout("text", _plain_text),
    "pairs": _Layout("pairs", _preference, ["messages", "conversations"]),
}
FORMATS = tuple(name for name in _LAYOUTS if name != "pairs")
_COLUMNS = {key for layout in _LAYOUTS.values() for key in layout.known}
