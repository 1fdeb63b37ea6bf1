"""Conversations in the words of OpenAI, ShareGPT and ChatGPT's export: the same messages, or a reason by place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import records as read

from elm_mlx.data import records
from elm_mlx.data.bad_record import BadRecord
from elm_mlx.data.records import Conversation, Preference

ASKED, SAID = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Fine."}
FUNCTION = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}
TOOLS = ({"type": "function", "function": FUNCTION},)
CALLING = {
    "role": "assistant", "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
}  # fmt: skip
RESULT = {"role": "tool", "content": "23 °C"}


def made(value: Any) -> Conversation:
    record, _, _ = records.record_of("here", value)
    assert isinstance(record, Conversation)
    return record


def reason(value: Any) -> str:
    with pytest.raises(BadRecord) as caught:
        records.record_of("here", value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Fine."}],
        [{"from": "human", "value": "Weather?"}, {"from": "gpt", "value": "Fine."}],
        [{"from": "user", "value": "Weather?"}, {"from": "assistant", "value": "Fine."}],
        [{"from": "Human", "content": "Weather?"}, {"role": " ChatGPT", "value": "Fine."}],
        [{"from": "human", "value": "Weather?", "role": None}, {"from": "bing", "value": "Fine.", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "Wea"}, {"type": "input_text", "text": "ther?"}]},
         {"role": "assistant", "content": [{"type": "output_text", "text": "Fine.", "annotations": []}]}],
    ],
)  # fmt: skip
def test_words_for_roles_and_contents(said: list[dict[str, Any]], tmp_path: Path) -> None:
    for key in ("messages", "conversations"):
        for value in (said, json.dumps(said)):  # as tables have them
            assert made({key: value}).messages == (ASKED, SAID)
    assert made(said).messages == (ASKED, SAID)  # a list alone
    (tmp_path / "a.jsonl").write_text((json.dumps(said) + "\n") * 2)
    (tmp_path / "a.json").write_text(json.dumps([said, said], indent=1))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "conversations"], ["1", json.dumps(said)], ["2", json.dumps(said)]])
    for name in ("a.jsonl", "a.json", "a.csv"):
        split = read(tmp_path / name)["train"]
        assert split.bad == [] and [each.messages for each in split.records] == [(ASKED, SAID)] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize("tools", [[FUNCTION], [{"type": "function", "function": FUNCTION}], json.dumps([FUNCTION])])
def test_calls_of_functions(arguments: Any, tools: Any) -> None:
    call = {"name": "weather", "arguments": arguments}
    ways: list[list[dict[str, Any]]] = [
        [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
         {"role": "tool", "content": "23 °C"}],
        [{"role": "assistant", "tool_calls": [call]}, {"role": "function", "content": "23 °C"}],
        [{"role": "assistant", "content": "", "function_call": call}, {"role": "ipython", "content": "23 °C"}],
        [{"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "23 °C"}],
        [{"from": "tool_call", "value": json.dumps([call])}, {"from": "tool_response", "value": "23 °C"}],
    ]  # fmt: skip
    for key, way in ((key, way) for way in ways for key in ("messages", "conversations")):
        record = made({key: [ASKED, *way, SAID], "tools": tools})
        assert record.messages == (ASKED, CALLING, RESULT, SAID) and record.tools == TOOLS
    assert made({"prompt": "Weather?", "completion": "Fine.", "tools": tools}).tools == TOOLS


def test_ids_of_calls_go_with_them() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": None}}
    answered = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "23 °C"}
    _, calling, result, _ = made(
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}, answered, SAID]}
    ).messages
    assert calling["tool_calls"] == [call | {"function": {"name": "weather", "arguments": {}}}] and result == answered


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
         "message 1, part 2 is `image_url`, and only text is trained on"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "message 1, part 1 has no text"),
        ([ASKED, {"from": "function_call", "value": "weather Rome"}], "message 2: a call is a string, not an object"),
        ([ASKED, {"role": "assistant", "tool_calls": [{"id": "a"}]}], "message 2: a call has no `name`; it has `id`"),
        ([ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "Rome"}]}],
         "message 2: the arguments of `f` are neither an object nor the JSON of one"),
        ([ASKED, SAID | {"reasoning_content": "hm"}], "message 2 has `reasoning_content`, which no template here"),
        ([ASKED, SAID | {"tool_call_id": "a"}], "message 2 has `tool_call_id`, which no template here can show but"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_message_and_part(said: Any, why: str) -> None:
    assert reason({"messages": said}).startswith(why) and reason({"conversations": said}).startswith(why)


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        ("weather", "`tools` is a string, not a list of functions"),
        ([{"type": "function", "function": {"description": "a"}}], "`tools`, function 1: an object with a `name`"),
    ],
)
def test_what_describes_no_function(tools: Any, why: str) -> None:
    assert reason({"messages": [ASKED, SAID], "tools": tools}).startswith(why)
    assert reason({"messages": [ASKED, SAID], "tools": [FUNCTION], "functions": [FUNCTION]}).startswith(
        "has `tools` and"
    )


def test_pairs_of_sharegpt() -> None:
    value = {
        "conversations": [{"from": "human", "value": "Weather?"}], "chosen": {"from": "gpt", "value": "Fine."},
        "rejected": {"from": "gpt", "value": "No."}, "tools": [FUNCTION],
    }  # fmt: skip
    record, format, ignored = records.record_of("here", value, "pairs")
    assert isinstance(record, Preference) and (format, ignored) == ("pairs", [])
    assert (record.prompt, record.chosen, record.rejected, record.tools) == ((ASKED,), "Fine.", "No.", TOOLS)
    answered = record.answered(record.chosen)
    assert isinstance(answered, Conversation) and answered.tools == TOOLS and answered.messages == (ASKED, SAID)


def node(parent: str | None, children: list[str], role: str = "", *parts: Any, **more: Any) -> dict[str, Any]:
    """A node of ChatGPT's tree."""
    content = {"content_type": "text", "parts": list(parts)}
    message = {"author": {"role": role, "name": None}, "content": content, "weight": 1.0, "recipient": "all"} | more
    return {"id": "x", "parent": parent, "children": children, "message": message if role else None}


