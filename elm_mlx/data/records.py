"""Files of training data as records: a file of any of SUFFIXES, or a directory of splits.

Knows what makes a record whole, and names each one that isn't by file and line with the reason. Knows nothing of
how files are packed, and of tokens, templates and lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elm_mlx.data import data_files
from elm_mlx.data.data_files import BadRecord, Files, key_of, keys_of, kind_of
from elm_mlx.errors import InputError
from elm_mlx.reading import expanded
from elm_mlx.text.chat_template import ROLES, check_messages

SUFFIXES = (*data_files.JSON, data_files.PARQUET)
PAIR = ("chosen", "rejected")
_PAIR = "is a pair of answers, `chosen` and `rejected`: `elm-mlx dpo` trains on those"
SYSTEM = ("system", "system_prompt")  # of a record, beside whatever else it has

_NOTHING: tuple[Any, ...] = (None, "", "[]", [], {})
_NO_TEMPLATE = "which no template here can show"
# Of a record, and of a message, keys that say something which nothing here does.
_NOT_USED = {
    "tools": _NO_TEMPLATE, "functions": _NO_TEMPLATE, "documents": _NO_TEMPLATE, "chat_template_kwargs": _NO_TEMPLATE,
    "images": _NO_TEMPLATE, "audios": _NO_TEMPLATE, "videos": _NO_TEMPLATE,
    "history": "earlier turns: write all of them as `messages`",
    "loss_mask": "and what is trained on is decided here: a message may have a `weight` of 0",
}  # fmt: skip
_NOT_SHOWN = {
    "name": _NO_TEMPLATE, "tool_calls": _NO_TEMPLATE, "tool_call_id": _NO_TEMPLATE, "function_call": _NO_TEMPLATE,
    "tools": _NO_TEMPLATE, "reasoning_content": _NO_TEMPLATE, "thinking": _NO_TEMPLATE, "refusal": _NO_TEMPLATE,
    "images": _NO_TEMPLATE, "audio": _NO_TEMPLATE,
    "train_detail": "a part of an answer to train on, and answers are trained on whole",
}  # fmt: skip
_MARKS = ("weight", "train", "training", "loss")  # of a message: OpenAI's and Mistral's, Axolotl's two, ms-swift's
_MESSAGE = {"role", "content", *_NOT_SHOWN, *_MARKS}  # what is known of one
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}


@dataclass(frozen=True)
class Text:
    """Text to continue as it stands. `where` is its file and line, here and in the others."""

    where: str
    text: str


@dataclass(frozen=True)
class Completion:
    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """`messages`: each with its `role` and `content`; at least one is the assistant's and not in `untrained`.

    Attributes:
        untrained: which messages, from 0, are not to be learnt although they may be the assistant's.
    """

    where: str
    messages: tuple[Mapping[str, str], ...]
    untrained: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Instruction:
    """Alpaca's. `input` is what the instruction is about, often empty."""

    where: str
    instruction: str
    input: str
    output: str

    @property
    def question(self) -> str:
        """What a user would write."""
        return "\n\n".join(filter(None, (self.instruction, self.input)))


Record = Text | Completion | Conversation | Instruction


def texts(record: Record) -> Iterator[str]:
    """What is written in a record."""
    for value in (value for name, value in vars(record).items() if name != "where"):
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from (message["content"] for message in value)


@dataclass
class Split:
    """What the files of one split hold.

    Attributes:
        bad: of each record that isn't whole, where it stands and what is wrong.
        ignored: keys that mean nothing here, each with how many of the other records have it.
        missing: what is told where shards are not there.
    """

    records: list[Record] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    missing: str | None = None


def read(path: Path, format: str | None = None) -> dict[str, Split]:
    """Every record of a file, as split `train`, or of a directory's splits.

    A directory holds `train.jsonl` (or any of SUFFIXES), and if it likes `valid` and `test`, as `data_files.find` finds
    them: in shards, in folders, by other names of theirs.

    Args:
        format: one of FORMATS, for every record; otherwise each one's own keys tell.

    Raises:
        InputError: there is no such file, or nothing in it can be read, such as Parquet that is damaged; or the
            first record is a pair of answers, and no format is asked for.
        ElmError: Parquet, and pyarrow is not installed.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"--format {format}: is not one of {', '.join(FORMATS)}")
    found: dict[str, Split] = {}
    for name, of_split in files(path).items():
        split = found[name] = Split(missing=of_split.missing)
        for where, value in values(of_split.paths, _COLUMNS):
            if format is None and not split.records and not split.bad and is_pair(value):
                raise InputError(f"{where}: {_PAIR}, and `elm-mlx data` shows them")
            try:
                if isinstance(value, BadRecord):
                    raise value
                check_keys(value)
                name = _format_of(value) if format is None else format
                split.records.append(_record(where, value, name))
                split.ignored.update(ignored(value, _KNOWN[name]))
            except BadRecord as error:
                split.bad.append(f"{where}: {error}")
    return found


def files(path: Path) -> dict[str, Files]:
    """The files that `path` means by split: a file is `train`. Raises InputError as `read`."""
    path = expanded(path)
    if path.is_file():
        data_files.suffix_of(path, SUFFIXES)
        return {"train": Files([path])}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or directory")
    return data_files.find(path, SUFFIXES)


def values(paths: Sequence[Path], columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Each value in files with where it stands, read when asked for; BadRecord for a line that is no JSON.

    Args:
        columns: of Parquet, those that are read.

    Raises:
        InputError, ElmError: as `read`; what is wrong within a file, when it is reached.
    """
    empty = True
    for file in paths:
        for entry in _entries(file, data_files.suffix_of(file, SUFFIXES), columns):
            empty = False
            yield entry
    if empty:
        raise InputError(f"{', '.join(map(str, paths))}: holds no records")


