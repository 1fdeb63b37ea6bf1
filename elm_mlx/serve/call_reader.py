"""Calls of functions out of an answer, read as it comes, in the shape of OpenAI's API.

What is no call, or a malformed one, is content: nothing that a model says is lost.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from elm_mlx.inference.generation import overlap
from elm_mlx.reading import load_json
from elm_mlx.serve.call_form import CALL_ID, CallForm

Delta = dict[str, Any]  # of a choice in a chunk: {"content": …} or {"tool_calls": [{"index": …, …}]}

_CALL = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')

_NAMED, _ID = r"([\w-]{{1,64}}){}(?=\{{)", "[a-zA-Z0-9]{9}"  # where the name stands by itself
_LONGEST_OPENING = 100


class CallReader:
    """Reads an answer as it comes: text in, deltas out. How the text is cut into pieces makes no difference.

    Args:
        names: the functions that may be called; a call of another is content.
        held: a grammar holds the answer to the form, so that what begins as a call is one, and arguments are given
            on in pieces. Else a call is given on when it is whole.
        new_id: makes a call's id.

    Attributes:
        calls: the number of calls so far.
    """

    def __init__(
        self, form: CallForm, names: Collection[str], held: bool = False, new_id: Callable[[], str] | None = None
    ) -> None:
        self._form, self._names, self._held, self._new_id = form, names, held, new_id or _new_id
        self.calls = 0
        self._text = ""  # not read yet
        self._space = ""  # at the end of the content so far: no part of it where a call follows
        self._spoken = False
        self._state: Callable[[], Iterator[Delta]] = self._outside
        self._listed = False  # amid a list of calls
        self._opening = _CALL if form.head else re.compile(_NAMED.format(re.escape(form.middle).replace(CALL_ID, _ID)))
        self._no_controls = dict.fromkeys(map(ord, form.controls.values()))
        self._named = ""  # of the call whose arguments are awaited
        self._raw = ""  # of the call that is being read: content, should it be none
        self._restart()

    def add(self, text: str, token: int | None = None) -> list[Delta]:
        """Returns what is final after `text`, which came with `token`."""
        self._text += text
        if token is not None:
            self._text += self._form.controls.get(token, "")
        return [*self._read()]

    def finish(self) -> list[Delta]:
        """Returns the rest, at the end of the answer."""
        rest = self._text
        if self._state in (self._object, self._whole_arguments):
            rest = self._raw + rest
        elif self._state == self._arguments or (self._state == self._after and self._form.end.startswith(rest.strip())):
            rest = ""
        self._text = ""
        deltas = [*self._content(rest)]
        if self._space and not self.calls:
            deltas.append({"content": self._space})
        return deltas

    def finish_reason(self, reason: str) -> str:
        """Returns the reason why the answer ended, by that of its text."""
        return "tool_calls" if self.calls and reason == "stop" else reason

    def _read(self) -> Iterator[Delta]:
        """Each state takes from the text what it can, and leaves it to the same one, or another, to go on."""
        while True:
            before = self._state, self._text
            yield from self._state()
            if (self._state, self._text) == before:
                return

    def _outside(self) -> Iterator[Delta]:
        form, text = self._form, self._text
        if not form.begin and (self._spoken or self.calls):
            self._text = ""
            yield from self._content(text)
        elif not form.begin:
            start = len(text) - len(text.lstrip())
            if text[start:].startswith("{"):
                self._text = text[start:]
                self._begin(text[:start])
            elif text[start:]:
                self._text = ""
                yield from self._content(text)
        else:
            at = text.find(form.begin)
            end = len(text) - overlap(text, form.begin) if at < 0 else at
            self._text = text[end:] if at < 0 else text[end + len(form.begin) :]
            yield from self._content(text[:end])
            if at >= 0:
                self._begin(form.begin)

    def _object(self) -> Iterator[Delta]:
        """Before or amid a call's object, or the list of them."""
        if not self._skipped():
            return
        if self._text[0] == "[" and not self._listed and self._raw.strip() == self._form.begin:
            self._listed = True
            self._raw, self._text = self._raw + "[", self._text[1:]
        elif not self._form.head and not (found := self._opening.match(self._text)):
            if len(self._text) > _LONGEST_OPENING:
                yield from self._malformed()
        elif not self._form.head and not self._held:
            assert found
            self._named, self._raw, self._text = found[1], self._raw + found[0], self._text[found.end() :]
            self._state = self._whole_arguments
        elif self._form.head and self._text[0] != "{":
            yield from self._malformed()
        elif self._held and (found := self._opening.match(self._text)) and found[1] in self._names:
            yield self._opened(found[1], "")
            self._text = self._text[found.end() :]
            self._restart()
            self._state = self._arguments
        elif (end := self._end()) is not None:
            whole, self._text = self._text[:end], self._text[end:]
            call = json_object_in(whole) or {}
            name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
            arguments = {} if arguments is None else json_object_in(arguments)
            if isinstance(name, str) and name in self._names and arguments is not None:
                yield self._opened(name, json.dumps(arguments, ensure_ascii=False))
                self._restart()
                self._state = self._after
            else:
                self._raw += whole
                yield from self._malformed()

    def _whole_arguments(self) -> Iterator[Delta]:
        """After the name of a call that is given on when it is whole."""
        if (end := self._end()) is not None:
            whole, self._text = self._text[:end], self._text[end:]
            if self._named in self._names and json_object_in(whole) is not None:
                yield self._opened(self._named, whole)
                self._restart()
                self._state = self._after
            else:
                self._raw += whole
                yield from self._malformed()

    def _arguments(self) -> Iterator[Delta]:
        end = self._end()
        piece, self._text = self._text[:end], self._text[end:] if end is not None else ""
        self._scanned = 0
        if piece:
            yield {"tool_calls": [{"index": self.calls - 1, "function": {"arguments": piece}}]}
        if end is not None:
            self._restart()
            self._state = self._closing if self._form.tail else self._after

    def _closing(self) -> Iterator[Delta]:
        """After a call's arguments: its object ends."""
        if self._skipped():
            self._text = self._text.removeprefix("}")
            self._state = self._after
        yield from ()

    def _after(self) -> Iterator[Delta]:
        """After a call: the next one, or the end of the calls."""
        if not self._skipped():
            return
        form, text = self._form, self._text
        if self._listed and text[0] in ",]":
            self._listed = text[0] == ","
            self._raw, self._text = self._raw + text[0], text[1:]
            self._state = self._object if self._listed else self._after
        elif text[0] == "{":
            self._state = self._object
        elif not form.end or not form.end.startswith(text[: len(form.end)]):
            self._state = self._outside
        elif text.startswith(form.end):
            self._text = text[len(form.end) :]
            self._state = self._outside
        yield from ()

    def _begin(self, mark: str) -> None:
        """Begins the calls, after `mark`."""
        self._listed, self._state = False, self._object
        self._restart(mark)

    def _restart(self, raw: str = "") -> None:
        """Begins another object; `raw` is content, should it be no call."""
        self._raw, self._scanned, self._depth, self._quoted, self._escaped = raw, 0, 0, False, False

    def _skipped(self) -> bool:
        """Passes white space over; False where nothing else is there yet."""
        start = len(self._text) - len(self._text.lstrip())
        if not self._scanned:
            self._raw, self._text = self._raw + self._text[:start], self._text[start:]
        return bool(self._text)

    def _end(self) -> int | None:
        """Returns where the JSON object ends that the text begins with; None where it has not come yet."""
        for at in range(self._scanned, len(self._text)):
            character = self._text[at]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{}[]":
                self._depth += 1 if character in "{[" else -1
                if self._depth == 0:
                    return at + 1
        self._scanned = len(self._text)
        return None

    def _opened(self, name: str, arguments: str) -> Delta:
        self._space = ""
        self.calls += 1
        function = {"name": name, "arguments": arguments}
        call = {"index": self.calls - 1, "id": self._new_id(), "type": "function", "function": function}
        return {"tool_calls": [call]}

    def _malformed(self) -> Iterator[Delta]:
        raw, self._state = self._raw, self._outside
        self._restart()
        yield from self._content(raw)

    def _content(self, text: str) -> Iterator[Delta]:
        """Yields a text but for the white space at its end, which waits for what follows."""
        whole = self._space + text.translate(self._no_controls)
        said = whole.rstrip()
        self._space = whole[len(said) :]
        if said:
            self._spoken = True
            yield {"content": said}


def _new_id() -> str:
    """Nine letters and digits: Mistral's templates take no other ids back, and others' any."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def whole_message(deltas: Sequence[Delta]) -> dict[str, Any]:
    """Returns the message that deltas add up to: `content`, None where it has calls alone, and `tool_calls` if any."""
    content = "".join(delta.get("content", "") for delta in deltas)
    calls: list[dict[str, Any]] = []
    for call in (call for delta in deltas for call in delta.get("tool_calls", ())):
        if call["index"] == len(calls):
            calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    return message | ({"tool_calls": calls} if calls else {})


def json_object_in(value: Any) -> dict[str, Any] | None:
    """Returns the JSON object that `value` is, or that its text holds; None of anything else."""
    try:
        value = load_json(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
