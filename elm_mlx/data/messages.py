"""A conversation's messages as chat templates take them, made of the words of OpenAI, ShareGPT and ChatGPT's export.

Functions, calls and their results come as OpenAI's API has them; a call's arguments are an object here, and may be the
JSON of one where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elm_mlx import reading
from elm_mlx.data.bad_record import BadRecord, key_of, keys_of, kind_of
from elm_mlx.text.chat_template import ROLES

TOOL = "tool"
_CALL = "call"  # a message that is a call and no more, as ShareGPT's kin have them
_ROLES = {
    **{role: role for role in (*ROLES, TOOL)}, "developer": "system", "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "function", "ipython", "tool_response", "function_response"), TOOL),
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
}  # fmt: skip
_TEXTS = ("text", "input_text", "output_text")  # kinds of parts

NOTHING: tuple[Any, ...] = (None, "", "[]", [], {})
NO_TEMPLATE = "which no template here can show"
# Of a message, keys that say something which nothing here does.
_NOT_SHOWN = dict.fromkeys(
    ("tools", "reasoning_content", "thinking", "refusal", "images", "audio"), NO_TEMPLATE
) | {"train_detail": "a part of an answer to train on, and answers are trained on whole"}  # fmt: skip
MARKS = ("weight", "train", "training", "loss")  # OpenAI's and Mistral's, Axolotl's two, ms-swift's
KNOWN = {
    "role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", *_NOT_SHOWN, *MARKS,
}  # fmt: skip

# In ChatGPT's export, what is not said aloud: its thoughts, and instructions that are shown apart.
_SILENT = ("thoughts", "reasoning_recap", "user_editable_context", "model_editable_context", "app_pairing_content")

Turns = tuple[Mapping[str, Any], ...]


def turns(messages: Sequence[Mapping[str, Any]], whose: str = "") -> Turns:
    """Returns messages by `role` (system, user, assistant, tool) and `content`; perhaps with `tool_calls`.

    Args:
        whose: what errors have before a message's number.

    Raises:
        BadRecord: one is not as it must be, or has something that no template here can show.
    """
    return tuple(_turn(message, f"{whose}message {number}") for number, message in enumerate(messages, 1))


def is_list(value: Any) -> bool:
    """Tells whether a value is a list of objects, one at least."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def unpacked(value: Any) -> Any:
    """Returns what a text is the JSON of, where it is that of a list or an object; all else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return reading.load_json(value, reading.JSON_RECORDS)
        except ValueError:
            return value
    return value


def refuse(value: Mapping[str, Any], not_used: Mapping[str, str], whose: str) -> None:
    """Raises BadRecord for a key of `not_used` that says something."""
    for key, why in not_used.items():
        if key in value and value[key] not in NOTHING:
            raise BadRecord(f"{whose}has `{key}`, {why}")


def tools_of(value: Mapping[str, Any]) -> Turns:
    """Returns the functions that a record's `tools`, or OpenAI's older `functions`, describes. Raises BadRecord."""
    given = {key: unpacked(value[key]) for key in ("tools", "functions") if value.get(key) not in NOTHING}
    if len(given) > 1:
        raise BadRecord("has `tools` and `functions`: keep one")
    found: list[Mapping[str, Any]] = []
    for key, tools in given.items():
        if not is_list(tools):
            raise BadRecord(f"`{key}` is {kind_of(tools)}, not a list of functions")
        for number, tool in enumerate(tools, 1):
            function = unpacked(tool.get("function", tool))
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise BadRecord(f"`{key}`, function {number}: an object with a `name` is needed")
            parameters = function.get("parameters")
            if parameters is None:
                parameters = {"type": "object", "properties": {}, "additionalProperties": False}
            described = {"description": "", **function, "parameters": unpacked(parameters)}  # templates look for both
            found.append({"type": "function", "function": described})
    return tuple(found)


def of_chatgpt(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages on the current branch of a conversation in ChatGPT's `conversations.json`.

    Left out are what is hidden there, and thoughts.

    Raises:
        BadRecord: it is not as it must be, or tools or pictures take part in it.
    """
    found: list[dict[str, Any]] = []
    for message in _branch(value):
        author, content = _inner(message, "author"), _inner(message, "content")
        kind, role = content.get("content_type", "text"), author.get("role")
        about = message.get("metadata")
        hidden = isinstance(about, dict) and about.get("is_visually_hidden_from_conversation")
        if hidden or message.get("weight") == 0 or kind in _SILENT:
            continue
        of = f"message {len(found) + 1}"
        if role == TOOL or message.get("recipient") not in (None, "all"):
            name = author.get("name") if role == TOOL else message.get("recipient")
            raise BadRecord(
                f"{of}: ChatGPT's tool {key_of(str(name))} takes part, and its work is no text to learn from"
            )
        text = _text_of_parts(content.get("parts", [content.get("text")]), of)
        if text or role == "user":
            found.append({"role": role, "content": text})
    return found


