"""The text by which a model calls functions, as its chat template shows it when it renders a call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from elm_mlx.errors import InputError
from elm_mlx.serve.call_arguments import JSONObject, Keywords, TaggedParameters
from elm_mlx.text.chat_template import JinjaTemplate, Template
from elm_mlx.text.jinja import LimitError, TemplateInput


@dataclass(frozen=True)
class CallForm:
    """The text by which a model calls functions: `begin lead head NAME middle ARGUMENTS tail (between …)* trail`.

    Attributes:
        begin: the mark that calls begin with; empty where an answer that begins with the first character of `lead` or
            `head` is one.
        between: between one call's `tail` and the next one's `head`; None where an answer has one call.
        head: empty where the name stands by itself, and in no tag and not in the JSON of the call.
        middle: may have `CALL_ID` in it.
        arguments: how they are written.
        controls: control tokens in the form, which have no text: each by a character that stands for it.
    """

    begin: str
    lead: str
    trail: str
    between: str | None
    head: str = '{"name": "'
    middle: str = '", "arguments": '
    tail: str = "}"
    controls: Mapping[int, str] = field(default_factory=dict)
    arguments: JSONObject | Keywords | TaggedParameters = field(default_factory=JSONObject)

    @property
    def end(self) -> str:
        """The mark that calls end with; empty where there is none."""
        return self.trail.strip().lstrip("]").lstrip()

    @property
    def in_object(self) -> bool:
        """Returns whether a call is a JSON object, with its name and its arguments."""
        return self.head.startswith("{")


CALL_ID = "\uf8ff"  # in a form: the place of a call's id, of nine letters and digits
_FIRST_CONTROL, _CONTROL = 0xE000, "[\ue000-\uf000]"
_TAGGED = CallForm("<tool_call>", "\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n")
_LISTED = CallForm("<tool_call>", "[", "]</tool_call>", ", ")
_XML = CallForm(
    "<tool_call>", "\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n", "<function=", ">\n", "</function>",
    arguments=TaggedParameters("<parameter=", ">\n", "\n</parameter>\n"),
)  # fmt: skip
_PYTHON = CallForm("<function_calls>", "", "</function_calls>", "\n", "", "(", ")", arguments=Keywords())
_PYTHON_LIST = CallForm("\ue000", "[", "]\ue001", ", ", "", "(", ")", arguments=Keywords())
_LIST_MARKS = "<|tool_call_start|>", "<|tool_call_end|>"  # LFM2's

_PROBE, _SECOND, _ID = "elm_probe", "elm_prone", "elmprobe9"
_NAMES, _VALUES = ("elm_key", "elm_other"), ("elm_value", "elm_last")
_ARGUMENTS = dict(zip(_NAMES, _VALUES, strict=True))
_CONTROL_BEFORE = re.compile(rf"({_CONTROL})([^\ue000-\uf000]*)$")
_TAG_BEFORE = re.compile(r"(<(?!/)[^<>\s]+>|\[[A-Z_]+\])(\s*\[?\s*)$")
_TRAIL = re.compile(rf"\s*\]?\s*(?:</[^<>\s]+>|<\|[^<>\s]+\|>|\[/[A-Z_]+\]|{_CONTROL})|\s*\]")
_OBJECT = r"\{\s*" + r",\s*".join(rf'"{name}":\s*"{value}"' for name, value in _ARGUMENTS.items()) + r"\s*\}"
_OBJECT_REST = re.compile(rf'(",\s*"(?:arguments|parameters)":\s*){_OBJECT}(?:,\s*"id":\s*"{_ID}")?\s*\}}')
_KEYWORDS = re.compile(
    r"\(" + ",\\s*".join(rf"{name}=(['\"]?){value}['\"]?" for name, value in _ARGUMENTS.items()) + r"\)"
)
_TAGS = re.compile(rf"([^<]*)(<[^<>]*(?:>\s*)?){_NAMES[0]}(.+?){_VALUES[0]}(.+?)\2{_NAMES[1]}\3{_VALUES[1]}", re.DOTALL)


def call_form(template: Template | None) -> CallForm | None:
    """Returns the form in which a template writes calls; None where it takes no functions, or its form is not known."""
    if not isinstance(template, JinjaTemplate):
        return None
    controls: dict[int, str] = {}
    try:
        if not template.takes_tools:
            return None
        one, two = (_rendered_calls(template, names, controls) for names in ((_PROBE,), (_PROBE, _SECOND)))
    except LimitError:
        return None
    if one is not None and _PROBE in one:
        ends = "".join(controls[token] for token in template.stop_ids if token in controls)
        form = _rendered_form(one, two or "", ends)
        return form and _with_controls(form, controls)
    # The model is told in words, or by its training alone, and shown no call.
    source, names = template.tool_source, template.tokenizer.control_ids
    if "<tool_call>" in source:
        return _LISTED if "<tool_call>[" in source else _XML if "<function=" in source else _TAGGED
    if names.keys() >= {*_LIST_MARKS}:
        controls = {names[mark]: chr(_FIRST_CONTROL + i) for i, mark in enumerate(_LIST_MARKS)}
        return replace(_PYTHON_LIST, controls=controls)
    return _PYTHON if "<function_calls>" in source else None


def _rendered_calls(template: JinjaTemplate, names: Sequence[str], controls: dict[int, str]) -> str | None:
    """Returns an answer that calls the functions `names`, and what follows; None where the template does not take it.

    A control token is a character in it, which is added to `controls` where it is new.
    """
    question = {"role": "user", "content": "?"}
    calls = [{"id": _ID, "type": "function", "function": {"name": name, "arguments": _ARGUMENTS}} for name in names]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    schema = {"type": "object", "properties": {"k": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": schema}}
    conversations = TemplateInput([question, answer], False, [tool]), TemplateInput([question], True, [tool])
    try:
        whole, asked = template.parts_of(conversations)
    except InputError:
        return None
    before, text = sum(isinstance(part, int) for part in asked), ""
    for part in whole:
        if isinstance(part, str):
            text += part
            continue
        text += controls.setdefault(part, chr(_FIRST_CONTROL + len(controls)))
        before -= 1
        if before == 0:  # here the answer begins
            text = ""
    return text


def _rendered_form(one: str, two: str, ends: str) -> CallForm | None:
    """Returns the form of the call in `one`, and of both in `two`; None where it is not known.

    Args:
        ends: the characters of control tokens that end an answer.
    """
    before, _, after = one.partition(_PROBE)
    found = (
        _object_call(before, after) or _named_call(before, after) or _keyword_call(after) or _tagged_call(before, after)
    )
    if found is None:
        return None
    form, length = found
    before, rest = before[: len(before) - len(form.head)], after[length:]
    begin = lead = ""
    if mark := _CONTROL_BEFORE.search(before) or _TAG_BEFORE.search(before):
        begin, lead = mark.groups()
    elif isinstance(form.arguments, Keywords) and before.rstrip().endswith("["):
        lead = "["
    elif not form.in_object:
        return None  # nothing would tell a call from a text
    trail = _TRAIL.match(re.sub(f"[{ends}].*", "", rest, flags=re.DOTALL) if ends else rest)
    between = None
    if _SECOND in two:
        between = two.partition(_PROBE)[2][length:].partition(_SECOND)[0]
        if not between.endswith(form.head) or any(end in between for end in ends):
            between = None
        else:
            between = between[: len(between) - len(form.head)]
    return replace(form, begin=begin, lead=lead, trail=trail[0] if trail else "", between=between)


def _object_call(before: str, after: str) -> tuple[CallForm, int] | None:
    """Returns the form of a call that is a JSON object, and its length behind the name; None for others."""
    head, found = re.search(r'\{\s*"name":\s*"$', before), _OBJECT_REST.match(after)
    if head is None or found is None:
        return None
    return CallForm("", "", "", None, head[0], found[1]), found.end()


def _named_call(before: str, after: str) -> tuple[CallForm, int] | None:
    """As `_object_call`, of a name between control tokens and a JSON object, as Mistral's since 2025."""
    found = re.match(rf"({_CONTROL}+(?:{_ID}{_CONTROL}+)?){_OBJECT}", after)
    if found is None or not re.search(f"{_CONTROL}$", before):
        return None
    return CallForm("", "", "", None, "", found[1].replace(_ID, CALL_ID), ""), found.end()


