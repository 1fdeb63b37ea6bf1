"""Records of training data, read from a file or a directory of splits; a bad one is named by file, line and reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from elm_mlx.data import columns as choose
from elm_mlx.data import data_files, split_files
from elm_mlx.data.bad_record import BadRecord, key_of, keys_of, kind_of
from elm_mlx.data.columns import Columns
from elm_mlx.errors import InputError
from elm_mlx.text.chat_template import ROLES, check_messages

_BLOCK = 1024  # records
_PAIR = ("chosen", "rejected")
_FOR_DPO = "is a pair of answers, `chosen` and `rejected`: `elm-mlx dpo` trains on those"
_FOR_LORA = "`elm-mlx lora` trains on such records"
_SYSTEM = ("system", "system_prompt")  # of a record, beside whatever else it has

_NOTHING: tuple[Any, ...] = (None, "", "[]", [], {})
_NO_TEMPLATE = "which no template here can show"
# Of a record, and of a message, keys that say something which nothing here does.
_NOT_USED = dict.fromkeys(
    ("tools", "functions", "documents", "chat_template_kwargs", "images", "audios", "videos"), _NO_TEMPLATE
) | {
    "history": "earlier turns: write all of them as `messages`",
    "loss_mask": "and what is trained on is decided here: a message may have a `weight` of 0",
}
_NOT_SHOWN = dict.fromkeys(
    ("name", "tool_calls", "tool_call_id", "function_call", "tools", "reasoning_content", "thinking", "refusal",
     "images", "audio"), _NO_TEMPLATE,
) | {"train_detail": "a part of an answer to train on, and answers are trained on whole"}  # fmt: skip
_MARKS = ("weight", "train", "training", "loss")  # of a message: OpenAI's and Mistral's, Axolotl's two, ms-swift's
_MESSAGE = {"role", "content", *_NOT_SHOWN, *_MARKS}  # the known keys of one
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}

Turns = tuple[Mapping[str, Any], ...]


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
    """`messages`: each with its `role` and `content`; at least one is the assistant's and not in `untrained`.

    Attributes:
        untrained: which messages, from 0, the loss does not count although they may be the assistant's.
    """

    kind: ClassVar = "conversation"
    where: str
    messages: Turns
    untrained: frozenset[int] = frozenset()


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
    """

    kind: ClassVar = "pair"
    where: str
    prompt: str | Turns
    chosen: str
    rejected: str

    def answered(self, answer: str) -> PromptAnswer | Conversation:
        """Returns the prompt with one answer as a record of its own. Raises BadRecord."""
        if isinstance(self.prompt, str):
            return PromptAnswer(self.where, self.prompt, answer)
        return _conversation(self.where, {"messages": [*self.prompt, {"role": "assistant", "content": answer}]})


Record = PlainText | PromptAnswer | Conversation | Instruction | Preference


def texts(record: Record) -> Iterator[str]:
    """The texts that a record holds."""
    for value in (value for name, value in vars(record).items() if name != "where"):
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from (message["content"] for message in value)


@dataclass
class Split:
    """One split's records, read as one goes over them; the rest is known once one has.

    Attributes:
        records: in place of one that cannot be used, a BadRecord that says where and why.
        ignored: keys without meaning here, each with how many of the other records have it.
        missing: a line about shards that are not there.
        columns: a line for each choice of columns of which keys have other names, with the number of files.
    """

    records: Iterable[Record | BadRecord] = ()
    ignored: Counter[str] = field(default_factory=Counter)
    missing: str | None = None
    columns: Counter[str] = field(default_factory=Counter)


