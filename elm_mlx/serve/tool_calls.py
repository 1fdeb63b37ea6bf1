"""Tool calls: the functions of a request into the model's prompt, and the calls of them out of its answer.

Models write a call as text, each family in a form of its own, which its chat template shows when it renders one. An
answer is read as it comes, and given on in the shape of OpenAI's API. Where llguidance is installed, a grammar holds
calls to their functions' schemas, and then arguments are given on in pieces; else a call is given on when it is whole.
What is no call, or a malformed one, is content: nothing that a model says is lost.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.generation import overlap
from elm_mlx.inference.grammar import Grammar, GrammarCompiler, schema_text
from elm_mlx.reading import load_json, short
from elm_mlx.text.chat_template import JinjaTemplate, Part, Template
from elm_mlx.text.jinja import LimitError

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ANY_OBJECT = {"type": "object"}

Delta = dict[str, Any]  # of a choice in a chunk: {"content": …} or {"tool_calls": [{"index": …, …}]}


class ToolsError(InputError):
    """A field of a request is at fault; `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


# The fields of a request ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """A function that a model may call.

    Attributes:
        entry: the tool as the request has it, for the template.
        parameters: the JSON schema of its arguments, an object.
        strict: a schema that no grammar can hold to is an error; else arguments are then any object.
    """

    name: str
    entry: Mapping[str, Any]
    parameters: Mapping[str, Any]
    strict: bool


@dataclass(frozen=True)
class ToolUse:
    """The functions of a request, and how they are to be used.

    Attributes:
        choice: "auto" leaves it to the model, "required" makes it call one, "none" none.
        parallel: several calls in one answer are welcome.
    """

    functions: tuple[Function, ...]
    choice: Literal["none", "auto", "required"] = "auto"
    parallel: bool = True

    @property
    def callable(self) -> tuple[Function, ...]:
        return () if self.choice == "none" else self.functions


def parse_tool_use(tools: Any, choice: Any = None, parallel: Any = None) -> tuple[list[Mapping[str, Any]], ToolUse]:
    """Parses the fields `tools`, `tool_choice` and `parallel_tool_calls`; None for those that are not given.

    Returns:
        The tools to show the model, none where it may call none, and their use: that of one alone, where `choice` names
        it.

    Raises:
        ToolsError: a field is malformed.
    """
    if tools is not None and not (isinstance(tools, list) and len(tools) <= MAX_TOOLS):
        raise ToolsError("tools", f"is {short(tools)}: a list of at most {MAX_TOOLS} functions is needed")
    functions = [_function(f"tools[{i}]", tool) for i, tool in enumerate(tools or [])]
    names = [function.name for function in functions]
    twice = next((i for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ToolsError(f"tools[{twice}].function.name", f"{names[twice]!r} stands twice")
    if parallel is not None and not isinstance(parallel, bool):
        raise ToolsError("parallel_tool_calls", f"is {short(parallel)}: true or false is needed")
    several = parallel is not False
    shown = [] if choice == "none" else [function.entry for function in functions]
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        if name not in names:
            raise ToolsError("tool_choice", f"names {short(name)}, which is none of tools")
        return shown, ToolUse((functions[names.index(name)],), "required", False)
    if choice is None:
        choice = "auto" if functions else "none"
    if choice not in ("none", "auto", "required"):
        needed = '"none", "auto", "required" or {"type": "function", "function": {"name": …}}'
        raise ToolsError("tool_choice", f"is {short(choice)}: {needed} is needed")
    if choice == "required" and not functions:
        raise ToolsError("tool_choice", "is required, and there are no tools")
    return shown, ToolUse(tuple(functions), choice, several)


def _function(where: str, tool: Any) -> Function:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise ToolsError(where, 'an object {"type": "function", "function": {…}} is needed')
    function = tool["function"]
    name, strict = function.get("name"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ToolsError(f"{where}.function.name", "1 to 64 letters, digits, _ and - are needed")
    if not isinstance(function.get("description"), str | None):
        raise ToolsError(f"{where}.function.description", "a string is needed")
    if not isinstance(strict, bool | None):
        raise ToolsError(f"{where}.function.strict", "true or false is needed")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise ToolsError(f"{where}.function.parameters", "the JSON schema of an object is needed")
    # Templates look for both, also where the request leaves them out.
    entry = {"type": "function", "function": {"description": "", **function, "parameters": parameters}}
    return Function(name, entry, {"type": "object", **parameters}, bool(strict))


def parse_tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Parses the `tool_calls` of an assistant's message; returns them as templates have them, arguments as objects.

    Raises:
        ToolsError: they are malformed.
    """
    if not isinstance(calls, list) or not 0 < len(calls) <= MAX_TOOLS:
        raise ToolsError(where, f"is {short(calls)}: a list of 1 to {MAX_TOOLS} calls is needed")
    parsed = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise ToolsError(f"{where}[{i}]", 'an object {"id": …, "type": "function", "function": {…}} is needed')
        for name, value in (("id", call.get("id")), ("function.name", function.get("name"))):
            if not isinstance(value, str) or not value:
                raise ToolsError(f"{where}[{i}].{name}", "a string is needed")
        arguments = _object(function.get("arguments"))
        if arguments is None:
            raise ToolsError(f"{where}[{i}].function.arguments", "a string is needed that holds a JSON object")
        called = {"name": function["name"], "arguments": arguments}
        parsed.append({"id": call["id"], "type": "function", "function": called})
    return parsed


def _object(value: Any) -> dict[str, Any] | None:
    """Returns the JSON object that `value` is, or that its text holds; None of anything else."""
    try:
        value = load_json(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# The form of a call ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallForm:
    """The text by which a model calls functions: `begin lead head NAME middle ARGUMENTS tail (between …)* trail`.

    Attributes:
        begin: the mark that calls begin with; empty where an answer that begins with `{` is one.
        begin_id: the control token that stands for it, which has no text.
        between: between one call's `tail` and the next one's `head`; None where an answer has one call.
    """

    begin: str
    lead: str
    trail: str
    between: str | None
    begin_id: int | None = None
    head: str = '{"name": "'
    middle: str = '", "arguments": '
    tail: str = "}"

    @property
    def end(self) -> str:
        """The mark that calls end with; empty where there is none."""
        return self.trail.strip().lstrip("]").lstrip()


_TAGGED = CallForm("<tool_call>", "\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n")
_LISTED = CallForm("<tool_call>", "[", "]</tool_call>", ", ")
_PROBE, _SECOND, _ID = "elm_probe", "elm_prone", "elmprobe9"
_ARGUMENTS = re.compile(rf'(",\s*"(?:arguments|parameters)":\s*)\{{"k":\s*"v"\}}(?:,\s*"id":\s*"{_ID}")?\s*\}}')
_BEGIN = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\])(\s*\[?\s*)$")
_TRAIL = re.compile(r"\s*\]?\s*(?:</[^<>\s]+>|\[/[A-Z_]+\])|\s*\]")


def call_form(template: Template | None) -> CallForm | None:
    """Returns the form in which a template writes calls; None where it takes no functions, or its form is not known."""
    if not isinstance(template, JinjaTemplate):
        return None
    try:
        rendered = _rendered_calls(template, (_PROBE,)) if template.takes_tools else None
        if rendered is not None and any(isinstance(part, str) and _PROBE in part for part in rendered[0]):
            return _rendered_form(template, *rendered)
    except LimitError:
        return None
    if not template.takes_tools or "<tool_call>" not in template.tool_source:
        return None
    # The model is told in words, and shown no call.
    return _LISTED if "<tool_call>[" in template.tool_source else _TAGGED


def _rendered_form(template: JinjaTemplate, parts: Sequence[Part], asked: int) -> CallForm | None:
    """Returns the form of the call in `parts`, which has `asked` control tokens before the answer; None for others."""
    found = _around(parts, _PROBE)
    if found is None:
        return None
    index, before, head, middle, after = found
    controls = [part for part in parts[:index] if isinstance(part, int)]
    begin, begin_id, lead = "", None, ""
    if len(controls) > asked:
        begin_id, lead = controls[-1], before
    elif mark := _BEGIN.search(before):
        begin, lead = mark.groups()
    trail = _TRAIL.match(after)
    between = None
    two = _rendered_calls(template, (_PROBE, _SECOND))
    if two is not None and (first := _around(two[0], _PROBE)) and (second := _around(two[0], _SECOND)):
        text, after_first, before_second = two[0][first[0]], first[4], second[1]
        if isinstance(text, str) and first[0] == second[0]:
            between = text[len(text) - len(after_first) : len(before_second)]
    return CallForm(begin, lead, trail[0] if trail else "", between, begin_id, head, middle)


def _rendered_calls(template: JinjaTemplate, names: Sequence[str]) -> tuple[list[Part], int] | None:
    """Returns a conversation that ends with calls, and the number of control tokens before the answer.

    None where the template does not take it.
    """
    question = {"role": "user", "content": "?"}
    calls = [{"id": _ID, "type": "function", "function": {"name": name, "arguments": {"k": "v"}}} for name in names]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    schema = {"type": "object", "properties": {"k": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": schema}}
    try:
        whole, asked = template.parts_of([([question, answer], False), ([question], True)], [tool])
    except InputError:
        return None
    return whole, sum(isinstance(part, int) for part in asked)


def _around(parts: Sequence[Part], name: str) -> tuple[int, str, str, str, str] | None:
    """Returns the part that calls `name`: its number, its text before, the call's `head`, `middle`, its text after."""
    for index, part in enumerate(parts):
        if isinstance(part, str) and name in part:
            before, _, rest = part.partition(name)
            start, arguments = before.rfind("{"), _ARGUMENTS.match(rest)
            if arguments and re.fullmatch(r'\{\s*"name":\s*"', before[max(start, 0) :]):
                return index, before[:start], before[start:], arguments[1], rest[arguments.end() :]
    return None


class ToolCaller:
    """Calls of functions by one model: what holds them to a request, and what reads them.

    Attributes:
        form: of the model's calls; None where it takes no functions.
    """

    def __init__(self, template: Template | None, compiler: GrammarCompiler) -> None:
        self.form = call_form(template)
        self._compiler = compiler

    def check(self, param: str) -> None:
        """Raises ToolsError, which names the field `param`, where the model cannot call functions."""
        if self.form is None:
            raise ToolsError(param, "this model's chat template takes no tools, or writes calls in an unknown form")

    def grammar(self, use: ToolUse) -> Grammar | None:
        """Returns what holds an answer to `use`; None where nothing needs to, or, of "auto", llguidance is absent.

        May take a second: not for an event loop.

        Raises:
            ToolsError: a function's schema cannot be held to, and it is strict, or a call is required; or llguidance is
                not installed then.
        """
        if self.form is None or not use.callable:
            return None
        required = use.choice == "required"
        try:
            schemas = [self._schema(function, required) for function in use.functions]
            return self._compiler.lark(_grammar(self.form, use, schemas))
        except InputError:
            raise
        except ElmError as error:
            if required or any(function.strict for function in use.functions):
                raise ToolsError("tool_choice" if required else "tools", str(error)) from None
            return None

    def _schema(self, function: Function, required: bool) -> Mapping[str, Any]:
        try:
            self._compiler.json_schema(function.parameters)
        except InputError as error:
            if required or function.strict:
                raise ToolsError("tools", f"{function.name}'s parameters: {error}") from None
            return _ANY_OBJECT
        return function.parameters

    def reader(self, use: ToolUse, held: bool) -> CallReader:
        """Returns what reads an answer; `held` says that a grammar holds it."""
        assert self.form is not None
        return CallReader(self.form, {function.name for function in use.callable}, held)


def _grammar(form: CallForm, use: ToolUse, schemas: Sequence[Mapping[str, Any]]) -> str:
    """Returns the grammar, in llguidance's Lark, of an answer with calls."""
    literal = json.dumps  # Lark quotes a text as JSON does
    rules = [
        f"call{i}: {literal(form.head + function.name + form.middle)} %json {schema_text(schema)} {literal(form.tail)}"
        for i, (function, schema) in enumerate(zip(use.functions, schemas, strict=True))
    ]
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(schemas))))
    lead, trail = (literal(text) if text else "" for text in (form.lead, form.trail))
    more = f"({literal(form.between)} call)*" if form.between and use.parallel else ""
    rules.append(f"calls: {lead} call {more} {trail}")
    rules.append(r"TEXT: /(.|\n)+/")
    begin = f"<[{form.begin_id}]>" if form.begin_id is not None else literal(form.begin) if form.begin else ""
    if use.choice == "required":
        rules.append(f"start: {begin} calls")
    elif form.begin_id is not None:
        rules.append(f"start: TEXT? | TEXT? {begin} calls")
    elif form.begin:
        rules += [rf"begun[lazy]: /(.|\n)*/ {begin}", "start: TEXT? | begun calls"]
    else:
        rules += [r"OTHER: /\s*[^{\s](.|\n)*/", "start: OTHER? | calls"]
    return "\n".join(rules)


# An answer ------------------------------------------------------------------------------------------------------------

_CALL = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


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
        self._raw = ""  # of the call that is being read: content, should it be none
        self._restart()

    def add(self, text: str, token: int | None = None) -> list[Delta]:
        """Returns what is final after `text`, which came with `token`."""
        self._text += text
        deltas = [*self._read()]
        if token is not None and token == self._form.begin_id and self._state in (self._outside, self._after):
            deltas += [*self._content(self._text)]
            self._text = ""
            self._begin("")
        return deltas

    def finish(self) -> list[Delta]:
        """Returns the rest, at the end of the answer."""
        rest = self._text
        if self._state == self._object:
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
        if form.begin_id is not None or (not form.begin and (self._spoken or self.calls)):
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
        elif self._text[0] != "{":
            yield from self._malformed()
        elif self._held and (found := _CALL.match(self._text)) and found[1] in self._names:
            yield self._opened(found[1], "")
            self._text = self._text[found.end() :]
            self._restart()
            self._state = self._arguments
        elif (end := self._end()) is not None:
            whole, self._text = self._text[:end], self._text[end:]
            call = _object(whole) or {}
            name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
            arguments = {} if arguments is None else _object(arguments)
            if isinstance(name, str) and name in self._names and arguments is not None:
                yield self._opened(name, json.dumps(arguments, ensure_ascii=False))
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
            self._state = self._closing

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
        whole = self._space + text
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
