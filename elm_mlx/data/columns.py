"""Columns: which of a file's columns, or fields, is which key of a record; said by the user, or guessed by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from elm_mlx.data.bad_record import few, key_of
from elm_mlx.errors import InputError

# The keys of each format: those that it must have, and those that it may.
KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pairs": (("chosen", "rejected"), ("prompt", "system")),
    "completion": (("prompt", "completion"), ("system",)),
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "chatgpt": (("mapping",), ("current_node",)),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "text": (("text",), ()),
}
_ALL = tuple(dict.fromkeys(key for name, (must, may) in KEYS.items() if name != "chatgpt" for key in (*must, *may)))
_APART = re.compile(rf",(?=\s*(?:{'|'.join(_ALL)})\s*=)")
_EXAMPLE = "--columns prompt=NAME,completion=NAME (or text=NAME) says which to train on"

# What people call the columns of a table, without case and signs.
_CALLED = {
    "prompt": {
        "prompt", "question", "query", "input", "user", "human", "instruction", "q", "request", "problem", "inputtext",
        "userinput", "usermessage", "userprompt",
    },
    "completion": {
        "completion", "answer", "response", "output", "reply", "assistant", "a", "solution", "target", "gpt", "bot",
        "outputtext", "modelresponse", "assistantresponse", "botresponse",
    },
    "text": {"text", "content", "document", "body", "article"},
    "system": {"system", "systemprompt", "systemmessage"},
    "messages": {"messages"},
    "conversations": {"conversations", "conversation", "dialog", "dialogue", "chat"},
    "tools": {"tools"},
    "instruction": {"instruction"},
    "input": {"input", "context"},
    "output": {"output", "response", "answer", "completion"},
    "chosen": {"chosen", "preferred", "accepted"},
    "rejected": {"rejected", "dispreferred"},
}  # fmt: skip
_GUESSED = ("completion", "messages", "sharegpt", "alpaca")  # text comes last, and pairs where they are wanted
_BY_KEY = {key: {key} for key in _CALLED}


class Heading(NamedTuple):
    """The names of a table's columns.

    Attributes:
        names: in their order.
        where: their place, for messages.
        kind: of the table, for people.
        separator: what stands between fields, of a table whose first line is taken for names and may be none; or None.
    """

    names: list[str]
    where: str
    kind: str
    separator: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns that are taken of a file, which has others too.

    Attributes:
        taken: the column of each key of a record.
        guessed: nobody has named them.
    """

    taken: Mapping[str, str]
    guessed: bool = False

    def __str__(self) -> str:
        named = ", ".join(f"{key} = {key_of(column)}" for key, column in self.taken.items())
        return f"{named} (guessed; --columns says it otherwise)" if self.guessed else named

    def renamed(self, value: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Returns a value by the keys of a record, and the columns that are not taken."""
        made = {key: value[column] for key, column in self.taken.items() if column in value}
        columns = set(self.taken.values())
        return made, [key_of(name) for name in value if name not in columns]

    def by_column(self, reason: str) -> str:
        """Returns what is wrong with a record, its keys named as the file has them."""
        return re.sub(r"`(\w+)`", lambda found: key_of(self.taken.get(found[1], found[1])), reason)


def parsed(texts: Iterable[str]) -> Columns | None:
    """Returns the columns that texts like `prompt=question,completion=answer` name; None where there are none.

    Raises:
        InputError: one has another form, or a key that no record has; or together they make no record.
    """
    taken: dict[str, str] = {}
    for item in (item for text in texts for item in _APART.split(text)):
        key, sign, column = (part.strip() for part in item.partition("="))
        if not sign or not column or key not in _ALL:
            raise InputError(f"--columns {item.strip()}: write KEY=COLUMN, with one of the keys {', '.join(_ALL)}")
        if key in taken:
            raise InputError(f"--columns: {key} stands there twice")
        taken[key] = column
    if not taken:
        return None
    if not any(taken.keys() >= set(must) for must, _ in KEYS.values()):
        sets = "; ".join(", ".join(must) for must, _ in KEYS.values())
        raise InputError(f"--columns names {', '.join(taken)}: all of one of these are needed: {sets}")
    return Columns(taken)


def guess(names: Sequence[str], format: str | None = None) -> Columns | None:
    """Returns which of a table's columns are a record, by their names; None where these don't say it.

    Names that are a format's keys but for case come before what people call them otherwise, and `text` comes last.

    Args:
        format: the only one that will do, of KEYS; by default any but pairs.
    """
    words = {re.sub(r"[\W_]+", "", name).casefold(): name for name in reversed(names)}
    with_input = "context" in words or {"instruction", "input"} <= words.keys()
    tried = [(name, called) for called in (_BY_KEY, _CALLED) for name in KEYS if name in _GUESSED]
    tried += [("text", _BY_KEY), ("text", _CALLED)]
    if format is not None and format != "chatgpt":
        tried = [(format, _BY_KEY), (format, _CALLED)]
    for name, called in tried:
        must, may = KEYS[name]
        # Of an instruction by another name, that is one with an input; and no context is left out by a guess.
        if called is _CALLED and name in ("alpaca", "completion") and with_input is not (name == "alpaca"):
            continue
        found = {key: [column for word, column in words.items() if word in called[key]] for key in (*must, *may)}
        taken = {key: columns[0] for key, columns in found.items() if columns}
        one_each = all(len(columns) < 2 for columns in found.values()) and len(set(taken.values())) == len(taken)
        if one_each and taken.keys() >= set(must):
            return Columns(taken, guessed=True)
    return None


def of_table(heading: Heading, asked: Columns | None, format: str | None = None) -> Columns | None:
    """Returns the columns that are taken of a table; None where it has the keys of records themselves.

    Raises:
        InputError: it has not those that were asked for, or none that can be guessed.
    """
    names, where, shown = heading.names, heading.where, few(map(key_of, heading.names), 12)
    found, no_names = f"has the columns {shown}", ""
    if heading.separator is not None:
        found = f"was taken for the columns' names: {shown}"
        others = [f"column {number}" for number in range(3, len(names) + 1)]
        line = heading.separator.join(["prompt", "completion", *others] if len(names) > 1 else ["text"])
        no_names = f"; if it is a record already, put a line with a name for each column above it: {key_of(line)}"
    if asked is not None:
        missing = next((column for column in asked.taken.values() if column not in names), None)
        if missing is not None:
            raise InputError(f"{where}: {found}; none is {key_of(missing)}{no_names}")
        return asked
    if any(set(must) <= set(names) for name, (must, _) in KEYS.items() if name != "text") or not names:
        return None
    guessed = guess(names, format)
    if guessed is None:
        raise InputError(f"{where}: {found}; {_EXAMPLE}{no_names}")
    return None if guessed.taken == {"text": "text"} else guessed


def hint(names: Iterable[str]) -> str:
    """Returns the option that would take a record of other keys, or nothing."""
    guessed = guess([name for name in names if name.isprintable()])
    if guessed is None:
        return ""
    return "; --columns " + ",".join(f"{key}={column}" for key, column in guessed.taken.items()) + " takes it"
