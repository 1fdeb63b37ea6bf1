"""Every field of a request: what it takes, what it refuses, and that a refusal names it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_mlx.serve import request_fields
from elm_mlx.serve.request_fields import FieldError, parse_chat, parse_embeddings, parse_text

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "a"}
EMBEDDING: dict[str, Any] = {"model": "m", "input": "a"}
PARSERS = {"chat": (parse_chat, CHAT), "text": (parse_text, TEXT), "embedding": (parse_embeddings, EMBEDDING)}

SCHEMA = {"type": "object", "properties": {}}
SHARED: list[tuple[dict[str, Any], str, Any]] = [  # fields, an attribute of the options, its value
    ({}, "settings", {}),
    ({"temperature": 0}, "settings", {"temp": 0.0}),
    ({"temperature": 1.5, "top_p": 1, "min_p": 0.1}, "settings", {"temp": 1.5, "top_p": 1.0, "min_p": 0.1}),
    ({"top_k": 40}, "settings", {"top_k": 40}),
    ({"top_k": 40.0}, "settings", {"top_k": 40}),
    ({"top_k": -1}, "settings", {"top_k": 0}),
    ({"repetition_penalty": 1.1}, "settings", {"repetition_penalty": 1.1}),
    ({"presence_penalty": -2, "frequency_penalty": 2}, "settings", {"presence_penalty": -2, "frequency_penalty": 2}),
    ({"temperature": None, "seed": None, "stop": None, "frobnicate": None}, "settings", {}),
    ({"stream": True}, "stream", True),
    ({"stream": True, "stream_options": {"include_usage": True}}, "include_usage", True),
    ({"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}}, "include_usage", False),
    ({"n": 3}, "answers", 3),
    ({"max_tokens": 7}, "max_tokens", 7),
    ({}, "max_tokens", None),
    ({"stop": "\n"}, "stop", ("\n",)),
    ({"stop": ["a", "b"]}, "stop", ("a", "b")),
    ({"stop": []}, "stop", ()),
    ({"seed": -1}, "seed", -1),
    ({"seed": (1 << 64) - 1}, "seed", (1 << 64) - 1),
    ({"logit_bias": {"7": -100, "0": 1.5}}, "logit_bias", {7: -100.0, 0: 1.5}),
    (dict.fromkeys(request_fields.IGNORED, "x"), "settings", {}),
    ({"best_of": 1, "suffix": "", "modalities": ["text"], "verbosity": "medium"}, "settings", {}),
    ({"max_tokens": -1}, "max_tokens", 1 << 31),
]

REFUSED: list[tuple[dict[str, Any], str]] = [  # fields, and the name that the refusal must say
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": 3}, "model"),
    ({"frobnicate": 1}, "frobnicate"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": "1"}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"n_predict": 5}, "n_predict"),
    ({"verbosity": "low"}, "verbosity"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"max_tokens": 1e30}, "max_tokens"),
    ({"stop": 3}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a" * 1001]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 1 << 64}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"1": "a"}}, "logit_bias.1"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"response_format": "json"}, "response_format.type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
        "response_format.json_schema.schema",
    ),
    ({"response_format": {"type": "json_object"}, "stop": "a"}, "stop"),
    *(
        ({name: value}, name)
        for name, values in dict[str, tuple[Any, ...]](
            {
                "temperature": (-0.1, "1", True, float("nan"), float("inf"), [], 1 << 20_000),
                "top_p": (0, 1.1, "a"),
                "top_k": (-2, 0.5, "a", 1 << 40),
                "min_p": (-0.1, 1.1, {}),
                "repetition_penalty": (0, -1, "a"),
                "presence_penalty": (-2.1, 2.1, "a"),
                "frequency_penalty": (-2.1, 2.1, False),
            }
        ).items()
        for value in values
    ),
]


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize(("fields", "attribute", "value"), SHARED)
def test_a_field_is_taken(kind: str, fields: dict[str, Any], attribute: str, value: Any) -> None:
    parse, least = PARSERS[kind]
    assert getattr(parse({**least, **fields}).options, attribute) == value  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_a_refusal_names_the_field(kind: str, fields: dict[str, Any], param: str) -> None:
    parse, least = PARSERS[kind]
    with pytest.raises(FieldError) as refused:
        parse({**least, **fields})
    assert refused.value.param == param and str(refused.value).startswith(f"{param}: ")
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("chat", {"messages": None}, "messages"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": "hi"}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": "a"}] * 2001}, "messages"),
        ("chat", {"messages": ["hi"]}, "messages[0]"),
        ("chat", {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ("chat", {"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
        ("chat", {"messages": [{"content": "a"}]}, "messages[0].role"),
        ("chat", {"messages": [CHAT["messages"][0], {"role": "user"}]}, "messages[1].content"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ("chat", {"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ("chat", {"messages": [{"role": "user", "content": "a", "name": 3}]}, "messages[0].name"),
        ("chat", {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls[0]"),
        ("chat", {"messages": [{"role": "assistant", "function_call": {}}]}, "messages[0].function_call"),
        ("chat", {"messages": [{"role": "user", "content": "a", "tool_call_id": "b"}]}, "messages[0].tool_call_id"),
        ("chat", {"chat_template_kwargs": []}, "chat_template_kwargs"),
        ("chat", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ("chat", {"chat_template_kwargs": {"eos_token": "a"}}, "chat_template_kwargs.eos_token"),
        ("chat", {"chat_template_kwargs": {"reasoning_effort": "a"}, "reasoning_effort": "b"}, "reasoning_effort"),
        ("chat", {"reasoning_effort": 3}, "reasoning_effort"),
        ("text", {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"logprobs": 1}, "logprobs"),
        ("chat", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat", {"functions": []}, "functions"),
        ("chat", {"prompt": "a"}, "prompt"),
        ("chat", {"tools": 3}, "tools"),
        ("chat", {"tool_choice": "required"}, "tool_choice"),
        ("text", {"prompt": None}, "prompt"),
        ("text", {"prompt": ""}, "prompt"),
        ("text", {"prompt": []}, "prompt"),
        ("text", {"prompt": 3}, "prompt"),
        ("text", {"prompt": [[]]}, "prompt"),
        ("text", {"prompt": [[1, "a"]]}, "prompt"),
        ("text", {"prompt": [1, [2]]}, "prompt"),
        ("text", {"prompt": [True]}, "prompt"),
        ("text", {"prompt": ["a"] * 257}, "prompt"),
        ("text", {"prompt": ["a"] * 100, "n": 3}, "n"),
        ("text", {"echo": "yes"}, "echo"),
        ("text", {"logprobs": True}, "logprobs"),
        ("text", {"logprobs": 21}, "logprobs"),
        ("text", {"max_completion_tokens": 3}, "max_completion_tokens"),
        ("text", {"messages": []}, "messages"),
        ("embedding", {"input": None}, "input"),
        ("embedding", {"input": [""]}, "input"),
        ("embedding", {"encoding_format": "int8"}, "encoding_format"),
        ("embedding", {"encoding_format": []}, "encoding_format"),
        ("embedding", {"dimensions": 3}, "dimensions"),
        ("embedding", {"temperature": 1}, "temperature"),
        ("embedding", {"model": None}, "model"),
    ],
)
def test_a_refusal_of_one_kind_names_the_field(kind: str, fields: dict[str, Any], param: str) -> None:
    parse, least = PARSERS[kind]
    with pytest.raises(FieldError) as refused:
        parse({**least, **fields})
    assert refused.value.param == param


def test_messages_are_as_templates_take_them() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    fields = parse_chat({
        "model": "m",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning_content": "hm"},
            {"role": "tool", "content": "3", "tool_call_id": "c"},
            {"role": "assistant", "id": 7, "timestamp": 1.5},
        ],
    })  # fmt: skip
    system, user, called, result, silent = fields.messages
    assert system == {"role": "system", "content": "be brief"} and user == {"role": "user", "content": "ab"}
    assert called["content"] == "" and called["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert called["reasoning_content"] == "hm"
    assert result == {"role": "tool", "content": "3", "tool_call_id": "c"}
    assert silent == {"role": "assistant", "content": "", "id": 7, "timestamp": 1.5}  # what a template may read
    assert fields.tools_field == "messages[2]"


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1, 2], [3]], ["a", [3]]])
def test_a_prompt_is_text_or_ids_one_or_several(prompt: Any) -> None:
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    wanted = prompt if several else [prompt]
    assert parse_text({**TEXT, "prompt": prompt}).prompts == wanted
    assert parse_embeddings({**EMBEDDING, "input": prompt}).inputs == wanted


def test_log_probabilities() -> None:
    assert parse_chat(CHAT).likeliest is None and parse_text(TEXT).likeliest is None
    assert parse_chat({**CHAT, "logprobs": True}).likeliest == 0
    assert parse_chat({**CHAT, "logprobs": True, "top_logprobs": 20}).likeliest == 20
    assert parse_chat({**CHAT, "logprobs": False, "top_logprobs": 0}).likeliest is None
    assert parse_text({**TEXT, "logprobs": 0}).likeliest == 0
    echoed = parse_text({**TEXT, "logprobs": 1, "echo": True, "max_tokens": 0})
    assert echoed.echo and echoed.options.max_tokens == 0


def test_a_length_has_two_names_and_one_value() -> None:
    assert parse_chat({**CHAT, "max_tokens": 3, "max_completion_tokens": 3}).options.max_tokens == 3
    with pytest.raises(FieldError, match="give one of them") as refused:
        parse_chat({**CHAT, "max_tokens": 3, "max_completion_tokens": 5})
    assert refused.value.param == "max_tokens"


def test_a_response_format_is_a_schema() -> None:
    assert parse_chat({**CHAT, "response_format": {"type": "text"}}).schema is None
    assert parse_text({**TEXT, "response_format": {"type": "json_object"}}).schema == {"type": "object"}
    named = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
    assert parse_chat({**CHAT, "response_format": named}).schema == SCHEMA


def test_embeddings_come_as_numbers_or_base64() -> None:
    assert not parse_embeddings(EMBEDDING).base64
    assert parse_embeddings({**EMBEDDING, "encoding_format": "base64", "user": "u"}).base64


NAMES = [
    *request_fields._SETTINGS, *request_fields.IGNORED, *request_fields._NEUTRAL, "model", "messages", "prompt",
    "input", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "stop", "seed", "logit_bias",
    "logprobs", "top_logprobs", "echo", "response_format", "tools", "tool_choice", "parallel_tool_calls",
    "encoding_format", "role", "content", "type", "function", "name", "text", "schema", "json_schema",
    "include_usage", "parameters", "arguments",
]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "assistant", "text", "function"])
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner),
    max_leaves=12,
)  # fmt: skip


@given(st.sampled_from([*PARSERS]), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES, max_size=6))
def test_no_body_raises_anything_else(kind: str, fields: dict[str, Any]) -> None:
    parse, least = PARSERS[kind]
    for body in (fields, {**least, **fields}):
        try:
            parse(body)
        except FieldError as error:
            assert str(error)


@given(VALUES)
def test_nor_does_a_body_that_is_no_object(value: Any) -> None:
    for parse, _ in PARSERS.values():
        with contextlib.suppress(FieldError):
            parse(value)
