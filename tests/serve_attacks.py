"""Requests to a server that nobody should send: damaged at random, and from clients that leave at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fuzzing import either, json_values, raw_bytes

_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}}
_COMMON: dict[str, Any] = {
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": 1.5}, "seed": 1, "stop": ["x"], "n": 2,
    "stream": False, "user": "me",
}  # fmt: skip
_GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}], **_COMMON,
         "logprobs": True, "top_logprobs": 2},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], **_COMMON, "stream": True,
         "stream_options": {"include_usage": True}},
        {"messages": [{"role": "user", "content": "a"}], **_COMMON, "tools": [_TOOL], "tool_choice": "none"},
    ],
    "/v1/completions": [
        {"prompt": ["the king", "a fox"], **_COMMON, "echo": True, "logprobs": 1},
        {"prompt": [5, 6, 7], **_COMMON, "stream": True, "stream_options": {"include_usage": False}},
    ],
    "/v1/embeddings": [{"input": ["the king", "a"], "encoding_format": "base64"}],
}  # fmt: skip
_damage = either(json_values, json_values, json_values, raw_bytes)


def damaged_requests(chat: str, base: str, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields paths and bodies, good ones among them; `chat` and `base` are names of models."""
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        path = draw.choice([*_GOOD])
        name = chat if path == "/v1/chat/completions" or draw.random() < 0.2 else base
        good = json.dumps({"model": name, **draw.choice(_GOOD[path])}).encode()
        yield path, good if draw.random() < 0.05 else _damage(good, draw)


def attack(port: int, chat: str, base: str, count: int, seed: int = 0) -> tuple[Counter[int], list[str]]:
    """Sends damaged requests. Returns how many answers had each status, and those that no client could read."""
    statuses: Counter[int] = Counter()
    wrong = []
    for path, body in damaged_requests(chat, base, count, seed):
        status, kind, text = _sent(port, path, body)
        statuses[status] += 1
        fault = _fault(status, kind, text)
        if fault is not None:
            wrong.append(f"{path} {body!r}: {status} {fault}: {text[:200]!r}")
    return statuses, wrong


def _sent(port: int, path: str, body: bytes) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type", "").partition(";")[0], response.read().decode()


def _fault(status: int, kind: str, text: str) -> str | None:
    """Returns what is wrong with an answer; None for nothing."""
    if status == 200 and kind == "text/event-stream":
        ends = text.endswith("data: [DONE]\n\n") or '"error"' in text
        return None if text.startswith("data: {") and ends else "is no whole stream"
    try:
        values = json.loads(text)
    except ValueError:
        return "is no JSON"
    if status == 200:
        return None if "choices" in values or "data" in values else "has no answer"
    error = values.get("error", {})
    if {*error} != {"message", "type", "param", "code"} or "\n" in error["message"] or len(error["message"]) > 1000:
        return "is no error that clients read"
    return None if status in (400, 404, 413) else "is no status of a request that is malformed"


async def leave(port: int, chat: str, count: int, seed: int = 0, at_once: int = 50) -> None:
    """Lets clients ask for answers, and leave at any moment: amid their request, while they wait, amid the answer."""
    places = asyncio.Semaphore(at_once)

    async def client(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        asked = {
            "model": chat, "messages": [{"role": "user", "content": "to us " * draw.choice((1, 20, 150))}],
            "max_tokens": 300, "stream": draw.random() < 0.5, "n": draw.choice((1, 1, 3)), "logit_bias": {"2": -100},
        }  # fmt: skip
        body = json.dumps(asked).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        sent = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
        if draw.random() < 0.2:
            sent = sent[: draw.randrange(len(sent))]
        async with places:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await writer.drain()
                await asyncio.wait_for(reader.read(draw.choice((1, 500, 1 << 16))), draw.random() * 0.2)
            if draw.random() < 0.5:
                writer.transport.abort()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    await asyncio.gather(*map(client, range(count)))


def figures(port: int) -> dict[str, float]:
    """Returns the server's figures by their names in /metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}


def at_rest(port: int) -> bool:
    """Returns whether the engine computes nothing, and nothing waits for it."""
    found = figures(port)
    return not any(found[f"elm_mlx_{name}"] for name in ("rows", "reading", "queued", "reserved_bytes"))