def read(
    path: Path, format: str | None = None, *, paired: bool = False, columns: Columns | None = None
) -> dict[str, Split]:
    """Reads the records of a file, as split `train`, or of a directory's splits, as `split_files.find` finds them.

    Args:
        format: one of FORMATS, for every record; by default each one's own keys tell.
        paired: the records are pairs of answers.
        columns: that are taken, by the keys of a record; by default those of its keys' names, and of a table those
            that can be guessed.

    Raises:
        InputError: there is no such file. Later, while reading: a file holds nothing that can be read, such as Parquet
            that is damaged, or its first record is for the other way of training, and no format is asked for.
        ElmError: later: Parquet, and pyarrow is not installed.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"--format {format}: is not one of {', '.join(FORMATS)}")
    splits = {}
    for name, files in split_files.find(path).items():
        split = splits[name] = Split(missing=files.missing)
        split.records = _in_blocks(_records(files.paths, split, "pairs" if paired else format, columns))
    return splits


def are_pairs(path: Path, columns: Columns | None = None) -> bool:
    """Tells whether the first record to train on is a pair of answers. Raises InputError, ElmError as `read`."""
    if columns is not None:
        return columns.taken.keys() >= {*_PAIR}
    paths = split_files.find(path)["train"].paths
    table = data_files.columns_of(paths[0])
    if table is not None:
        return {*_PAIR} <= {*table[1]} or choose.guess(table[1], "pairs") is not None
    found = data_files.read_all(paths, _PAIR)
    return _is_pair(next((value for _, value in found if isinstance(value, dict)), None))


def record_of(where: str, value: Any, format: str | None = None) -> tuple[Record, list[str]]:
    """Returns the record that a JSON value is, and its keys without meaning. Raises BadRecord.

    Args:
        format: one of FORMATS, or `pairs`; by default the value's keys tell.
    """
    if isinstance(value, BadRecord):
        raise value
    if not isinstance(value, dict):
        raise BadRecord(f"is {kind_of(value)}, not an object")
    _refuse(value, _NOT_USED, "")
    if value.get("weight") not in (None, 1, "", "1"):  # of CSV, a text
        raise BadRecord("has a `weight`, but all records count the same; a message may have one, 0 or 1")
    layout = _LAYOUTS[_format_of(value) if format is None else format]
    missing = next((key for key in layout.keys if key not in value), None)
    if missing and layout.keys == _PAIR:
        hint = f"; {_FOR_LORA}" if _has_a_format(value) else ""
        raise BadRecord(f"`{missing}` is missing; a pair has `prompt`, `chosen` and `rejected`{hint}")
    if missing:
        raise BadRecord(f"`{missing}` is missing; it has {keys_of(value)}")
    record = layout.make(where, value)
    messages = value["messages"] if "messages" in layout.keys else ()
    inner = dict.fromkeys(key for message in messages for key in message if key not in _MESSAGE)
    ignored = [key_of(key) for key in value if key not in layout.known]
    return record, ignored + [f"{key_of(key)} of messages" for key in inner]


def _records(
    paths: Sequence[Path], split: Split, format: str | None, asked: Columns | None
) -> Iterator[Record | BadRecord]:
    """Reads the records in files; keys without meaning, and columns, are counted in `split`."""
    count = of_lora = 0
    for path in paths:
        columns = asked
        if (table := data_files.columns_of(path)) is not None:
            columns = choose.of_table(table[1], str(path), asked, format)
            split.columns[table[0] if columns is None else f"{table[0]}; {columns}"] += 1
        elif columns is not None:
            split.columns[str(columns)] += 1
        for _, where, value in data_files.read(path, _wanted(columns, format)):
            if not count and format is None and _is_pair(value):
                raise InputError(f"{where}: {_FOR_DPO}, and `elm-mlx data` shows them")
            count += 1
            try:
                record, ignored = _taken(where, value, format, columns)
            except BadRecord as error:
                of_lora += str(error).endswith(_FOR_LORA)
                yield BadRecord(f"{where}: {error}")
                continue
            split.ignored.update(ignored)
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


def _taken(where: str, value: Any, format: str | None, columns: Columns | None) -> tuple[Record, list[str]]:
    """The record in some columns of a value, as `record_of`. Raises BadRecord, in the words of the file."""
    if columns is None or not isinstance(value, dict):
        return record_of(where, value, format)
    chosen, others = columns.renamed(value)
    try:
        return record_of(where, chosen, format)[0], others
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
    if "conversations" in value:
        raise BadRecord(
            "has `conversations`, ShareGPT's layout: write `messages`, each with `role` (system, user or assistant "
            "for human's and gpt's) and `content`"
        )
    wanted = "; ".join(", ".join(f"`{key}`" for key in _LAYOUTS[name].keys) for name in FORMATS)
    hint = choose.hint(value)
    raise BadRecord(f"has none of these sets of keys: {wanted}; it has {keys_of(value)}{hint}")


def _has_a_format(value: Mapping[str, Any]) -> bool:
    return any(value.keys() >= set(_LAYOUTS[name].keys) for name in FORMATS)


def _is_pair(value: Any) -> bool:
    return isinstance(value, dict) and all(value.get(key) is not None for key in _PAIR)


def _refuse(value: Mapping[str, Any], not_used: Mapping[str, str], whose: str) -> None:
    for key, why in not_used.items():
        if key in value and value[key] not in _NOTHING:
            raise BadRecord(f"{whose}has `{key}`, {why}")


def _system_of(value: Mapping[str, Any]) -> str:
    """The record's system prompt beside its other keys, or nothing. Raises BadRecord."""
    found = {text for key in _SYSTEM if (text := _optional(value, key))}
    if len(found) > 1:
        raise BadRecord(f"has two system prompts, {' and '.join(f'`{key}`' for key in _SYSTEM)}: keep one")
    return found.pop() if found else ""


def _after_system(value: Mapping[str, Any], messages: Turns) -> Turns:
    """The messages after the record's system prompt, if it has one beside them. Raises BadRecord."""
    system = _system_of(value)
    if not system or messages[0] == {"role": "system", "content": system}:
        return messages
    if messages[0]["role"] == "system":
        raise BadRecord("has a system prompt beside its messages, and another one in them: keep one")
    return ({"role": "system", "content": system}, *messages)


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
    if _system_of(value):
        raise BadRecord("has a system prompt beside `text`, which is trained on as it stands: write it into the text")
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
    """The record; or, where a system prompt stands before it, which needs a template, the conversation that it is."""
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    messages = _after_system(value, turns)
    return made if messages is turns else Conversation(made.where, messages)


