"""Clients of a server, each streaming one completion, in a process of their own: see `serve.py`, which starts it.

Reads lines of JSON, `{"url", "bodies"}`, and answers each with a list: of every client the seconds at which it sent its
request and at which each piece of text came, and the number of tokens that the server counted.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import suppress
from typing import Any

import httpx


async def client(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
    sent = time.perf_counter()
    for _ in range(1000):  # a server whose queue of connections is full, as mlx-lm's is with six, closes others
        with suppress(httpx.ConnectError, httpx.ReadError):
            return {"sent": sent, **await answer_of(http, url, body)}
        await asyncio.sleep(0.05)
    raise SystemExit(f"{url} takes no connection")


async def answer_of(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
    came, tokens = [], 0
    async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{url}: {answer.status_code} {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now, chunk = time.perf_counter(), json.loads(line[6:])
            if any(choice.get("text") for choice in chunk["choices"]):
                came.append(now)
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return {"came": came, "tokens": tokens}


async def together(url: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=len(bodies))) as http:
        return await asyncio.gather(*(client(http, url, body) for body in bodies))


for request in sys.stdin:
    print(json.dumps(asyncio.run(together(**json.loads(request)))), flush=True)
