"""Tool calls: the fields of a request that are about functions, and the grammar that holds an answer to them.

The model is told of functions by its own chat template, and writes calls in a form that the template shows
(`call_form`); `call_reader` reads them. Where llguidance is installed, a grammar holds calls to their functions'
schemas, and then arguments are given on in pieces; else a call is given on when it is whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from elm_mlx.errors import ElmError, InputError
from elm_mlx.inference.grammar import Grammar, GrammarCompiler, schema_text
from elm_mlx.reading import short
from elm_mlx.serve.call_form import CALL_ID, CallForm, call_form
from elm_mlx.serve.call_reader import CallReader, json_object_in
from elm_mlx.text.chat_template import Template

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ANY_OBJECT = {"type": "object"}


class ToolsError(InputError):
    """A field of a request is at fault; `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


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
        arguments = json_object_in(function.get("arguments"))
        if arguments is None:
            raise ToolsError(f"{where}[{i}].function.arguments", "a string is needed that holds a JSON object")
        called = {"name": function["name"], "arguments": arguments}
        parsed.append({"id": call["id"], "type": "function", "function": called})
    return parsed


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

    def grammar(self, use: ToolUse, answer: Mapping[str, Any] | None = None) -> Grammar | None:
        """Returns what holds an answer to `use`; None where nothing needs to, or, of "auto", llguidance is absent.

        May take seconds: not for an event loop.

        Args:
            answer: the schema of the JSON that an answer without calls must be; None for any text.

        Raises:
            ToolsError: a function's schema cannot be held to, and it is strict, or a call is required; or llguidance is
                not installed then.
        """
        if self.form is None or not use.callable:
            return None
        required = use.choice == "required"
        try:
            return self._compiled(self.form, use, answer)
        except ToolsError:
            raise
        except ElmError as error:
            if required or answer is not None or any(function.strict for function in use.functions):
                raise ToolsError("tool_choice" if required else "tools", str(error)) from None
            return None

    def _compiled(self, form: CallForm, use: ToolUse, answer: Mapping[str, Any] | None) -> Grammar:
        schemas = [function.parameters for function in use.functions]
        try:
            return self._compiler.lark(_grammar(form, use, schemas, answer))
        except InputError:  # of which function?
            schemas = [self._schema(form, function, use.choice == "required") for function in use.functions]
            return self._compiler.lark(_grammar(form, use, schemas, answer))

    def _schema(self, form: CallForm, function: Function, required: bool) -> Mapping[str, Any]:
        try:
            self._compiler.check(
                "\n".join(["start: arguments", *form.arguments.rules("arguments", function.parameters)])
            )
        except InputError as error:
            if required or function.strict:
                raise ToolsError("tools", f"{function.name}'s parameters: {error}") from None
            return _ANY_OBJECT
        return function.parameters

    def reader(self, use: ToolUse, held: bool) -> CallReader:
        """Returns what reads an answer; `held` says that a grammar holds it."""
        assert self.form is not None
        return CallReader(self.form, {function.name: function.parameters for function in use.callable}, held)


def _grammar(
    form: CallForm, use: ToolUse, schemas: Sequence[Mapping[str, Any]], answer: Mapping[str, Any] | None
) -> str:
    """Returns the grammar, in llguidance's Lark, of an answer with calls, or of the JSON that `answer` wants."""
    special = {CALL_ID: "ID", **{name: f"<[{token}]>" for token, name in form.controls.items()}}

    def literal(text: str) -> str:
        pieces = re.split(f"([{''.join(special)}])", text)
        return " ".join(special.get(piece) or json.dumps(piece) for piece in pieces if piece)  # Lark quotes as JSON

    # What may follow in one place is one literal each: one that begins another would hide it.
    several = form.between if use.parallel else None
    rules = ["ID: /[a-zA-Z0-9]{9}/"]
    for i, (function, schema) in enumerate(zip(use.functions, schemas, strict=True)):
        opening = form.head + function.name + form.middle
        rules.append(f"first{i}: {literal(form.lead + opening)} rest{i}")
        rules.append(f"next{i}: {literal((several or '') + opening)} rest{i}")
        rules.append(f"rest{i}: arguments{i} {literal(form.tail)}")
        rules += form.arguments.rules(f"arguments{i}", schema)
    first, more = (" | ".join(f"{each}{i}" for i in range(len(schemas))) for each in ("first", "next"))
    rules.append(f"calls: ({first}) {f'({more})*' if several else ''} {literal(form.trail)}")
    rules.append(r"TEXT: /(.|\n)+/")
    begin = literal(form.begin)
    if use.choice == "required":
        rules.append(f"start: {begin} calls")
    elif answer is not None:
        if not form.begin and form.in_object:  # JSON as the answer is: literals would hide what else may follow
            rules = [
                f"call{i}: %json {schema_text(_call_schema(form, function.name, schema))}"
                for i, (function, schema) in enumerate(zip(use.functions, schemas, strict=True))
            ]
            rules.append("calls: " + " | ".join(f"call{i}" for i in range(len(schemas))))
        rules += [f"answer: %json {schema_text(answer)}", f"start: answer | {begin} calls"]
    elif form.begin in form.controls.values():
        rules.append(f"start: TEXT? | TEXT? {begin} calls")
    elif form.begin:
        rules += [rf"begun[lazy]: /(.|\n)*/ {begin}", "start: TEXT? | begun calls"]
    else:
        first = re.escape((form.lead + form.head)[0])
        rules += [rf"OTHER: /\s*[^{first}\s](.|\n)*/", "start: OTHER? | calls"]
    return "\n".join(rules)


def _call_schema(form: CallForm, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of a call that is a JSON object by itself, `schema` that of its arguments."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    arguments = {key: value for key, value in schema.items() if key not in shared}
    if re.search(r'"\$ref": "#(?!/\$defs/|/definitions/)', json.dumps(schema)):  # to what is elsewhere now
        arguments = dict(_ANY_OBJECT)
    key = "parameters" if '"parameters"' in form.middle else "arguments"
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: arguments},
        "required": ["name", key],
        "additionalProperties": False,
        **shared,
    }
