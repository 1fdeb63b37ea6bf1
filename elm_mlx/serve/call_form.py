"""The text by which a model calls functions, as its chat template shows it when it renders a call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from elm_mlx.errors import InputError
from elm_mlx.text.chat_template import JinjaTemplate, Part, Template
from elm_mlx.text.jinja import LimitError


@dataclass(frozen=True)
class CallForm:
    """The text by which a model calls functions: `begin lead head NAME middle ARGUMENTS tail (between …)* trail`.

    Attributes:
        begin: the mark that calls begin with; empty where an answer that begins with `{` is one.
        between: between one call's `tail` and the next one's `head`; None where an answer has one call.
        head: empty where the name stands by itself, and not in the JSON of the call.
        middle: may have `CALL_ID` in it.
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

    @property
    def end(self) -> str:
        """The mark that calls end with; empty where there is none."""
        return self.trail.strip().lstrip("]").lstrip()


CALL_ID = "\uf8ff"  # in a form: the place of a call's id, of nine letters and digits
_FIRST_CONTROL = 0xE000
_TAGGED = CallForm("<tool_call>", "\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n")
_LISTED = CallForm("<tool_call>", "[", "]</tool_call>", ", ")
_PROBE, _SECOND, _ID = "elm_probe", "elm_prone", "elmprobe9"
_ARGUMENTS = re.compile(rf'(",\s*"(?:arguments|parameters)":\s*)\{{"k":\s*"v"\}}(?:,\s*"id":\s*"{_ID}")?\s*\}}')
_ANY_ARGUMENTS, _CONTROLS = r'\{"k":\s*"v"\}', r"\ue000-\uf000"
_BEGIN = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\])(\s*\[?\s*)$")
_TRAIL = re.compile(r"\s*\]?\s*(?:</[^<>\s]+>|\[/[A-Z_]+\])|\s*\]")


def call_form(template: Template | None) -> CallForm | None:
    """Returns the form in which a template writes calls; None where it takes no functions, or its form is not known."""
    if not isinstance(template, JinjaTemplate):
        return None
    try:
        rendered = _rendered_calls(template, (_PROBE,)) if template.takes_tools else None
        if rendered is not None and any(isinstance(part, str) and _PROBE in part for part in rendered[0]):
            return _rendered_form(template, *rendered) or _named_form(template, *rendered)
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
    begin, lead, characters = "", "", dict[int, str]()
    if len(controls) > asked:
        begin, lead = chr(_FIRST_CONTROL), before
        characters[controls[-1]] = begin
    elif mark := _BEGIN.search(before):
        begin, lead = mark.groups()
    trail = _TRAIL.match(after)
    between = None
    two = _rendered_calls(template, (_PROBE, _SECOND))
    if two is not None and (first := _around(two[0], _PROBE)) and (second := _around(two[0], _SECOND)):
        text, after_first, before_second = two[0][first[0]], first[4], second[1]
        if isinstance(text, str) and first[0] == second[0]:
            between = text[len(text) - len(after_first) : len(before_second)]
    return CallForm(begin, lead, trail[0] if trail else "", between, head, middle, controls=characters)


def _named_form(template: JinjaTemplate, parts: Sequence[Part], asked: int) -> CallForm | None:
    """Returns the form of a call whose name stands between control tokens, as Mistral's since 2025; None for others."""
    names: dict[int, str] = {}
    text = _joined(parts, names)
    found = re.search(rf"([{_CONTROLS}]){_PROBE}([{_CONTROLS}]+(?:{_ID}[{_CONTROLS}]+)?){_ANY_ARGUMENTS}", text)
    if found is None or len(re.findall(f"[{_CONTROLS}]", text[: found.start(1)])) < asked:
        return None
    between = None
    if (two := _rendered_calls(template, (_PROBE, _SECOND))) is not None:
        again = re.search(rf"{_ANY_ARGUMENTS}([{_CONTROLS}]){_SECOND}", _joined(two[0], names))
        between = again[1] if again is not None else None
    middle = found[2].replace(_ID, CALL_ID)
    used = [name for name in dict.fromkeys(found[1] + middle + (between or "")) if name != CALL_ID]
    ordered = str.maketrans({name: chr(_FIRST_CONTROL + i) for i, name in enumerate(used)})
    return CallForm(
        found[1].translate(ordered), "", "", between and between.translate(ordered), "", middle.translate(ordered), "",
        {token: name.translate(ordered) for token, name in names.items() if name in used},
    )  # fmt: skip


def _joined(parts: Sequence[Part], names: dict[int, str]) -> str:
    """Returns parts as one text, a character for each control token, which is added to `names` where it is new."""
    return "".join(
        part if isinstance(part, str) else names.setdefault(part, chr(_FIRST_CONTROL + len(names))) for part in parts
    )


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
