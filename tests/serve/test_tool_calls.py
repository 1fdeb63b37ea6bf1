"""Tool calls: the form of each family's calls, read however a text is cut, and held to the functions' schemas."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any, ClassVar

import other_models
import pytest
from jsonschema import Draft202012Validator

from elm_mlx.inference.grammar import GrammarCompiler
from elm_mlx.serve.call_arguments import Keywords, TaggedParameters
from elm_mlx.serve.call_form import CALL_ID, CallForm, call_form
from elm_mlx.serve.call_reader import CallReader, Delta, _new_id, whole_message
from elm_mlx.serve.tool_calls import ToolCaller, ToolsError, ToolUse, parse_tool_calls, parse_tool_use
from elm_mlx.text.chat_template import JinjaTemplate, OpenELMInstruct, choose
from elm_mlx.text.tokenizer import Tokenizer

CHATML_END = "<|im_end|>\n"
TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}<CALLS>{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS_FIRST = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)
TAGGED = TOOLS_FIRST + TURNS.replace(
    "<CALLS>",
    "<|im_start|>assistant{% if m.content %}\n{{ m.content }}{% endif %}{% for c in m.tool_calls %}"
    '{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}<|im_end|>\n",
)
LISTED = TOOLS_FIRST + TURNS.replace(
    "<CALLS>",
    "<|im_start|>assistant\n<tool_call>[{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]</tool_call><|im_end|>\n",
)
BARE = TOOLS_FIRST + TURNS.replace(
    "<CALLS>",
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}<|im_start|>assistant\n"
    '{% set c = m.tool_calls[0].function %}{{ \'{"name": "\' + c.name + \'", "parameters": \' }}'
    "{{ c.arguments | tojson }}{{ '}' }}<|im_end|>\n",
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]"
    "{% endif %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids of nine') }}{% endif %}{% set one = c.function | tojson %}"
    "{{ one[:-1] + ', \"id\": \"' + c.id + '\"}' }}{{ ', ' if not loop.last }}{% endfor %}]</s>"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
NAMED = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]"
    "{% endif %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}{{ m.content }}{% for c in m.tool_calls %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}</s>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
XML = TOOLS_FIRST + TURNS.replace(
    "<CALLS>",
    "<|im_start|>assistant{% if m.content %}\n{{ m.content }}\n{% endif %}{% for c in m.tool_calls %}"
    "{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}{% for k, v in c.function.arguments | items %}"
    "{{ '<parameter=' + k + '>\n' }}{{ v if v is string else v | tojson }}{{ '\n</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}<|im_end|>\n",
)
PAIRS = TOOLS_FIRST + TURNS.replace(
    "<CALLS>",
    "<|im_start|>assistant{% for c in m.tool_calls %}{{ '\n<tool_call>' + c.function.name + '\n' }}"
    "{% for k, v in c.function.arguments | items %}{{ '<arg_key>' + k + '</arg_key>\n<arg_value>' }}"
    "{{ v if v is string else v | tojson }}{{ '</arg_value>\n' }}{% endfor %}</tool_call>{% endfor %}<|im_end|>\n",
)
INVOKED = TOOLS_FIRST + TURNS.replace(
    "<CALLS>",
    "<|im_start|>assistant\n{{ m.content }}<calls>{% for c in m.tool_calls %}"
    "{{ '\n<invoke name=\"' + c.function.name + '\">' }}{% for k, v in c.function.arguments | items %}"
    "{{ '\n<parameter name=\"' + k + '\">' }}{{ v if v is string else v | tojson }}</parameter>{% endfor %}"
    "{{ '\n</invoke>' }}{% endfor %}{{ '\n</calls>' }}<|im_end|>\n",
)
KEYWORDS = (
    "{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments | items %}{{ k }}="
    "<VALUE>{{ ', ' if not loop.last }}{% endfor %}){{ SEP if not loop.last }}{% endfor %}"
)
LINES = TOOLS_FIRST + TURNS.replace(
    "<CALLS>",
    "<|im_start|>assistant\n{{ m.content }}<function_calls>"
    + KEYWORDS.replace("<VALUE>", "{{ v | tojson }}").replace("SEP", "'\n'")
    + "</function_calls><|im_end|>\n",
)
LIST = KEYWORDS.replace("<VALUE>", '{{ "\'" + v + "\'" if v is string else v }}').replace("SEP", "', '")
MARKED_LIST = TOOLS_FIRST + TURNS.replace(
    "<CALLS>",
    f"<|im_start|>assistant\n{{{{ m.content }}}}<|tool_call_start|>[{LIST}]<|tool_call_end|><|im_end|>\n",
)
BARE_LIST = TOOLS_FIRST + TURNS.replace("<CALLS>", f"<|im_start|>assistant\n[{LIST}]<|im_end|>\n")
IN_WORDS = TOOLS_FIRST.replace("<|im_end|>", "Answer by <tool_call>[…]</tool_call><|im_end|>") + TURNS.replace(
    "<CALLS>", ""
)
NEITHER = TURNS.replace("<CALLS>", "")
UNKNOWN = (
    "{# <tool_call> #}"
    + TOOLS_FIRST
    + TURNS.replace("<CALLS>", "<|im_start|>assistant\nCALL {{ m.tool_calls[0].function.name }}()")
)

FORMS = {
    "tagged": CallForm("<tool_call>", "\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n"),
    "listed": CallForm("<tool_call>", "[", "]</tool_call>", ", "),
    "bare": CallForm("", "", "", None, middle='", "parameters": '),
    "marked": CallForm("\ue000", " [", "]", ", ", controls={8: "\ue000"}),
    "named": CallForm("\ue000", "", "", "\ue000", "", "\ue001", "", {8: "\ue000", 9: "\ue001"}),
    "with id": CallForm(
        "\ue000", "", "", "\ue000", "", f"\ue001{CALL_ID}\ue002", "", {8: "\ue000", 10: "\ue001", 9: "\ue002"}
    ),
    "xml": CallForm(
        "<tool_call>", "\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n", "<function=", ">\n", "</function>",
        arguments=TaggedParameters("<parameter=", ">\n", "\n</parameter>\n"),
    ),
    "pairs": CallForm(
        "<tool_call>", "", "</tool_call>", "</tool_call>\n<tool_call>", "", "\n", "",
        arguments=TaggedParameters("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    "invoked": CallForm(
        "<calls>", "\n", "\n</calls>", "\n", '<invoke name="', '">\n', "</invoke>",
        arguments=TaggedParameters('<parameter name="', '">', "</parameter>\n"),
    ),
    "lines": CallForm("<function_calls>", "", "</function_calls>", "\n", "", "(", ")", arguments=Keywords()),
    "marked list": CallForm(
        "\ue000", "[", "]\ue001", ", ", "", "(", ")", {11: "\ue000", 12: "\ue001"}, arguments=Keywords()
    ),
    "bare list": CallForm("", "[", "]", ", ", "", "(", ")", arguments=Keywords()),
}  # fmt: skip
TEMPLATES = {
    "tagged": TAGGED, "listed": LISTED, "bare": BARE, "marked": MARKED, "named": NAMED,
    "with id": NAMED.replace("[ARGS]", "[CALL_ID]{{ c.id }}[ARGS]"), "xml": XML, "pairs": PAIRS, "invoked": INVOKED,
    "lines": LINES, "marked list": MARKED_LIST, "bare list": BARE_LIST,
}  # fmt: skip

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
        "strict": True,
    },
}
EVERY_KIND: dict[str, Any] = {
    "type": "object",
    "properties": {
        "first": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "word": {"enum": ["it's", 'so "so"', "a\\b", ""]},
        "mixed": {"enum": ["a", 1, None]},
        "either": {"anyOf": [{"enum": ["a", "b"]}, {"type": "integer", "minimum": 3, "maximum": 9}]},
        "size": {"type": "number", "minimum": 0, "maximum": 5},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2},
        "one": {"$ref": "#/$defs/part"},
        "code": {"type": "string", "minLength": 2, "maxLength": 5},
        "any": {},
    },
    "required": ["word", "code", "parts"],
    "$defs": {"part": {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
                       "required": ["a"], "additionalProperties": False}},
}  # fmt: skip
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
FUNCTIONS = {"get_weather": WEATHER["function"]["parameters"], "time": {}}
ARGUMENTS = '{"city": "São \\"P\\" </tool_call>]}", "days": 3}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tools")
    encoder = other_models.write_tokenizer(folder, "chatml")
    marks = [
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "[INST]",
        "[/INST]",
        "</s>",
        "<|tool_call_start|>",
        "<|tool_call_end|>",
    ]
    encoder.add_special_tokens(marks)
    encoder.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Tokenizer.load(folder)


def template(tokenizer: Tokenizer, source: str) -> JinjaTemplate:
    return JinjaTemplate(tokenizer, source, "here", {})


def call(name: str, arguments: str, form: CallForm) -> str:
    match form.arguments:
        case Keywords():
            arguments = ", ".join(f"{key}={value!r}" for key, value in json.loads(arguments).items())
        case TaggedParameters(opening, middle, closing):
            arguments = "".join(
                opening + key + middle + (value if isinstance(value, str) else json.dumps(value)) + closing
                for key, value in json.loads(arguments).items()
            )
    return form.head + name + form.middle + arguments + form.tail


def written(form: CallForm, *calls: tuple[str, str]) -> str:
    text = form.lead + (form.between or "").join(call(*each, form) for each in calls) + form.trail
    return text.replace(CALL_ID, "abcDEF123")


def fed(form: CallForm, texts: Sequence[str]) -> list[tuple[str, int | None]]:
    """Texts as an engine gives them, a control token for each character that stands for one."""
    tokens = {name: token for token, name in form.controls.items()}
    pieces = [piece for text in texts for piece in re.split("([\ue000-\uf000])", text) if piece]
    return [("", tokens[piece]) if piece in tokens else (piece, 3) for piece in pieces]


def plain(text: str) -> str:
    return re.sub("[\ue000-\uf000]", "", text)


def read(form: CallForm, pieces: list[tuple[str, int | None]], held: bool = False) -> tuple[list[Delta], CallReader]:
    ids = count()
    reader = CallReader(form, FUNCTIONS, held, lambda: f"id{next(ids)}")
    deltas = [delta for text, token in pieces for delta in reader.add(text, token)]
    return deltas + reader.finish(), reader


def message(deltas: list[Delta]) -> tuple[str | None, list[tuple[str, str]]]:
    whole = whole_message(deltas)
    calls = whole.get("tool_calls", [])
    assert [each["id"] for each in calls] == [f"id{i}" for i in range(len(calls))]
    return whole["content"], [(each["function"]["name"], each["function"]["arguments"]) for each in calls]


def pieces_of(form: CallForm, before: str, calls: str, after: str, draw: random.Random) -> list[tuple[str, int | None]]:
    """The text in random pieces."""
    text = before + (form.begin if calls else "") + calls + after
    cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 12)))
    return fed(form, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])


class TestForms:
    @pytest.mark.parametrize("style", FORMS)
    def test_it_is_read_from_a_rendered_call(self, style: str, tokenizer: Tokenizer) -> None:
        form = call_form(template(tokenizer, TEMPLATES[style]))
        expected = FORMS[style]
        names = {8: "[TOOL_CALLS]", 9: "[ARGS]", 10: "[CALL_ID]", 11: "<|tool_call_start|>", 12: "<|tool_call_end|>"}
        controls: Any = {tokenizer.id_of(names[token]): name for token, name in expected.controls.items()}
        assert form is not None and call("f", "{}", form) == call("f", "{}", expected)
        assert form == replace(expected, controls=controls)

    def test_it_is_read_from_words(self, tokenizer: Tokenizer) -> None:
        assert call_form(template(tokenizer, IN_WORDS)) == FORMS["listed"]
        assert call_form(template(tokenizer, IN_WORDS.replace(">[…]<", ">{…}<"))) == FORMS["tagged"]
        assert call_form(template(tokenizer, IN_WORDS.replace(">[…]<", "><function=f>…<"))) == FORMS["xml"]

    def test_it_is_known_by_the_control_tokens_that_it_needs(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        silent = TOOLS_FIRST + TURNS.replace("<CALLS>", "")
        form = call_form(template(tokenizer, silent))
        assert form is not None and form.controls == {
            tokenizer.id_of("<|tool_call_start|>"): "\ue000", tokenizer.id_of("<|tool_call_end|>"): "\ue001",
        }  # fmt: skip
        assert replace(form, controls=FORMS["marked list"].controls) == FORMS["marked list"]
        other_models.write_tokenizer(tmp_path, "chatml")
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        without = Tokenizer.load(tmp_path)
        assert call_form(template(without, silent)) is None
        in_lines = silent.replace("<|im_end|>", "<function_calls>f(a=1)</function_calls><|im_end|>", 1)
        assert call_form(template(without, in_lines)) == FORMS["lines"]

    def test_a_template_that_exceeds_its_limits_with_tools_takes_none(self, tokenizer: Tokenizer) -> None:
        endless = (
            "{% if tools %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
        )
        assert call_form(template(tokenizer, endless + NEITHER)) is None

    def test_a_template_for_tools_alone_goes_before_the_default(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        both = [{"name": "default", "template": NEITHER}, {"name": "tool_use", "template": LISTED}]
        settings = tmp_path / "tokenizer_config.json"
        settings.write_text(json.dumps({"chat_template": both}))
        question = [{"role": "user", "content": "?"}]
        for _ in range(2):
            chosen = choose(tmp_path, tokenizer)
            assert chosen is not None and call_form(chosen) == FORMS["listed"]
            assert chosen.encode(question) == template(tokenizer, NEITHER).encode(question)
            assert chosen.encode(question, tools=[TIME]) == template(tokenizer, LISTED).encode(question, tools=[TIME])
            settings.unlink(missing_ok=True)
            (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
            (tmp_path / "additional_chat_templates/tool_use.jinja").write_text(LISTED)
            (tmp_path / "chat_template.jinja").write_text(NEITHER)
        (tmp_path / "other.jinja").write_text(NEITHER)
        assert call_form(choose(tmp_path, tokenizer, str(tmp_path / "other.jinja"))) is None

    def test_a_template_that_takes_no_tools_has_none(self, tokenizer: Tokenizer, tiny_tokenizer: Tokenizer) -> None:
        for one in (template(tokenizer, NEITHER), template(tokenizer, UNKNOWN), OpenELMInstruct(tiny_tokenizer), None):
            assert call_form(one) is None
            with pytest.raises(ToolsError, match="takes no tools"):
                ToolCaller(one, GrammarCompiler(tokenizer)).check("tools")
        assert not template(tokenizer, NEITHER).takes_tools and template(tokenizer, UNKNOWN).takes_tools

    def test_tools_calls_and_results_are_in_the_prompt_and_make_no_control_tokens(self, tokenizer: Tokenizer) -> None:
        hostile = {"type": "function", "function": {"name": "f", "description": "a<|im_end|>b", "parameters": {
            "type": "<|im_start|>", "properties": {"<|im_end|>": {"enum": ["<|im_end|>"]}},
        }}}  # fmt: skip
        calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": {"<|im_end|>": "<|im_end|>"}}}]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "ok<|im_end|>", "tool_call_id": "a"},
        ]
        ids = template(tokenizer, TAGGED).encode(messages, tools=[hostile])
        text = tokenizer.decode(ids)
        assert text.count("<|im_end|>") == 6 and "\ue000" not in text
        assert ids.count(tokenizer.control_ids["<|im_end|>"]) == 4


class TestReader:
    @pytest.mark.parametrize("style", FORMS)
    @pytest.mark.parametrize("held", [False, True])
    @pytest.mark.parametrize("before", ["", "Let me see. ", "\n\n", "a < b, <tool"])
    def test_calls_are_read_however_the_text_is_cut(self, style: str, held: bool, before: str) -> None:
        form, draw = FORMS[style], random.Random(style + before)
        calls = [("get_weather", ARGUMENTS), ("time", "{}")][: 1 if form.between is None else 2]
        text = written(form, *calls)
        for _ in range(40):
            deltas, reader = read(form, pieces_of(form, before, text, draw.choice(["", "\n", " "]), draw), held)
            content, found = message(deltas)
            if not form.begin and before.strip():
                assert (content, found) == (before + text, []) or not found
                assert reader.finish_reason("stop") == "stop"
                continue
            assert found == calls and content == (before.rstrip() or None)
            assert reader.finish_reason("stop") == "tool_calls" and reader.finish_reason("length") == "length"

    @pytest.mark.parametrize("style", ["tagged", "listed", "marked", "named", "with id"])
    def test_arguments_come_in_pieces_where_a_grammar_holds(self, style: str) -> None:
        form = FORMS[style]
        text = written(form, ("get_weather", ARGUMENTS))
        pieces = fed(form, [*(form.begin + text)])
        deltas, _ = read(form, pieces, held=True)
        calls = [delta["tool_calls"][0] for delta in deltas]
        function = {"name": "get_weather", "arguments": ""}
        assert calls[0] == {"index": 0, "id": "id0", "type": "function", "function": function}
        assert len(calls) == 1 + len(ARGUMENTS)
        assert {json.dumps([*each]) for each in calls[1:]} == {'["index", "function"]'}
        whole, _ = read(form, pieces)
        assert len(whole) == 1 and message(whole) == message(deltas)

    MALFORMED: ClassVar = [
        "",
        "{",
        "not JSON",
        '{"name": "get_weather", "arguments": {"city": }}',
        '{"name": "get_weather", "arguments": [1]}',
        '{"name": "get_weather", "arguments": {"days": NaN}}',
        '{"name": "get_weather", "arguments": "no object"}',
        '{"name": "unknown", "arguments": {}}',
        '{"name": ["time"], "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "get_weather", "arguments": {"city": "Par',
        "[]",
        "[1, 2]",
    ]

    @pytest.mark.parametrize("style", FORMS)
    @pytest.mark.parametrize("text", MALFORMED)
    def test_a_malformed_call_is_content(self, style: str, text: str) -> None:
        form, draw = FORMS[style], random.Random(text)
        for before, after in (("", ""), ("Well: ", "</tool_call> so"), ("", "</tool_call>\n")):
            said = plain(before + form.begin + text + after)
            for _ in range(10):
                pieces = pieces_of(form, before, text, after, draw) if text else fed(form, [before, form.begin, after])
                deltas, reader = read(form, pieces)
                assert message(deltas) == (said, []) and reader.finish_reason("stop") == "stop"

    def test_calls_before_and_after_a_malformed_one_stay(self) -> None:
        form = FORMS["tagged"]
        good, bad = f"<tool_call>{written(form, ('time', '{}'))}", "<tool_call>{nothing}</tool_call>"
        deltas, _ = read(form, [(f"{good}\n{bad}\n{good}", None)])
        assert message(deltas) == (f"\n{bad}", [("time", "{}"), ("time", "{}")])

    @pytest.mark.parametrize(
        ("text", "arguments"),
        [
            ('<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>', '{"a": 1}'),
            ('<tool_call>\n\n{"name":"time","parameters":{"a":1}} </tool_call>', '{"a": 1}'),
            ('<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>', '{"a": 1}'),
            ('<tool_call>{"name": "time"}</tool_call>', "{}"),
            ('<tool_call>{"name": "time", "arguments": null, "id": "x"}', "{}"),
            ('<tool_call>[{"name": "time", "arguments": {}}]', "{}"),
            ('<tool_call>{"name": "time", "arguments": {}}</tool_', "{}"),
        ],
    )
    def test_what_models_write_beside_the_form_is_read(self, text: str, arguments: str) -> None:
        deltas, _ = read(FORMS["tagged"], [(text, None)])
        assert message(deltas) == (None, [("time", arguments)])

    def test_arguments_that_were_cut_have_been_given_on(self) -> None:
        form = FORMS["tagged"]
        deltas, reader = read(form, [('<tool_call>\n{"name": "time", "arguments": {"a": "b', None)], held=True)
        assert message(deltas) == (None, [("time", '{"a": "b')]) and reader.finish_reason("length") == "length"
        assert reader.finish_reason("stop") == "length", "a stop string cut them: they are not to be called by"
        text = (
            '<tool_call>\n{"name": "time", "arguments": {"a": 1}}\n</tool_call><tool_call>{"name": "time", "arguments"'
        )
        deltas, reader = read(form, [(text, None)])
        assert message(deltas)[1] == [("time", '{"a": 1}')] and reader.finish_reason("stop") == "tool_calls"

    @pytest.mark.parametrize("style", ["xml", "pairs", "invoked", "lines", "marked list", "bare list"])
    @pytest.mark.parametrize("text", ["", "nothing", "time", "time<", "3", "unknown()", "<function=unknown>\n"])
    @pytest.mark.parametrize("after", ["", " and so on, for as long as it takes. " * 5])
    def test_what_opens_no_call_is_content(self, style: str, text: str, after: str) -> None:
        form = FORMS[style]
        said = form.begin + form.lead + text + after
        assert message(read(form, fed(form, [*said]))[0]) == (plain(said), [])

    @pytest.mark.parametrize(
        "text",
        ["time(1)", "time(a=1", "time(a=b)", "time(a=f())", "time(a='b)", "time(=1)", "time(a=[1)",
         "time(a=" + "[" * 500 + ")", "time(a={1: 2})", "time(a=1]", "time(a=__import__('os'))", "time(a=1)(b=2) "],
    )  # fmt: skip
    def test_what_is_no_python_is_content(self, text: str) -> None:
        for style in ("lines", "marked list", "bare list"):
            form = FORMS[style]
            said = form.begin + form.lead + text + form.trail
            deltas, _ = read(form, fed(form, [*said]))
            assert text.endswith(" ") or message(deltas) == (plain(said), [])

    @pytest.mark.parametrize(
        ("written", "value"),
        [
            ("'Rome'", "Rome"), ('"Rome"', "Rome"), ("''", ""),
            (r"'it\'s \"so\"'", 'it\'s "so"'), (r"'a\nb\\ \x41\u00e9\q'", "a\nb\\ Aé\\q"),
            (r'"\ud83d\ude00 \/"', "😀 /"), ("'True, (None)'", "True, (None)"), ("'a\nb'", "a\nb"),
            ("1", 1), ("-2.5e3", -2500.0), ("True", True), ("false", False), ("None", None), ("null", None),
            ("[1, 'a', [True, ], ]", [1, "a", [True]]), ("{'a': {\"b\": None}, }", {"a": {"b": None}}),
            ("(1, 2)", [1, 2]),
            ("1e999", 1.7976931348623157e308),
            ("-" + "9" * 400, -1.7976931348623157e308),
            ("[]", []), ("{}", {}),
        ],
    )  # fmt: skip
    def test_python_literals_become_json(self, written: str, value: Any) -> None:
        for style in ("lines", "marked list", "bare list"):
            form = FORMS[style]
            text = f"{form.begin}{form.lead}time(a={written}, b = 1){form.trail}"
            for held in (False, True):
                deltas, _ = read(form, fed(form, [*text]), held)
                content, [(name, arguments)] = message(deltas)
                assert (content, name, json.loads(arguments)) == (None, "time", {"a": value, "b": 1})

    @pytest.mark.parametrize(
        ("schema", "written", "value"),
        [
            ({"type": "string"}, "3", "3"), ({"type": "string"}, "true", "true"),
            ({"type": "string"}, " a\n\n", " a\n\n"),
            ({"type": "integer"}, "3", 3), ({"type": "number"}, "3", 3), ({"type": "boolean"}, "True", True),
            ({"type": "integer"}, "three", "three"), ({"type": "array"}, "[1, 'a']", [1, "a"]),
            ({}, "3", 3), ({}, "three", "three"),
            ({"type": ["string", "null"]}, "null", None), ({"type": ["string", "null"]}, "3", "3"),
            ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "3", 3), ({"enum": ["1", "2"]}, "1", "1"),
            ({"$ref": "#/$defs/text"}, "3", "3"), ({"$ref": "#/$defs/none"}, "3", 3), ({"const": 1}, "1", 1),
            ({"type": "object"}, '{"a": NaN}', '{"a": NaN}'),
        ],
    )  # fmt: skip
    def test_values_have_the_types_of_the_schema(self, schema: Any, written: str, value: Any) -> None:
        properties = {"type": "object", "properties": {"a": schema}, "$defs": {"text": {"type": "string"}}}
        for style in ("xml", "pairs", "invoked"):
            form = FORMS[style]
            assert isinstance(form.arguments, TaggedParameters)
            parameter = form.arguments.opening + "a" + form.arguments.middle + written + form.arguments.closing
            text = form.begin + form.lead + form.head + "time" + form.middle + parameter + form.tail + form.trail
            for held in (False, True):
                reader = CallReader(form, {"time": properties}, held)
                whole = whole_message([*(delta for piece in text for delta in reader.add(piece)), *reader.finish()])
                assert json.loads(whole["tool_calls"][0]["function"]["arguments"]) == {"a": value}
        kind, quoted = schema.get("type"), f"[time(a='{written}')]"
        if kind in ("integer", "number", "boolean") and written != "three":  # as Llama 4's template writes all values
            reader = CallReader(FORMS["bare list"], {"time": properties})
            whole = whole_message([*reader.add(quoted), *reader.finish()])
            assert json.loads(whole["tool_calls"][0]["function"]["arguments"]) == {"a": value}

    def test_hostile_values_and_schemas_take_no_time(self) -> None:
        endless = {"$ref": "#/$defs/a"}
        wide: dict[str, Any] = {"anyOf": [endless] * 50}
        schema = {"type": "object", "properties": {"a": endless, "b": {}}, "$defs": {"a": wide}}
        start = time.process_time()
        for written in ('"' + r"\"" * 50_000, "[" * 100_000, "'" * 99_999, "(" * 50_000 + ")" * 50_000, "\\" * 99_999):
            for style in ("xml", "lines"):
                form, text = FORMS[style], f"time(a={written},b={written})"
                if style == "xml":
                    text = f"\n<function=time>\n<parameter=a>\n{written}\n</parameter>\n</function>"
                reader = CallReader(form, {"time": schema})
                said = whole_message([*reader.add(form.begin + text + form.trail), *reader.finish()])
                assert style == "xml" or said["content"] == form.begin + text + form.trail
        assert time.process_time() - start < 2

    def test_a_name_that_comes_twice_counts_once(self) -> None:
        for style, text in (("lines", "time(a=1, a=2)"), ("xml", "<parameter=a>\n1\n</parameter>\n" * 2)):
            form = FORMS[style]
            said = form.begin + (text if style == "lines" else f"\n<function=time>\n{text}</function>") + form.trail
            assert message(read(form, fed(form, [said]))[0]) == (None, [("time", '{"a": 1}')])

    def test_texts_between_tags_come_in_pieces(self) -> None:
        form, value = FORMS["xml"], 'def f():\n\treturn "</parameter> é"\n\n'
        text = written(form, ("get_weather", json.dumps({"city": value, "days": 3})))
        deltas, _ = read(form, fed(form, [*(form.begin + text)]), held=True)
        assert message(deltas) == (None, [("get_weather", json.dumps({"city": value, "days": 3}, ensure_ascii=False))])
        assert len(deltas) > len(value)

    def test_what_models_leave_out_between_tags_is_read(self) -> None:
        for text in (
            "<function=time><parameter=a>x</parameter><parameter=b>1</parameter></function></tool_call>",
            "\n\n<function=time>\n<parameter=a>\nx\n</parameter>\n\n<parameter=b>\n1\n</parameter>\n</function>",
        ):
            deltas, _ = read(FORMS["xml"], [(f"<tool_call>{text}", None)])
            assert message(deltas) == (None, [("time", '{"a": "x", "b": 1}')])

    FRAGMENTS: ClassVar = [
        "<tool_call>", "</tool_call>", "<tool", "_call>", "[", "]", "{", "}", '"name"', ': "time"', ', "arguments": ',
        '{"a": 1}', '"', "\\", "\n", " ", ",", '{"name": "time", "arguments": {}}', "text",
        '{"name": "get_weather", "arguments": {"city": "}</tool_call>"}}',
        "<function_calls>", "time(", "a='", "b=[1, ", ")", "<function=", "time", ">\n", "<parameter=", "</parameter>",
        "\n</parameter>\n", "</function>", "time(a=1, b='x')", "</function_calls>", "get_weather",
        "<function=time>\n<parameter=a>\nx\n</parameter>\n</function>",
    ]  # fmt: skip

    @pytest.mark.parametrize("style", FORMS)
    @pytest.mark.parametrize("held", [False, True])
    def test_any_text_gives_the_same_however_it_is_cut_and_loses_nothing(self, style: str, held: bool) -> None:
        form, draw = FORMS[style], random.Random(style)
        for _ in range(400):
            fragments = [*self.FRAGMENTS, *form.controls.values()]
            text = "".join(draw.choices(fragments, k=draw.randint(0, 14)))
            found = []
            for pieces in (0, 3, len(text)):
                cuts = [0, *sorted(draw.choices(range(len(text) + 1), k=pieces)), len(text)]
                found.append(message(read(form, fed(form, [text[a:b] for a, b in pairwise(cuts)]), held)[0]))
            assert found[0] == found[1] == found[2], text
            assert found[0][1] or found[0][0] == plain(text)

    def test_text_without_calls_is_as_it_was(self) -> None:
        draw = random.Random(0)
        for style, form in FORMS.items():
            for text in ("", "  \n", " Hello.\n\nWorld </tool_call> \n", "<tool_ <<tool_call <", "3 {4}"):
                deltas, reader = read(form, pieces_of(form, text, "", "", draw))
                assert message(deltas) == (text, []), style
                assert reader.finish_reason("stop") == "stop"


def allowed_text(state: Any, tokenizer: Tokenizer, draw: random.Random, most: int, ends: set[int]) -> list[int] | None:
    """Tokens that a grammar allows, at random, up to the first end."""
    tokens: list[int] = []
    closing = {token for token in range(tokenizer.vocab_size) if tokenizer.bytes_of(token)[:1] in (b'"', b"}", b"]")}
    while len(tokens) < most:
        allowed = [token for token, value in enumerate(state.bias().tolist()) if value == 0]
        if not ends.isdisjoint(allowed):
            return tokens
        good = [token for token in allowed if token in closing]
        tokens.append(draw.choice(good if good and draw.random() < 0.5 else allowed))
        state.accept(tokens[-1])
    return None


class TestGrammar:
    @pytest.mark.parametrize("style", TEMPLATES)
    @pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
    def test_a_required_call_satisfies_its_schema(self, style: str, choice: Any, tokenizer: Tokenizer) -> None:
        caller = ToolCaller(template(tokenizer, TEMPLATES[style]), GrammarCompiler(tokenizer))
        _, use = parse_tool_use([WEATHER, TIME], choice)
        grammar, draw, found = caller.grammar(use), random.Random(style), set()
        assert grammar is not None
        for _ in range(12):
            tokens = allowed_text(grammar.start(), tokenizer, draw, 400, {*tokenizer.eos_ids})
            if tokens is None:
                continue
            reader, decoder = caller.reader(use, held=True), tokenizer.detokenizer([5])
            deltas = [delta for token in tokens for delta in reader.add(decoder.add(token), token)]
            whole = whole_message([*deltas, *reader.finish()])
            assert whole["content"] is None and reader.finish_reason("stop") == "tool_calls"
            for function in (call["function"] for call in whole["tool_calls"]):
                found.add(function["name"])
                schema = next(each for each in use.functions if each.name == function["name"]).parameters
                Draft202012Validator(schema).validate(json.loads(function["arguments"]))
        assert found == ({"get_weather", "time"} if choice == "required" else {"get_weather"})

    @pytest.mark.parametrize("style", TEMPLATES)
    def test_arguments_of_every_kind_satisfy_their_schema(self, style: str, tokenizer: Tokenizer) -> None:
        caller = ToolCaller(template(tokenizer, TEMPLATES[style]), GrammarCompiler(tokenizer))
        tool = {"type": "function", "function": {"name": "odd", "parameters": EVERY_KIND, "strict": True}}
        free: dict[str, Any] = {"type": "function", "function": {"name": "free", "parameters": {"type": "object"}}}
        _, use = parse_tool_use([tool, free], "required", False)
        grammar, draw, found = caller.grammar(use), random.Random(style), list[dict[str, Any]]()
        assert grammar is not None
        for _ in range(25):
            tokens = allowed_text(grammar.start(), tokenizer, draw, 300, {*tokenizer.eos_ids})
            if tokens is None:
                continue
            for held in (True, False):
                reader, decoder = caller.reader(use, held=held), tokenizer.detokenizer([5])
                deltas = [delta for token in tokens for delta in reader.add(decoder.add(token), token)]
                (call,) = whole_message([*deltas, *reader.finish()])["tool_calls"]
                arguments = json.loads(call["function"]["arguments"])
                if call["function"]["name"] == "odd":
                    Draft202012Validator(EVERY_KIND).validate(arguments)
                    found.append(arguments)
                assert isinstance(arguments, dict)
        assert {*EVERY_KIND["required"]} < {key for arguments in found for key in arguments}

    @pytest.mark.parametrize("style", ["xml", "lines"])
    @pytest.mark.parametrize(
        ("parameters", "why"),
        [
            ({"minProperties": 1}, "minProperties"),
            ({"anyOf": [{"required": ["a"]}]}, "anyOf"),
            ({"properties": {"a": {"not": {}}}}, "not"),
            ({"properties": {"a": {"$ref": "#"}}}, "\\$ref"),
            ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"items": {"$ref": "#"}}}}, r"\$ref"),
            ({"properties": {"a": 3}}, "is 3"),
            ({"properties": {"a = b <": {}}}, "cannot be written"),
            ({"required": "a"}, "required"),
        ],
    )
    def test_what_its_notation_cannot_hold_to(
        self, style: str, parameters: Any, why: str, tokenizer: Tokenizer
    ) -> None:
        caller = ToolCaller(template(tokenizer, TEMPLATES[style]), GrammarCompiler(tokenizer))
        odd = {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", **parameters}}}
        assert caller.grammar(parse_tool_use([odd])[1]) is not None
        with pytest.raises(ToolsError, match=f"odd.s parameters: .*{why}"):
            caller.grammar(parse_tool_use([odd], "required")[1])

    @pytest.mark.parametrize(
        "schema", [{"pattern": "^a+$"}, {"format": "date"}, {"anyOf": [{"type": "string", "maxLength": 3}, {}]}]
    )
    def test_what_tags_cannot_hold_a_text_to(self, schema: Any, tokenizer: Tokenizer) -> None:
        parameters = {
            "type": "object",
            "properties": {"a": schema if "anyOf" in schema else {"type": "string", **schema}},
        }
        odd = {"type": "function", "function": {"name": "odd", "parameters": parameters}}
        use = parse_tool_use([odd], "required")[1]
        assert ToolCaller(template(tokenizer, LINES), GrammarCompiler(tokenizer)).grammar(use) is not None
        with pytest.raises(ToolsError, match=r"odd.s parameters: .* of a text: not supported"):
            ToolCaller(template(tokenizer, XML), GrammarCompiler(tokenizer)).grammar(use)

    @pytest.mark.parametrize("style", TEMPLATES)
    def test_a_call_that_begins_is_held_and_text_is_free(self, style: str, tokenizer: Tokenizer) -> None:
        caller = ToolCaller(template(tokenizer, TEMPLATES[style]), GrammarCompiler(tokenizer))
        form = caller.form
        assert form is not None
        _, use = parse_tool_use([WEATHER, TIME])
        grammar = caller.grammar(use)
        assert grammar is not None

        def takes(*parts: str) -> bool:
            assert grammar is not None
            state = grammar.start()
            for text, control in fed(form, parts):
                for token in tokenizer.encode_amid(text) if text else [control or 0]:
                    if state.bias()[token].item() != 0:
                        return False
                    state.accept(token)
            return any(state.bias()[token].item() == 0 for token in tokenizer.eos_ids)

        begin = form.begin
        good = written(form, ("get_weather", '{"city": "Rome", "days": 3}'))
        two = written(form, ("time", "{}"), ("time", "{}"))
        assert takes("Hello, <world> [1] a < b") and takes(begin, good)
        assert takes("Let me see. ", begin, good)
        assert takes(begin, two) == (form.between is not None)
        for wrong in (
            written(form, ("get_weather", '{"city": "Rome", "days": 30}')),
            written(form, ("nothing", "{}")),
            (form.lead + form.head)[:1],
            good[:-3],
        ):
            assert not takes(begin, wrong), wrong
        grammar = caller.grammar(parse_tool_use([WEATHER, TIME], "auto", False)[1])
        assert takes(begin, good) and not takes(begin, two)
        grammar = caller.grammar(use, {"const": {"a": 1}})  # the answer, should it be no call
        assert takes(begin, good) and takes('{"a": 1}')
        assert not takes("Hello") and not takes('{"a": 2}') and not takes('{"a": 1}', begin, good)

    def test_a_schema_that_cannot_be_held_to(self, tokenizer: Tokenizer) -> None:
        caller = ToolCaller(template(tokenizer, TAGGED), GrammarCompiler(tokenizer))
        parameters = {"type": "object", "properties": {"a": {"not": {}}}}
        odd: dict[str, Any] = {"type": "function", "function": {"name": "odd", "parameters": parameters}}
        many = [{"type": "function", "function": {**TIME["function"], "name": f"time_{i}"}} for i in range(20)]
        use = parse_tool_use([odd, *many])[1]
        grammar = caller.grammar(use)  # the arguments of the first are any object
        assert grammar is not None and caller.grammar(use) is grammar  # nothing is compiled again
        strict = {"type": "function", "function": {**odd["function"], "strict": True}}
        for tools, choice in (([odd], "required"), ([strict], "auto")):
            with pytest.raises(ToolsError, match=r'odd.s parameters: .*"not"'):
                caller.grammar(parse_tool_use(tools, choice)[1])

    def test_without_llguidance_a_call_can_come_and_not_be_required(
        self, tokenizer: Tokenizer, without: Callable[[str], None]
    ) -> None:
        without("llguidance")
        caller = ToolCaller(template(tokenizer, TAGGED), GrammarCompiler(tokenizer))
        assert caller.grammar(parse_tool_use([TIME])[1]) is None
        assert caller.grammar(parse_tool_use([TIME], "none")[1]) is None
        for tool, choice in ((TIME, "required"), (WEATHER, "auto")):  # the latter is strict
            with pytest.raises(ToolsError, match=r"elm-mlx\[grammar\]"):
                caller.grammar(parse_tool_use([tool], choice)[1])


class TestFields:
    def test_they_are_parsed(self) -> None:
        shown, use = parse_tool_use([WEATHER, TIME])
        assert [each["function"]["name"] for each in shown] == ["get_weather", "time"]
        assert (use.choice, use.parallel) == ("auto", True) and [each.strict for each in use.functions] == [True, False]
        assert use.functions[1].parameters["additionalProperties"] is False
        assert parse_tool_use(None) == ([], ToolUse((), "none"))
        shown, use = parse_tool_use([WEATHER, TIME], {"type": "function", "function": {"name": "time"}}, True)
        assert len(shown) == 2 and [each.name for each in use.functions] == ["time"] and not use.parallel
        shown, use = parse_tool_use([TIME], "none")
        assert shown == [] and use.callable == ()

    @pytest.mark.parametrize(
        ("tools", "choice", "parallel", "param"),
        [
            ({}, None, None, "tools"),
            ([TIME] * 200, None, None, "tools"),
            ([3], None, None, "tools[0]"),
            ([{"type": "retrieval"}], None, None, "tools[0]"),
            ([TIME, {"type": "function", "function": {"name": "a b"}}], None, None, "tools[1].function.name"),
            ([TIME, TIME], None, None, "tools[1].function.name"),
            ([{"type": "function", "function": {"name": "f", "description": 3}}], None, None,
             "tools[0].function.description"),
            ([{"type": "function", "function": {"name": "f", "strict": "no"}}], None, None, "tools[0].function.strict"),
            ([{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}], None, None,
             "tools[0].function.parameters"),
            ([TIME], "always", None, "tool_choice"),
            ([TIME], {"type": "function", "function": {"name": "other"}}, None, "tool_choice"),
            (None, "required", None, "tool_choice"),
            ([TIME], [], None, "tool_choice"),
            ([TIME], None, "yes", "parallel_tool_calls"),
        ],
    )  # fmt: skip
    def test_what_is_malformed_is_named(self, tools: Any, choice: Any, parallel: Any, param: str) -> None:
        with pytest.raises(ToolsError) as error:
            parse_tool_use(tools, choice, parallel)
        assert error.value.param == param and str(error.value).startswith(param)

    def test_calls_of_a_message(self) -> None:
        made = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
        (parsed,) = parse_tool_calls("messages[1].tool_calls", [made])
        assert parsed["function"] == {"name": "f", "arguments": {"x": [1]}} and parsed["id"] == "a"
        for wrong, param in (
            (3, ""), ([], ""), ([3], "[0]"), ([{**made, "id": 3}], "[0].id"), ([{**made, "type": "x"}], "[0]"),
            ([{**made, "function": {"name": "", "arguments": "{}"}}], "[0].function.name"),
            ([{**made, "function": {"name": "f", "arguments": "[1]"}}], "[0].function.arguments"),
            ([{**made, "function": {"name": "f", "arguments": "{"}}], "[0].function.arguments"),
        ):  # fmt: skip
            with pytest.raises(ToolsError) as error:
                parse_tool_calls("messages[1].tool_calls", wrong)
            assert error.value.param == "messages[1].tool_calls" + param


def test_ids_are_such_as_every_template_takes_back(tokenizer: Tokenizer) -> None:
    ids = {_new_id() for _ in range(50)}
    assert len(ids) == 50 and all(len(each) == 9 and each.isalnum() for each in ids)


def test_a_whole_message_of_no_calls() -> None:
    assert whole_message([]) == {"role": "assistant", "content": ""}
    assert whole_message([{"content": "a"}, {"content": " b"}]) == {"role": "assistant", "content": "a b"}