def _conversation(where: str, value: Mapping[str, Any]) -> Conversation:
    messages = value["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord("`messages` is not a list of objects")
    turns = _turns(messages, "")
    try:
        check_messages(messages)
    except InputError as error:
        raise BadRecord(str(error)) from None
    untrained = frozenset(i for i, message in enumerate(messages) if not _is_trained(message, f"message {i + 1} "))
    answers = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
    for i in answers:
        if not turns[i]["content"].strip():
            raise BadRecord(f"message {i + 1}: the assistant says nothing")
    if turns[0]["role"] == "assistant":
        raise BadRecord("message 1 is the assistant's: it answers nothing")
    if not answers:
        raise BadRecord("no message is the assistant's: there is nothing to learn")
    if untrained.issuperset(answers):
        raise BadRecord("no answer of the assistant's is to be trained on: each has the weight 0")
    every = _after_system(value, turns)
    return Conversation(where, every, frozenset(i + len(every) - len(turns) for i in untrained))


def _turns(messages: Sequence[Mapping[str, Any]], whose: str) -> Turns:
    """Reduces messages to `role` and `content`, which may still be anything.

    Raises:
        BadRecord: one is in another tool's words, or has something that no template here can show.
    """
    for number, message in enumerate(messages, 1):
        of = f"{whose}message {number}"
        if "role" not in message and "from" in message:
            raise BadRecord(f"{of} has `from`, ShareGPT's layout: write `role` (user, assistant) and `content`")
        role = message.get("role")
        known = _ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else None
        if role not in ROLES and known in ROLES:
            raise BadRecord(f"{of}: role is {role!r}, not one of {', '.join(ROLES)}; write {known} for it")
        _refuse(message, _NOT_SHOWN, f"{of} ")
        if isinstance(message.get("content"), list):
            raise BadRecord(f"{of}: content is a list of parts, not a string: write their text as one")
    return tuple({key: message.get(key) for key in ("role", "content")} for message in messages)


def _is_trained(message: Mapping[str, Any], whose: str) -> bool:
    """Tells whether the loss counts a message if it is the assistant's, as OpenAI's, Mistral's and others' keys say."""
    marks = {key: message[key] for key in _MARKS if message.get(key) is not None}
    for key, mark in marks.items():
        if not isinstance(mark, (int, float)) or mark not in (0, 1):
            raise BadRecord(f"{whose}has the `{key}` {repr(mark)[:40]}: 0 (not to be trained on) or 1 is needed")
        if mark and message["role"] != "assistant":
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
    prompt = _prompt(value.get("prompt"), before, isinstance(value["chosen"], str))
    if _system_of(value):
        prompt = _after_system(value, ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt)
    made = Preference(where, prompt, chosen, rejected)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        try:
            made.answered(answer)
        except BadRecord as error:
            raise BadRecord(f"`{key}`: {error}") from None
    return made


def _answer(value: Any, key: str) -> tuple[Turns, str]:
    """The messages before an answer, and the answer."""
    before: Turns = ()
    if _is_messages(value):
        *before, last = _turns(value, f"`{key}`, ")  # type: ignore[assignment]
        if last["role"] != "assistant" or not isinstance(last["content"], str):
            raise BadRecord(f"`{key}` doesn't end with a message of the assistant's")
        if not _is_trained(value[-1], f"`{key}` "):
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
    if _is_messages(prompt):
        asked = _turns(prompt, "`prompt`, ")
        if before and before != asked:
            raise BadRecord("`prompt` is not what `chosen` and `rejected` answer")
        return asked
    if prompt is None and before:
        return before
    raise BadRecord("`prompt` is " + ("missing" if prompt is None else "neither a string nor a list of messages"))


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


class _Layout:
    """A format: how its record is made, the keys that it must have, and all that are known."""

    def __init__(
        self, make: Callable[[str, Mapping[str, Any]], Record], keys: tuple[str, ...], others: Collection[str] = ()
    ) -> None:
        self.make, self.keys = make, keys
        self.known = {*keys, *others, *_SYSTEM, *_NOT_USED, "weight"}


# In the order in which a record's keys are tried: Alpaca's own files have a `text` too.
_LAYOUTS = {
    "completion": _Layout(_prompt_answer, ("prompt", "completion"), ["label"]),
    "messages": _Layout(_conversation, ("messages",)),
    "alpaca": _Layout(_instruction, ("instruction", "output"), ["input"]),
    "text": _Layout(_plain_text, ("text",)),
    "pairs": _Layout(_preference, _PAIR, ["prompt"]),
}
FORMATS = tuple(name for name in _LAYOUTS if name != "pairs")
_COLUMNS = {key for layout in _LAYOUTS.values() for key in layout.known}
