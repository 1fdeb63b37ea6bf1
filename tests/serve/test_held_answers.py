"""Structured output and tool calls over HTTP, by OpenAI's own client: what is promised of an answer holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import other_models
import pytest
from jsonschema import Draft202012Validator
from openai import OpenAI
from serving import Served, serving
from test_tool_calls import LINES, NEITHER, TAGGED, TIME, WEATHER, XML

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", "é"]}, "maxItems": 2},
        "next": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 99}]},
    },
    "required": ["name", "next"],
    "additionalProperties": False,
}
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 120, "temperature": 1, "seed": 3}


def json_schema(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "made", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("held")
    templates = {"caller": TAGGED, "talker": NEITHER, "by tags": XML, "in Python": LINES}
    for name, template in templates.items():
        other_models.write_model(root / name, "mistral", {"max_position_embeddings": 4096})
        (root / name / "chat_template.jinja").write_text(template)
    with serving([root / name for name in templates]) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def streamed(client: OpenAI, **asked: Any) -> tuple[str, dict[int, dict[str, Any]], str]:
    """Returns the content, the calls by index, and the reason of a stream's end."""
    content, calls, reason = "", dict[int, dict[str, Any]](), ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert call.type == "function" and call.index == len(calls)
                calls[call.index] = {"name": call.function.name, "arguments": ""}
            calls[call.index]["arguments"] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, calls, reason


@pytest.mark.parametrize("model", ["caller", "talker"])
def test_every_answer_satisfies_its_schema_or_was_cut(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, **ASKED, n=6, response_format=json_schema(SCHEMA))
    reasons = [choice.finish_reason for choice in answer.choices]
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            Draft202012Validator(SCHEMA).validate(json.loads(choice.message.content))
    assert {*reasons} <= {"stop", "length"} and "stop" in reasons
    first = answer.choices[0]
    content, _, reason = streamed(client, model=model, **ASKED, response_format=json_schema(SCHEMA))
    assert (content, reason) == (first.message.content, first.finish_reason)


def test_any_object_and_a_text_that_is_continued(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="talker", **ASKED | {"max_tokens": 9}, response_format={"type": "json_object"}
    )
    assert whole.choices[0].message.content.startswith("{")
    extra = {"response_format": json_schema({"enum": ["yes", "no"]})}
    text = client.completions.create(model="talker", prompt="Is it? ", temperature=1, seed=1, extra_body=extra)
    assert json.loads(text.choices[0].text) in ("yes", "no") and text.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": json_schema({"not": {}})}, "response_format", '"not"'),
        ({"response_format": json_schema({"pattern": "(a{1000}){1000}"})}, "response_format", "counting"),
        ({"response_format": json_schema(SCHEMA), "stop": ["\n"]}, "stop", "response_format"),
        ({"response_format": json_schema({"not": {}}), "tools": [TIME]}, "response_format", '"not"'),
        (
            {"response_format": json_schema(SCHEMA), "tools": [TIME], "tool_choice": "required", "stop": ["\n"]},
            "stop", "response_format",
        ),
        ({"tools": [TIME, {"type": "function", "function": {"name": "a b"}}]}, "tools[1].function.name", "letters"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [TIME], "model": "talker"}, "tools", "takes no tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
             "tool_choice": "required"},
            "tools", '"not"',
        ),
        ({"model": "talker", "messages": [{"role": "tool", "content": "3", "tool_call_id": "a"}]}, "messages[0]", "no"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_by_its_field(
    client: OpenAI, fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        client.chat.completions.create(**{"model": "caller", **ASKED, **fields})
    assert refused.value.param == param


@pytest.mark.parametrize("model", ["caller", "by tags", "in Python"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_required_call_comes_and_its_result_goes_back(client: OpenAI, model: str, choice: Any) -> None:
    asked = {"model": model, **ASKED, "tools": [WEATHER, TIME], "tool_choice": choice, "max_tokens": 300}
    asked["parallel_tool_calls"] = False  # a random model makes calls without end
    for seed in range(3, 30):
        answer = client.chat.completions.create(**asked | {"seed": seed}).choices[0]
        if answer.finish_reason == "tool_calls":
            break
        assert answer.finish_reason == "length"
    else:
        pytest.fail("no call was whole")
    message = answer.message
    assert message.content is None
    for call in message.tool_calls:
        schema = WEATHER["function"]["parameters"] if call.function.name == "get_weather" else {"const": {}}
        Draft202012Validator(schema).validate(json.loads(call.function.arguments))
    content, calls, reason = streamed(client, **asked | {"seed": seed})
    assert content == "" and reason == "tool_calls"
    assert [*calls.values()] == [each.function.model_dump() for each in message.tool_calls]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    following = [*ASKED["messages"], message.model_dump(exclude_none=True), *results]
    again = client.chat.completions.create(**asked | {"messages": following, "tool_choice": "auto", "max_tokens": 5})
    assert again.usage.prompt_tokens > answer_tokens(client, asked)


def answer_tokens(client: OpenAI, asked: dict[str, Any]) -> int:
    usage = client.chat.completions.create(**asked | {"max_tokens": 1}).usage
    assert usage is not None
    return usage.prompt_tokens


@pytest.mark.parametrize(
    ("bias", "choice", "reason"),
    [(-100, "auto", "stop"), (100, "auto", "tool_calls"), (-100, "required", "tool_calls")],
)
def test_an_answer_is_the_json_that_is_wanted_unless_it_is_a_call(
    client: OpenAI, served: Served, bias: int, choice: Any, reason: str
) -> None:
    tokenizer = served.engine._batches["caller"].tokenizer
    begins = [token for token in range(tokenizer.vocab_size) if tokenizer.bytes_of(token).startswith(b"<")]
    asked = {"model": "caller", **ASKED, "tools": [WEATHER, TIME], "response_format": json_schema(SCHEMA), "n": 4}
    asked |= {"parallel_tool_calls": False, "logit_bias": dict.fromkeys(map(str, begins), bias), "tool_choice": choice}
    choices = client.chat.completions.create(**asked).choices
    for each in choices:
        if each.finish_reason == "stop":
            Draft202012Validator(SCHEMA).validate(json.loads(each.message.content))
        elif each.finish_reason == "tool_calls":
            assert each.message.content is None and len(each.message.tool_calls) == 1
    assert {reason} <= {each.finish_reason for each in choices} <= {reason, "length"}


def test_tools_that_may_not_be_called_are_not_shown(client: OpenAI) -> None:
    asked = {"model": "caller", **ASKED, "max_tokens": 3}
    plain = client.chat.completions.create(**asked)
    silent = client.chat.completions.create(**asked | {"tools": [TIME], "tool_choice": "none"})
    shown = client.chat.completions.create(**asked | {"tools": [TIME]})
    assert silent.usage and plain.usage and shown.usage
    assert silent.usage.prompt_tokens == plain.usage.prompt_tokens < shown.usage.prompt_tokens
    assert silent.choices[0].message.content == plain.choices[0].message.content


def test_models_say_whether_they_take_tools(served: Served) -> None:
    assert [model["tools"] for model in served.get("/v1/models").json()["data"]] == [True, False, True, True]
