"""Calls of functions out of an answer, read as it comes, in the shape of OpenAI's API.

What is no call, or a malformed one, is content: nothing that a model says is lost.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from elm_mlx.inference.generation import overlap
from elm_mlx.reading import load_json
from elm_mlx.serve.call_arguments import (
    DECODER,
    ArgumentReader,
    Brackets,
    JSONObject,
    JSONReader,
    Keywords,
    Schema,
    TaggedParameters,
    json_text,
)
from elm_mlx.serve.call_form import CALL_ID, CallForm

Delta = dict[str, Any]  # of a choice in a chunk: {"content": …} or {"tool_calls": [{"index": …, …}]}

_OBJECT = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAME, _ID = r"([\w-]{1,64})", "[a-zA-Z0-9]{9}"
_LONGEST_OPENING = 100


class CallReader:
    """Reads an answer as it comes: text in, deltas out. How the text is cut into pieces makes no difference.

    Args:
        functions: those that may be called, with the schemas of their arguments; a call of another is content.
        held: a grammar holds the answer to the form, so that what begins as a call is one, and arguments are given
            on in pieces. Else a call is given on when it is whole.
        new_id: makes a call's id.

    Attributes:
        calls: the number of calls so far.
    """

    def __init__(
        self,
        form: CallForm,
        functions: Mapping[str, Schema],
        held: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._form, self._functions, self._held, self._new_id = form, functions, held, new_id or _new_id
        self.calls = 0
        self._text = ""  # not read yet
        self._space = ""  # at the end of the content so far: no part of it where a call follows
        self._spoken = False
        self._state: Callable[[], Iterator[Delta]] = self._outside
        self._listed = False  # amid a list of calls
        self._opening = _OBJECT if form.in_object else _opening(form)
        self._no_controls = dict.fromkeys(map(ord, form.controls.values()))
        self._raw = ""  # of the call that is being read: content, should it be none
        self._brackets, self._scanned = Brackets(), 0  # of a call that is an object, and is read whole
        self._named, self._arguments = "", ""  # of a call that is given on when it is whole
        self._reader: ArgumentReader = JSONReader()

    def add(self, text: str, token: int | None = None) -> list[Delta]:
        """Returns what is final after `text`, which came with `token`."""
        self._text += text
        if token is not None:
            self._text += self._form.controls.get(token, "")
        return [*self._read()]

    def finish(self) -> list[Delta]:
        """Returns the rest, at the end of the answer."""
        rest = self._text
        within = self._state in (self._in_arguments, self._closing)
        if self._state == self._call or (within and not self._held):
            rest = self._raw + rest
        elif within or (self._state == self._after and self._form.end.startswith(rest.strip())):
            rest = ""
        self._text = ""
        deltas = [*self._content(rest)]
        if self._space and not self.calls:
            deltas.append({"content": self._space})
        return deltas

    def finish_reason(self, reason: str) -> str:
        """Returns the reason why the answer ended, by that of its text; "length" where a stop string cut arguments."""
        if reason == "stop" and self._held and self._state == self._in_arguments:
            return "length"
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
        if form.begin:
            at = text.find(form.begin)
            end = len(text) - overlap(text, form.begin) if at < 0 else at
            self._text = text[end:] if at < 0 else text[end + len(form.begin) :]
            yield from self._content(text[:end])
            if at >= 0:
                self._begin(form.begin)
            return
        start = len(text) - len(text.lstrip())
        if not (self._spoken or self.calls) and text[start : start + 1] == (form.lead + form.head)[0]:
            self._text = text[start:]
            self._begin(text[:start])
        elif self._spoken or self.calls or text[start:]:
            self._text = ""
            yield from self._content(text)

    def _call(self) -> Iterator[Delta]:
        """Before or amid the opening of a call, or of the list of them; or amid an object that is read whole."""
        if not self._skipped():
            return
        form, text = self._form, self._text
        found = self._opening.match(text) if self._held or not form.in_object else None
        if text[0] == "[" and not self._listed and self._raw.strip() == form.begin:
            self._listed = True
            self._raw, self._text = self._raw + "[", text[1:]
        elif found and found[1] in self._functions:
            self._named, self._arguments = found[1], ""
            self._reader = form.arguments.reader(self._functions[found[1]], self._held)
            self._raw, self._text = self._raw + found[0], text[found.end() :]
            if self._held:
                yield self._opened(self._named, "")
            self._state = self._in_arguments
        elif form.in_object and text[0] == "{":
            yield from self._whole_object()
        elif form.in_object or not self._may_open(text):
            yield from self._malformed()

    def _may_open(self, text: str) -> bool:
        """Returns whether more of a text could make it the opening of a call."""
        head, middle = self._form.head, self._form.middle.strip()
        if len(text) <= len(head):
            return head.startswith(text)
        if not text.startswith(head) or len(text) > _LONGEST_OPENING or self._opening.match(text):
            return False
        name, behind = re.findall(r"^([\w-]*)\s*(.?)", text[len(head) :])[0]
        return not behind or (name != "" and behind == (middle or "<")[0])

    def _whole_object(self) -> Iterator[Delta]:
        """Amid the object of a call that is given on when it is whole."""
        end = self._brackets.find(self._text, self._scanned)
        self._scanned = len(self._text)
        if end is None:
            return
        whole, self._text = self._text[: end + 1], self._text[end + 1 :]
        self._raw += whole
        call = json_object_in(whole) or {}
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
        arguments = {} if arguments is None else json_object_in(arguments)
        if isinstance(name, str) and name in self._functions and arguments is not None:
            yield self._opened(name, json_text(arguments))
            self._restart()
            self._state = self._after
        else:
            yield from self._malformed()

    def _in_arguments(self) -> Iterator[Delta]:
        raw, self._text = self._raw + self._text, ""
        try:
            piece, rest = self._reader.add(raw[len(self._raw) :])
        except ValueError:
            if not self._held:
                self._raw = raw
                yield from self._malformed()
            return
        self._raw = raw if rest is None else raw[: len(raw) - len(rest)]
        self._arguments += "" if self._held else piece
        if self._held and piece:
            yield {"tool_calls": [{"index": self.calls - 1, "function": {"arguments": piece}}]}
        if rest is not None:
            self._text, self._state = rest, self._closing

    def _closing(self) -> Iterator[Delta]:
        """After a call's arguments: the rest of it, or behind tags that have none the end of all calls."""
        tail = self._form.tail.strip()
        mark = tail or (self._form.end if isinstance(self._form.arguments, TaggedParameters) else "")
        if mark and not self._skipped():
            return
        if self._text.startswith(mark):
            self._raw, self._text = self._raw + tail, self._text[len(tail) :]
            if not self._held and json_object_in(self._arguments) is None:
                yield from self._malformed()
                return
            if not self._held:
                yield self._opened(self._named, self._arguments)
            self._restart()
            self._state = self._after
        elif not mark.startswith(self._text):
            yield from self._malformed()

    def _after(self) -> Iterator[Delta]:
        """After a call: the next one, or the end of the calls."""
        if not self._skipped():
            return
        form, text = self._form, self._text
        if self._listed and text[0] in ",]":
            self._listed = text[0] == ","
            self._raw, self._text = self._raw + text[0], text[1:]
            self._state = self._call if self._listed else self._after
        elif form.end and text.startswith(form.end):
            self._text = text[len(form.end) :]
            self._state = self._outside
        elif form.end and form.end.startswith(text):
            return
        elif text[0] == form.head[:1] or (isinstance(form.arguments, Keywords) and "[" not in form.lead):
            self._state = self._call
        else:
            self._state = self._outside
        yield from ()

    def _begin(self, mark: str) -> None:
        """Begins the calls, after `mark`."""
        self._listed, self._state = False, self._call
        self._restart(mark)

    def _restart(self, raw: str = "") -> None:
        """Begins another call; `raw` is content, should it be none."""
        self._raw, self._brackets, self._scanned = raw, Brackets(), 0

    def _skipped(self) -> bool:
        """Passes white space over; False where nothing else is there yet."""
        start = len(self._text) - len(self._text.lstrip())
        if not self._scanned:
            self._raw, self._text = self._raw + self._text[:start], self._text[start:]
        return bool(self._text)

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


def _opening(form: CallForm) -> re.Pattern[str]:
    """Returns what a call begins with up to its arguments, where its name stands in no JSON."""
    middle = re.escape(form.middle.rstrip()).replace(CALL_ID, _ID)
    match form.arguments:
        case JSONObject():
            middle += r"(?=\{)"
        case Keywords():
            middle = r"\s*" + middle
        case TaggedParameters():
            middle += r"\s*(?=<)"
    return re.compile(re.escape(form.head) + _NAME + middle)


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
        value = load_json(value, DECODER) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