TREE = {
    "root": node(None, ["system"]),
    "system": node("root", ["context"], "system", "", weight=0.0),
    "context": node("system", ["ask"], "user", "About me", metadata={"is_visually_hidden_from_conversation": True}),
    "ask": node("context", ["old", "think"], "user", "Weather?"),
    "old": node("ask", [], "assistant", "Regenerated since."),
    "think": node("ask", ["new"], "assistant", content={"content_type": "thoughts", "thoughts": []}),
    "new": node("think", ["more"], "assistant", "Fi", "ne."),
    "more": node("new", ["last"], "user", "Thanks."),
    "last": node("more", [], "assistant", "!"),
}
ENDING = ({"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "!"})


def test_chatgpts_export(tmp_path: Path) -> None:
    value = {"title": "Rome", "create_time": 1.5, "mapping": TREE, "current_node": "last", "plugin_ids": None}
    (tmp_path / "conversations.json").write_text(json.dumps([value, value | {"current_node": "old"}]))
    split = read(tmp_path / "conversations.json")["train"]
    assert split.bad == [] and not split.ignored
    current, branch = (record.messages for record in split.records)  # type: ignore[union-attr]
    assert current == (ASKED, SAID, *ENDING) and branch == (ASKED, SAID | {"content": "Regenerated since."})
    assert made({"mapping": TREE}).messages == current  # of older exports: the newest branch
    assert made({"mapping": {**TREE, "root": TREE["root"] | {"parent": "elsewhere"}}}).messages == current


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"mapping": []}, "`mapping` is not an object of objects"),
        ({"mapping": {"a": 1}}, "`mapping` is not an object of objects"),
        ({"current_node": "nowhere"}, "`current_node` is `nowhere`, which is not in `mapping`"),
        ({"mapping": TREE | {"root": TREE["root"] | {"parent": "last"}}}, "`mapping` is no tree"),
        ({"mapping": TREE | {"new": node("ask", [], "assistant", "import", recipient="python")}},
         "message 2: ChatGPT's tool `python` takes part"),
        ({"mapping": TREE | {"ask": node("context", [], "tool", "a", author={"role": "tool", "name": "dalle"})}},
         "message 1: ChatGPT's tool `dalle` takes part"),
        ({"mapping": TREE | {"ask": node("context", [], "user", {"content_type": "image_asset_pointer"}, "What?")}},
         "message 1, part 1 is `image_asset_pointer`, and only text"),
        ({"mapping": TREE | {"ask": node("context", [], "user", content=3)}}, "a message's `content` is a number"),
        ({"current_node": "context"}, "a conversation needs a message"),
    ],
)  # fmt: skip
def test_what_no_export_is(changed: dict[str, Any], why: str) -> None:
    assert reason({"mapping": TREE, "current_node": "last"} | changed).startswith(why)


values = st.recursive(
    st.none() | st.booleans() | st.integers()
    | st.sampled_from(["", "a", "user", "gpt", "function_call", "tool", "text", "[]", '{"name": "f"}']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "tool_calls", "function_call", "function", "name", "type",
                         "arguments", "text", "weight", "messages", "parts", "author", "message", "parent", "id",
                         "content_type", "metadata", "children"]), inner, max_size=4),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=400)
@given(st.sampled_from(["messages", "conversations", "mapping", "tools", "chosen"]), values, values)
def test_any_value_is_a_record_or_one_line_of_error(key: str, value: Any, other: Any) -> None:
    whole = {"messages": [ASKED, SAID], "rejected": other, key: value}
    if key in ("conversations", "mapping"):
        del whole["messages"]
    for format in (None, "pairs"):
        try:
            records.record_of("here", whole | ({"current_node": other} if key == "mapping" else {}), format)
        except BadRecord as error:
            assert "\n" not in str(error)