def _entries(path: Path, suffix: str, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Each value of a file, with where it stands; BadRecord for a line that is no JSON."""
    if suffix == data_files.PARQUET:
        for row, group, value in data_files.parquet(path, tuple(columns)):
            yield f"{path}, row {row + 1} (row group {group})", value
        return
    for number, value in data_files.values(path):
        yield f"{path}, line {number}", value


def _record(where: str, value: Mapping[str, Any], format: str) -> Record:
    """The record that a JSON object is. Raises BadRecord."""
    make, keys = FORMATS[format]
    missing = next((key for key in keys if key not in value), None)
    if missing:
        raise BadRecord(f"`{missing}` is missing; it has {keys_of(value)}")
    return make(where, value)


def _format_of(value: Mapping[str, Any]) -> str:
    """The first of FORMATS whose keys a record has: with values, or at least by name. Raises BadRecord."""
    if is_pair(value):
        raise BadRecord(_PAIR)
    for has in (lambda key: value.get(key) is not None, lambda key: key in value):
        found = next((name for name, (_, keys) in FORMATS.items() if all(map(has, keys))), None)
        if found is not None:
            return found
    if "conversations" in value:
        raise BadRecord(
            "has `conversations`, ShareGPT's layout: write `messages`, each with `role` (system, user or assistant "
            "for human's and gpt's) and `content`"
        )
    wanted = "; ".join(", ".join(f"`{key}`" for key in keys) for _, keys in FORMATS.values())
    raise BadRecord(f"has none of these sets of keys: {wanted}; it has {keys_of(value)}")


def is_pair(value: Any) -> bool:
    """Whether a JSON value has two answers, of which one is preferred."""
    return isinstance(value, dict) and all(value.get(key) is not None for key in PAIR)


def check_keys(value: Any) -> None:
    """Raises BadRecord for a JSON value that is no object, or says something which training would leave out."""
    if not isinstance(value, dict):
        raise BadRecord(f"is {kind_of(value)}, and not an object")
    _refuse(value, _NOT_USED, "")
    if value.get("weight") not in (None, 1):
        raise BadRecord("has a `weight` of its own, and all records count the same; a message may have one, 0 or 1")


def ignored(value: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """The keys of a record that are none of `known`, each as it is told of; those of its messages, too."""
    messages = value["messages"] if "messages" in known else ()
    inner = dict.fromkeys(key for message in messages for key in message if key not in _MESSAGE)
    return [key_of(key) for key in value if key not in known] + [f"{key_of(key)} of messages" for key in inner]


def _refuse(value: Mapping[str, Any], not_used: Mapping[str, str], whose: str) -> None:
    for key, why in not_used.items():
        if key in value and value[key] not in _NOTHING:
            raise BadRecord(f"{whose}has `{key}`, {why}")


def system_of(value: Mapping[str, Any]) -> str:
    """What a record of any format tells the model before anything else, beside its other keys. Raises BadRecord."""
    found = {text for key in SYSTEM if (text := _optional(value, key))}
    if len(found) > 1:
        raise BadRecord(f"has two system prompts, {' and '.join(f'`{key}`' for key in SYSTEM)}: keep one")
    return found.pop() if found else ""


def _optional(value: Mapping[str, Any], key: str) -> str:
    """A text that may be missing, null or empty, which are all nothing; otherwise as it stands. Raises BadRecord."""
    return "" if value.get(key) in (None, "") else _text(value, key)


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise BadRecord(f"`{key}` is {kind_of(text)}, and not a text")
    if not text.strip():
        raise BadRecord(f"`{key}` is {'white space alone' if text else 'empty'}")
    return text


def _make_text(where: str, value: Mapping[str, Any]) -> Record:
    if system_of(value):
        raise BadRecord("has a system prompt beside `text`, which is trained on as it stands: write it into the text")
    return Text(where, _text(value, "text"))


def _make_completion(where: str, value: Mapping[str, Any]) -> Record:
    if value.get("label") is False:  # KTO's
        raise BadRecord("`label` is false: `completion` is an answer that is not wanted")
    completion = Completion(where, _text(value, "prompt"), _text(value, "completion"))
    return _told(where, value, completion.prompt, completion.completion) or completion


def _make_instruction(where: str, value: Mapping[str, Any]) -> Record:
    instruction = Instruction(where, _text(value, "instruction"), _optional(value, "input"), _text(value, "output"))
    return _told(where, value, instruction.question, instruction.output) or instruction


def _told(where: str, value: Mapping[str, Any], question: str, answer: str) -> Conversation | None:
    """A question and its answer after the record's system prompt, which needs a template; None without one."""
    system = system_of(value)
    turns = (("system", system), ("user", question), ("assistant", answer))
    return Conversation(where, tuple({"role": role, "content": text} for role, text in turns)) if system else None


def _make_conversation(where: str, value: Mapping[str, Any]) -> Record:
    messages = value["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord("`messages` is no list of objects")
    for number, message in enumerate(messages, 1):
        check_message(message, f"message {number} ")
    try:
        check_messages(messages)
    except InputError as error:
        raise BadRecord(str(error)) from None
    untrained = frozenset(i for i, message in enumerate(messages) if not is_trained(message, f"message {i + 1} "))
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadRecord(f"message {number}: the assistant says nothing")
    if messages[0]["role"] == "assistant":
        raise BadRecord("message 1 is the assistant's: nothing asks for it")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRecord("no message is the assistant's: there is nothing to learn")
    if untrained.issuperset(answers):
        raise BadRecord("no answer of the assistant's is to be trained on: each has the weight 0")
    told = system_of(value)
    if told and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": told}, *messages]
        untrained = frozenset(i + 1 for i in untrained)
    elif told and messages[0]["content"] != told:
        raise BadRecord("has a system prompt beside `messages`, and another one in them: keep one")
    turns = tuple({"role": each["role"], "content": each["content"]} for each in messages)
    return Conversation(where, turns, untrained)


def check_message(message: Mapping[str, Any], whose: str) -> None:
    """Refuses a message in another tool's words, or with something that no template here can show.

    Args:
        whose: what its error begins with: "message 2 ".

    Raises:
        BadRecord: it is such a one.
    """
    if "role" not in message and "from" in message:
        raise BadRecord(f"{whose}has `from`, ShareGPT's layout: write `role` (user, assistant) and `content`")
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str) and role not in ROLES and (known := _ROLES.get(role.lower(), role.lower())) in ROLES:
        raise BadRecord(f"{whose.strip()}: role is {role!r}, and not one of {', '.join(ROLES)}; write {known} for it")
    _refuse(message, _NOT_SHOWN, whose)
    if isinstance(content, list):
        raise BadRecord(f"{whose.strip()}: content is no text, but a list of parts: write their text as one")


def is_trained(message: Mapping[str, Any], whose: str) -> bool:
    """Whether a message is to be trained on if it is the assistant's, as OpenAI's, Mistral's and others' keys say."""
    marks = {key: message[key] for key in _MARKS if message.get(key) is not None}
    for key, mark in marks.items():
        if not isinstance(mark, (int, float)) or mark not in (0, 1):
            raise BadRecord(f"{whose}has the `{key}` {repr(mark)[:40]}: 0 (not to be trained on) or 1 is needed")
        if mark and message["role"] != "assistant":
            raise BadRecord(f"{whose}has the `{key}` {mark!r}, and the assistant's messages alone are trained on")
    if len({bool(mark) for mark in marks.values()}) > 1:
        raise BadRecord(f"{whose}has {' and '.join(f'`{key}`' for key in marks)}, which contradict each other")
    return all(marks.values())


# By name, in the order in which a record's keys are tried: Alpaca's own files have a `text` too. The keys are those
# that a record of the format must have.
FORMATS: dict[str, tuple[Callable[[str, Mapping[str, Any]], Record], tuple[str, ...]]] = {
    "completion": (_make_completion, ("prompt", "completion")),
    "messages": (_make_conversation, ("messages",)),
    "alpaca": (_make_instruction, ("instruction", "output")),
    "text": (_make_text, ("text",)),
}
# What is known of a record of each format; the rest means nothing here.
KNOWN = {*SYSTEM, *_NOT_USED, "weight"}
_KNOWN = {name: {*keys, *KNOWN} for name, (_, keys) in FORMATS.items()}
_KNOWN["alpaca"].add("input")
_KNOWN["completion"].add("label")
_COLUMNS = {*PAIR}.union(*_KNOWN.values())
