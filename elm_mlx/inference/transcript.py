"""A conversation in a file: JSON, `{"messages": [{"role": …, "content": …}, …]}`, as chat data is written everywhere.

Knows that format, and nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elm_mlx import files, reading
from elm_mlx.errors import InputError


def write(path: Path, messages: Sequence[dict[str, str]]) -> None:
    """Whole or not at all, in place of a conversation that is there already.

    Raises:
        InputError: what is there is no conversation.
        ElmError: the file cannot be written.
    """
    path = files.expanded(path)
    if path.exists():
        try:
            read(path)
        except InputError:
            raise InputError(f"{path}: exists, and is no saved conversation; choose another name") from None
    files.write_text(path, json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=1) + "\n")


def read(path: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """The system prompt, if there is one, and each message with its answer.

    Raises:
        InputError: the file cannot be read, or holds something else; says where.
    """
    path = files.expanded(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no file")
    record = reading.json_value(path)
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list):
        raise InputError(f"{path}: no conversation: an object with a list `messages` is needed")
    contents = [_content(message, f"{path}: message {number}") for number, message in enumerate(messages, 1)]
    roles = [message["role"] for message in messages]
    system = contents.pop(0) if roles[:1] == ["system"] else None
    offset = len(roles) - len(contents)
    for number, role in enumerate(roles[offset:]):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise InputError(f"{path}: message {number + offset + 1} is from {role!r}, where {expected!r} is to speak")
    if len(contents) % 2:
        raise InputError(f"{path}: the last message has no answer")
    return system, list(zip(contents[::2], contents[1::2], strict=True))


def _content(message: Any, where: str) -> str:
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise InputError(f"{where}: an object with texts `role` and `content` is needed")
    return str(message["content"])