def _keyword_call(after: str) -> tuple[CallForm, int] | None:
    """As `_object_call`, of a call in Python."""
    found = _KEYWORDS.match(after)
    return found and (CallForm("", "", "", None, "", "(", ")", arguments=Keywords()), found.end())


def _tagged_call(before: str, after: str) -> tuple[CallForm, int] | None:
    """As `_object_call`, of a call whose arguments stand between tags."""
    found, head = _TAGS.match(after), re.search(r"<[^<>]*$", before)
    if found is None:
        return None
    middle, opening, between, closing = found.groups()
    tag = head and re.match(r"<([\w:.-]+)", head[0])
    tail = f"</{tag[1]}>" if tag else ""
    rest = after[found.end() :]
    if not rest.startswith(closing):  # white space behind the last one may be other than behind the first
        closing = closing.rstrip()
    if not rest.startswith(closing + tail) or not closing.strip():
        return None
    arguments = TaggedParameters(opening, between, closing)
    form = CallForm("", "", "", None, head[0] if head else "", middle, tail, arguments=arguments)
    return form, found.end() + len(closing + tail)


def _with_controls(form: CallForm, controls: Mapping[int, str]) -> CallForm:
    """Returns a form with those control tokens that are in it, in their order."""
    texts = (form.begin, form.lead, form.head, form.middle, form.tail, form.between or "", form.trail)
    used = [name for name in dict.fromkeys("".join(texts)) if name in controls.values()]
    ordered = str.maketrans({name: chr(_FIRST_CONTROL + i) for i, name in enumerate(used)})
    begin, lead, head, middle, tail, between, trail = (text.translate(ordered) for text in texts)
    return replace(
        form, begin=begin, lead=lead, head=head, middle=middle, tail=tail, trail=trail,
        between=None if form.between is None else between,
        controls={token: name.translate(ordered) for token, name in controls.items() if name in used},
    )  # fmt: skip
