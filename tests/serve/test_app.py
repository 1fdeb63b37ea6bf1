"""The endpoints, as the `openai` client and others ask them."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import serving
from openai import OpenAI
from serving import ANSWER, ScriptedEngine, Served

from elm_mlx.errors import ElmError
from elm_mlx.inference.generation import generate, stream_generate
from elm_mlx.inference.requests import Busy, Failed, TooLarge
from elm_mlx.serve import app as app_module
from elm_mlx.serve import completions
from elm_mlx.store.loading import load
from elm_mlx.text.tokenizer import Tokenizer

QUESTION: Any = [{"role": "user", "content": "hello"}]
SAMPLED: Any = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 12}


@pytest.fixture
def client(server: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_what_threads_put_comes_in_order_and_wakes_the_loop_once() -> None:
    async def collected(threads: int, each: int) -> tuple[list[list[int]], int]:
        queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(threads)]
        puts = [completions.putting_into(queue) for queue in queues]
        loop, woken = asyncio.get_running_loop(), 0
        call = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal woken
            woken += 1
            return call(*arguments, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]

        def run(put: Callable[[int], None]) -> None:
            for number in range(each):
                put(number)

        workers = [threading.Thread(target=run, args=(put,)) for put in puts]
        for worker in workers:  # while the loop looks at nothing
            worker.start()
        for worker in workers:
            worker.join()
        once = woken
        found = [[await queue.get() for _ in range(each)] for queue in queues]
        puts[0](7)
        return [*found, [await queues[0].get()]], once

    found, woken = asyncio.run(asyncio.wait_for(collected(5, 200), 30))
    assert found == [*[[*range(200)]] * 5, [7]]
    assert woken <= 5  # threads that find it asleep at the same moment


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> Any:
    return load(tiny_model_dir)


def test_a_conversation(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="talker", messages=QUESTION, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "talker", "chatcmpl-")


def test_a_conversation_as_it_comes(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="talker", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 4
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens > 4
    assert {chunk.id for chunk in (*chunks, last)} == {last.id}
    assert all(chunk.usage is None for chunk in chunks)


def test_the_shape_of_a_stream(server: Served) -> None:
    *chunks, done = server.events("/v1/chat/completions", {"model": "talker", "messages": QUESTION, "temperature": 0})
    assert done == "[DONE]"
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    asked = {"model": "talker", "messages": QUESTION, "stream_options": {"include_usage": True}}
    *chunks, last, _ = server.events("/v1/chat/completions", asked)
    assert all(chunk["usage"] is None for chunk in chunks) and last["usage"]["prompt_tokens"] > 0


def test_texts_are_those_of_generate(client: OpenAI, base: Any) -> None:
    model, tokenizer = base
    prompt = "the quick brown"
    greedy = client.completions.create(model="model", prompt=prompt, temperature=0, max_tokens=12)
    assert greedy.choices[0].text == generate(model, tokenizer, prompt, max_tokens=12)
    sampled = client.completions.create(model="model", prompt=prompt, n=3, **SAMPLED)
    for choice, seed in zip(sampled.choices, (7, 8, 9), strict=True):
        expected = generate(model, tokenizer, prompt, max_tokens=12, temp=0.9, top_p=0.95, seed=seed)
        assert choice.text == expected
    assert [choice.index for choice in sampled.choices] == [0, 1, 2]
    assert greedy.usage is not None and sampled.usage is not None
    assert sampled.usage.prompt_tokens == greedy.usage.prompt_tokens  # of all answers together


def test_several_answers_to_several_prompts_as_they_come(client: OpenAI, base: Any) -> None:
    model, tokenizer = base
    prompts = ["the quick", "an old king"]
    stream = client.completions.create(model="model", prompt=prompts, n=2, stream=True, **SAMPLED)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in stream:
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    expected = [
        generate(model, tokenizer, prompt, max_tokens=12, temp=0.9, top_p=0.95, seed=seed)
        for prompt in prompts
        for seed in (7, 8)
    ]
    assert texts == expected and set(reasons) <= {"length", "stop"}


def test_log_probabilities_of_a_conversation(client: OpenAI) -> None:
    asked: Any = {"model": "talker", "messages": QUESTION, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes or ()) for entry in entries).decode() == ANSWER  # EOS is none of them
    for entry in entries:
        assert [len(entry.top_logprobs), entry.top_logprobs[0].token] == [3, entry.token]
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert sorted(each.logprob for each in entry.top_logprobs)[::-1] == [e.logprob for e in entry.top_logprobs]
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in entries]


@pytest.mark.parametrize("as_ids", [False, True])
def test_log_probabilities_of_a_text_and_its_prompt(client: OpenAI, base: Any, as_ids: bool) -> None:
    model, tokenizer = base
    text = "the old king told naïve stories"
    ids = tokenizer.encode(text)
    asked: Any = {"model": "model", "prompt": ids if as_ids else text, "temperature": 0, "max_tokens": 4}
    whole = client.completions.create(**asked, echo=True, logprobs=2).choices[0]
    alone = client.completions.create(**asked, logprobs=0).choices[0]
    assert whole.text == text + alone.text and whole.logprobs is not None and alone.logprobs is not None
    found = whole.logprobs
    assert found.tokens is not None and found.token_logprobs is not None and found.top_logprobs is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + 4
    assert (found.tokens[0], found.token_logprobs[0], found.top_logprobs[0]) == ("<s>", None, None)
    generated = [r.logprob for r in stream_generate(model, tokenizer, text, max_tokens=4)]
    assert found.token_logprobs[len(ids) :] == pytest.approx(generated, abs=1e-5)
    assert alone.logprobs.token_logprobs == pytest.approx(generated, abs=1e-5) and alone.logprobs.top_logprobs is None
    for token, logprob, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert 2 <= len(top) <= 3 and top[token] == logprob <= max(top.values())
    # Each prompt token as a model finds it that has read what is before it.
    for length in range(1, len(ids)):
        (first, *_) = stream_generate(model, tokenizer, ids[:length], max_tokens=1)
        assert max(found.top_logprobs[length].values()) == pytest.approx(first.logprob, abs=1e-4)
    assert found.text_offset is not None and found.text_offset[len(ids)] == len(text)
    for token, start in zip(found.tokens[1 : len(ids)], found.text_offset[1:], strict=False):
        if not token.startswith("bytes:"):
            assert text[start:].startswith(token if start else token.lstrip())
    pieces = [chunk.choices[0] for chunk in client.completions.create(**asked, echo=True, logprobs=2, stream=True)]
    assert "".join(piece.text for piece in pieces) == whole.text
    streamed = [piece.logprobs.model_dump() for piece in pieces if piece.logprobs is not None]
    for name, values in found.model_dump().items():
        assert [value for each in streamed for value in each[name]] == values, name


def test_a_prompt_alone(client: OpenAI) -> None:
    choice = client.completions.create(model="model", prompt="the king", echo=True, max_tokens=0, logprobs=1).choices[0]
    assert (choice.text, choice.finish_reason) == ("the king", "length")
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])


def test_stop_strings_and_lengths(client: OpenAI) -> None:
    def asked(**options: Any) -> Any:
        return client.chat.completions.create(model="talker", messages=QUESTION, temperature=0, **options).choices[0]

    assert (asked(stop=" and").message.content, asked(stop=["x", " and"]).finish_reason) == ("old kings", "stop")
    for name in ("max_tokens", "max_completion_tokens"):
        assert asked(**{name: 2}).finish_reason == "length"


def test_biases_and_penalties_reach_the_model(client: OpenAI, base: Any) -> None:
    _, tokenizer = base
    (the,) = tokenizer.encode_amid(" the")
    asked: Any = {"model": "model", "prompt": "an old", "temperature": 0, "max_tokens": 6}
    assert client.completions.create(**asked, logit_bias={str(the): 100}).choices[0].text == " the" * 6
    hindered = client.completions.create(**asked, logit_bias={str(the): 100}, frequency_penalty=2, presence_penalty=2)
    assert hindered.choices[0].text == " the" * 6
    extra = {"top_k": 1, "min_p": 0.5, "repetition_penalty": 1.3}
    changed = client.completions.create(**{**asked, "temperature": 1}, extra_body=extra)
    assert changed.choices[0].text == generate(base[0], base[1], "an old", max_tokens=6, repetition_penalty=1.3)


def test_what_was_read_before_is_not_read_again(server: Served) -> None:
    messages = [{"role": "user", "content": "to us " * 60}]
    asked = {"model": "talker", "messages": messages, "temperature": 0}
    status, _, first = server.ask("/v1/chat/completions", asked)
    assert status == 200
    again = [*messages, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "and?"}]
    _, _, second = server.ask("/v1/chat/completions", {**asked, "messages": again})
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < first["usage"]["prompt_tokens"] // 2 < cached < second["usage"]["prompt_tokens"]


def test_messages_in_all_their_forms_are_one(server: Served) -> None:
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]
    for first in ({"role": "system", "content": "be kind"}, {"role": "developer", "content": parts}):
        body = {"model": "talker", "messages": [first, *QUESTION], "temperature": 0}
        status, _, answer = server.ask("/v1/chat/completions", body)
        assert status == 200 and answer["choices"][0]["message"]["content"] == ANSWER


def test_variables_go_to_the_template_that_reads_them(
    tmp_path: Path, server: Served, tiny_tokenizer: Tokenizer
) -> None:
    thinker = serving.make_talker(tmp_path / "thinker", tiny_tokenizer)
    with (thinker / "chat_template.jinja").open("a") as file:
        file.write("{{ 'thinking' if enable_thinking is not defined or enable_thinking }}{{ reasoning_effort }}")
    body = {"model": "thinker", "messages": QUESTION, "max_tokens": 1}
    with serving.serving([thinker]) as thinking:

        def tokens(**fields: Any) -> int:
            status, _, content = thinking.ask("/v1/chat/completions", body | fields)
            assert status == 200, content
            return int(content["usage"]["prompt_tokens"])

        quiet = tokens(chat_template_kwargs={"enable_thinking": False})
        assert quiet < tokens() == tokens(chat_template_kwargs={}) == tokens(chat_template_kwargs=None)
        assert tokens(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="the old king") > quiet
        status, _, content = thinking.ask("/v1/chat/completions", body | {"chat_template_kwargs": {"mood": 1}})
        assert (status, content["error"]["param"]) == (400, "chat_template_kwargs.mood")
    body["model"] = "talker"
    for fields, param in (({"reasoning_effort": "none"}, None), ({"reasoning_effort": "low"}, "reasoning_effort")):
        status, _, content = server.ask("/v1/chat/completions", body | fields)
        assert status == 200 if param is None else content["error"]["param"] == param


def test_models(client: OpenAI, server: Served) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == ["talker", "model"]
    cards = server.ask("/v1/models")[2]["data"]
    assert [(c["kind"], c["base"], c["context_length"], c["tools"]) for c in cards] == [
        ("chat", None, 512, False), ("base", None, 512, False),
    ]  # fmt: skip
    assert client.models.retrieve("talker").model_dump() == listed[0].model_dump()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../model")


def test_embeddings(client: OpenAI, base: Any) -> None:
    _, tokenizer = base
    texts = ["the quick brown fox", "an old king"]
    answer = client.embeddings.create(model="model", input=texts)  # by base64, as the client asks for unless told
    as_numbers = client.embeddings.create(model="model", input=texts, encoding_format="float")
    assert [e.embedding for e in answer.data] == [pytest.approx(e.embedding) for e in as_numbers.data]
    assert len(answer.data[0].embedding) == 64 and answer.data[0].embedding != answer.data[1].embedding
    ids = [tokenizer.encode(text) for text in texts]
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    by_ids = client.embeddings.create(model="model", input=ids)
    assert [e.embedding for e in by_ids.data] == [pytest.approx(e.embedding) for e in answer.data]
    one = client.embeddings.create(model="model", input=texts[0])
    assert [e.embedding for e in one.data] == [pytest.approx(answer.data[0].embedding)]


def test_a_queue_that_fills_up_amid_a_list_of_texts_is_waited_for(
    talker_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crowded(ScriptedEngine):
        def embed(self, model: str, ids: Sequence[int], on_event: Callable[[Any], None]) -> Any:
            crowd.append(len(ids))
            if len(crowd) in (2, 3) or ids[0] == 9:
                raise Busy("2 requests are waiting already", 7)
            return super().embed(model, ids, on_event)

    monkeypatch.setattr(app_module, "PAUSE", 0.01)
    crowd: list[int] = []
    with serving.serving([talker_dir], engine=Crowded()) as server:
        body = {"model": "talker", "input": [[1], [1, 2], [1, 2, 3]], "encoding_format": "float"}
        status, _, answer = server.ask("/v1/embeddings", body)
        assert status == 200 and len(answer["data"]) == 3 and crowd == [1, 2, 2, 2, 3]
        assert server.ask("/v1/embeddings", body | {"input": [[9]]})[0] == 503, "of which nothing has been read"


def test_base64_holds_little_endian_floats(talker_dir: Path) -> None:
    with serving.serving([talker_dir], engine=ScriptedEngine()) as server:
        body = {"model": "talker", "input": [[1, 2]], "encoding_format": "base64"}
        status, _, answer = server.ask("/v1/embeddings", body)
    assert status == 200
    assert struct.unpack("<2f", base64.b64decode(answer["data"][0]["embedding"])) == (0.5, -1.25)


def test_errors_are_those_that_the_client_knows(client: OpenAI, server: Served) -> None:
    def failure(kind: type[openai.APIStatusError], **options: Any) -> Any:
        asked: Any = {"model": "talker", "messages": QUESTION, **options}
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**asked)
        error = caught.value
        assert str(error.request_id).startswith("req_") and error.type == "invalid_request_error"
        assert "\n" not in error.message
        return error

    assert failure(openai.NotFoundError, model="gpt-9").code == "model_not_found"
    assert failure(openai.BadRequestError, messages=[{"role": "user", "content": "us " * 600}]).code == (
        "context_length_exceeded"
    )
    assert failure(openai.BadRequestError, temperature=-1).param == "temperature"
    assert failure(openai.BadRequestError, model="model").param == "model"
    assert "/v1/completions" in failure(openai.BadRequestError, model="model").message
    unknown = failure(openai.BadRequestError, extra_body={"frobnicate": 1})
    assert (unknown.param, unknown.code) == ("frobnicate", "unknown_parameter")
    assert failure(openai.BadRequestError, tools=[{"type": "function", "function": {"name": "f"}}]).param == "tools"
    for path, body, expected in (
        ("/v1/nothing", None, 404), ("/v1/nothing", {}, 404), ("/v1/models", {}, 405), ("/v1/completions", None, 405),
        ("/v1/completions", {"model": "model", "prompt": [[10**6]]}, 400),
    ):  # fmt: skip
        status, headers, content = server.ask(path, body)
        assert (status, headers["content-type"]) == (expected, "application/json")
        assert {*content["error"]} == {"message", "type", "param", "code"}


def test_a_shape_is_held_to(server: Served) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked = {"model": "talker", "messages": QUESTION, "temperature": 0, "response_format": named, "max_tokens": 60}
    (choice,) = server.ask("/v1/chat/completions", asked)[2]["choices"]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"])["ok"], bool)
    asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
    status, _, content = server.ask("/v1/chat/completions", asked)
    assert (status, content["error"]["param"]) == (400, "response_format")


def test_a_busy_engine_says_when_to_come_again(talker_dir: Path) -> None:
    body = {"model": "talker", "messages": QUESTION}
    with serving.serving([talker_dir], engine=ScriptedEngine(Busy("64 requests are waiting already", 7))) as server:
        for stream in (False, True):
            status, headers, content = server.ask("/v1/chat/completions", {**body, "stream": stream})
            assert (status, headers["retry-after"], content["error"]["type"]) == (503, "7", "server_error")
    with serving.serving([talker_dir], engine=ScriptedEngine(TooLarge("too large"))) as server:
        status, headers, content = server.ask("/v1/chat/completions", body)
        assert (status, headers["x-should-retry"], content["error"]["code"]) == (503, "false", "out_of_memory")


def test_a_failure_has_a_status_before_a_stream_begins_and_an_event_in_it(talker_dir: Path) -> None:
    with (
        serving.serving([talker_dir], engine=ScriptedEngine()) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
    ):

        def fail(after: int) -> None:
            submitted = server.engine.wait_for(after + 1)[after]
            if after:
                submitted.read()
                submitted.say("once")
            submitted.listen(Failed(ElmError("out of memory")))

        threading.Thread(target=fail, args=(0,)).start()
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            client.chat.completions.create(model="talker", messages=QUESTION, stream=True)
        threading.Thread(target=fail, args=(1,)).start()
        said: list[str | None] = []
        with pytest.raises(openai.APIError, match="out of memory"):
            stream = client.chat.completions.create(model="talker", messages=QUESTION, stream=True)
            said += (chunk.choices[0].delta.content for chunk in stream)
        assert said == ["", "once"]
        serving.until(lambda: len(server.log) == 2)
        assert all(" POST /v1/chat/completions 500 " in line for line in server.log)  # the second was begun as a 200
        assert 'elm_mlx_http_requests_total{status="500"} 2' in server.ask("/metrics")[2]


def test_a_long_prompt_is_waited_for_with_comments(talker_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "KEEP_ALIVE_SECONDS", 0.1)
    with (
        serving.serving([talker_dir], engine=ScriptedEngine()) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="-") as client,
    ):
        stream = client.chat.completions.create(model="talker", messages=QUESTION, stream=True)  # its headers are there
        (submitted,) = server.engine.submitted
        submitted.read()
        submitted.say("a\u2028b\x85c", "stop")
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a\u2028b\x85c"


def test_a_text_that_is_held_back_is_waited_for_with_comments(
    talker_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "KEEP_ALIVE_SECONDS", 0.1)
    body = {"model": "talker", "messages": QUESTION, "stream": True}
    with serving.serving([talker_dir], engine=ScriptedEngine()) as server:

        def write() -> None:
            (submitted,) = server.engine.wait_for(1)
            submitted.read()
            for _ in range(20):
                submitted.say("")  # as of the tokens of a call that comes whole
                time.sleep(0.03)
            submitted.say("at last", "stop")

        writer = threading.Thread(target=write)
        writer.start()
        lines = server.ask("/v1/chat/completions", body)[2].split("\n\n")
        writer.join()
    assert 2 <= sum(line.startswith(":") for line in lines) < 20 and any("at last" in line for line in lines)


def test_the_log_has_figures_and_no_texts_unless_they_are_wanted(talker_dir: Path) -> None:
    body = {"model": "talker", "messages": [{"role": "user", "content": "a secret"}], "temperature": 0}
    for wanted in (False, True):
        with serving.serving([talker_dir], log_prompts=wanted) as server:
            _, headers, answer = server.ask("/v1/chat/completions", body)
            serving.until(lambda: bool(server.log))
            server.ask("/v1/\x1b[2Jnothing?key=value".replace("\x1b", "%1b"))
            serving.until(lambda: len(server.log) == 2)
        usage = answer["usage"]
        assert server.log[0].startswith(f"{headers['x-request-id']} POST /v1/chat/completions 200 ")
        assert f" {usage['prompt_tokens']} (0 cached) + {usage['completion_tokens']} tokens" in server.log[0]
        assert ("secret" in server.log[0]) == wanted
        assert " GET /v1/\\x1b[2Jnothing 404 " in server.log[1] and "value" not in server.log[1]


def test_health_and_metrics(server: Served) -> None:
    assert server.ask("/health")[2] == {"status": "ok"}
    assert server.ask("/v1/nothing")[0] == 404
    status, headers, text = server.ask("/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert all(float(value) >= 0 for value in samples.values())
    for name in samples:
        assert f"# TYPE {name.partition('{')[0]} {'counter' if '_total' in name else 'gauge'}" in text
    assert float(samples['elm_mlx_http_requests_total{status="404"}']) >= 1


def test_health_says_that_no_answer_is_to_be_expected(talker_dir: Path) -> None:
    with serving.serving([talker_dir], engine=ScriptedEngine()) as server:
        server.engine.fault = "the engine's thread has ended"
        status, _, content = server.ask("/health")
        assert (status, content["error"]["code"]) == (503, "engine_failed")
        assert content["error"]["message"] == "the engine's thread has ended: restart the server"


def test_the_page_is_served_whole_and_nothing_else(server: Served) -> None:
    page = Path(app_module.__file__).parent / "page"
    for path in page.iterdir():
        status, headers, text = server.ask("/" if path.name == "index.html" else f"/{path.name}")
        assert (status, text, headers["cache-control"]) == (200, path.read_text("utf-8"), "no-cache")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for name in (
        "../app.py",
        "..%2fapp.py",
        "app.py",
        "page/page.js",
        "%2e%2e/app.py",
        "/etc/passwd",
        "a" * 300,
        "%00",
    ):
        assert server.ask(f"/{name}")[0] == 404


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_a_text_that_is_far_too_long_is_not_encoded_whole(
    server: Served, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, lengths = Tokenizer.encode, list[int]()

    def noted(self: Tokenizer, text: str, **options: Any) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    text = "an old king " * 100_000
    body = {"prompt": text, "input": text, "messages": [{"role": "user", "content": text}]}
    names = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/embeddings": "input"}
    status, _, content = server.ask(path, {"model": "talker", names[path]: body[names[path]]})
    assert (status, content["error"]["code"]) == (400, "context_length_exceeded")
    assert "more than" in content["error"]["message"] and max(lengths) < 20_000


def test_log_probabilities_that_would_fill_the_memory_are_refused(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "MAX_LOGPROBS", 100)
    asked = {"model": "model", "prompt": [[5, 6, 7, 8], [5, 6, 7, 8]], "echo": True, "max_tokens": 1, "logprobs": 9}
    assert server.ask("/v1/completions", asked)[0] == 200
    status, _, content = server.ask("/v1/completions", asked | {"logprobs": 10})
    assert (status, content["error"]["param"]) == (400, "logprobs") and "110" in content["error"]["message"]
    assert server.ask("/v1/completions", asked | {"logprobs": 10, "stream": True})[0] == 200