def _branch(value: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages from the first to the current one, of a tree. Raises BadRecord."""
    nodes = value["mapping"]
    if not isinstance(nodes, dict) or not all(isinstance(node, dict) for node in nodes.values()):
        raise BadRecord("`mapping` is not an object of objects")
    at, path = value.get("current_node"), dict[str, dict[str, Any]]()
    if at is None:  # the newest branch: the last of those that nothing follows
        at = next((name for name in reversed(nodes) if not nodes[name].get("children")), None)
    while at is not None:
        if not isinstance(at, str) or at not in nodes:
            if not path:
                raise BadRecord(f"`current_node` is {key_of(str(at))}, which is not in `mapping`")
            break  # older exports have a parent of the first message that is not there
        if at in path:
            raise BadRecord("`mapping` is no tree: a message is its own parent")
        path[at] = nodes[at]
        at = nodes[at].get("parent")
    for node in reversed(path.values()):
        if isinstance(node.get("message"), dict):
            yield node["message"]


def _inner(message: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = message.get(key)
    if not isinstance(value, dict):
        raise BadRecord(f"a message's `{key}` is {kind_of(value)}, not an object")
    return value


def _turn(message: Mapping[str, Any], of: str) -> dict[str, Any]:
    for one, other in (("role", "from"), ("content", "value")):
        if message.get(one) is not None and message.get(other) is not None:
            raise BadRecord(f"{of} has `{one}` and `{other}`: keep one")
    refuse(message, _NOT_SHOWN, f"{of} ")
    said = message.get("from") if message.get("role") is None else message["role"]
    role = _ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise BadRecord(f"{of}: role is {said!r}, not one of {', '.join((*ROLES, TOOL))}, or as ShareGPT calls them")
    content = message.get("value") if message.get("content") is None else message["content"]
    if role == _CALL:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, of)}
    calls = message.get("tool_calls")
    if message.get("function_call") not in NOTHING:
        calls = [{"function": message["function_call"]}] if calls in NOTHING else calls
    if calls not in NOTHING:
        if role != "assistant":
            raise BadRecord(f"{of} has `tool_calls`, and is not the assistant's")
        content = "" if content is None else content
    if isinstance(content, list):
        content = _text_of_parts(content, of)
    if not isinstance(content, str):
        missing = content is None and "content" not in message and "value" not in message
        raise BadRecord(f"{of}: content is {'missing' if missing else f'{kind_of(content)}, not a string'}")
    made: dict[str, Any] = {"role": role, "content": content}
    if calls not in NOTHING:
        made["tool_calls"] = _calls(calls, of)
    for key in ("name", "tool_call_id"):
        if message.get(key) not in NOTHING:
            if role != TOOL:
                raise BadRecord(f"{of} has `{key}`, {NO_TEMPLATE} but of a tool's result")
            made[key] = message[key]
    return made


def _calls(value: Any, of: str) -> list[dict[str, Any]]:
    """Calls of functions, one or several, as templates have them. Raises BadRecord."""
    value = unpacked(value)
    calls = [value] if isinstance(value, dict) else value
    if not is_list(calls):
        raise BadRecord(
            f"{of}: a call is {kind_of(value)}, not an object with `name` and `arguments`, or a list of such"
        )
    found = []
    for call in calls:
        function = unpacked(call.get("function", call))
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRecord(f"{of}: a call has no `name`; it has {keys_of(call)}")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if arguments in NOTHING else unpacked(arguments)
        if not isinstance(arguments, dict):
            raise BadRecord(
                f"{of}: the arguments of {key_of(function['name'])} are neither an object nor the JSON of one"
            )
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append(made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return found


def _text_of_parts(parts: Any, of: str) -> str:
    """The text of a message in parts, each a text or an object of the type `text`. Raises BadRecord."""
    if not isinstance(parts, list):
        raise BadRecord(f"{of}: its parts are {kind_of(parts)}, not a list")
    texts = []
    for number, part in enumerate(parts, 1):
        text: Any = part
        kind: Any = "text"
        if isinstance(part, dict):
            text, kind = part.get("text"), part.get("type", part.get("content_type", "text"))
        if kind not in _TEXTS:
            raise BadRecord(f"{of}, part {number} is {key_of(str(kind))}, and only text is trained on")
        if not isinstance(text, str):
            raise BadRecord(f"{of}, part {number} has no text")
        texts.append(text)
    return "".join(texts)
