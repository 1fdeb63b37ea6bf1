"""Clients of a server, each streaming one completion, in a process of their own: see `serve.py`, which starts it.

Reads lines of JSON, `{"url", "bodies"}`, and answers each with a list: of every client the seconds at which it sent its
request and at which each piece of text came, and the number of tokens that the server counted. What comes is looked at
when all is there: clients that parse meanwhile take from the server's processors.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlsplit


async def client(url: str, body: dict[str, Any]) -> dict[str, Any]:
    sent = time.perf_counter()
    for _ in range(1000):  # a server whose queue of connections is full, as mlx-lm's is with six, closes others
        with suppress(ConnectionError):
            if pieces := await pieces_of(url, body):
                return {"sent": sent, **figures(url, pieces)}
        await asyncio.sleep(0.05)
    raise SystemExit(f"{url} takes no connection")


async def pieces_of(url: str, body: dict[str, Any]) -> list[tuple[float, bytes]]:
    """Returns what a server answers, and when it came."""
    host, content = urlsplit(url), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host.hostname, host.port)
    lines = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    pieces = []
    with closing(writer):
        writer.write(lines.encode() + content)
        while piece := await reader.read(1 << 16):
            pieces.append((time.perf_counter(), piece))
    return pieces


def figures(url: str, pieces: list[tuple[float, bytes]]) -> dict[str, Any]:
    """Returns when each piece of text came, and the number of tokens. Raises SystemExit at an error."""
    if b" 200 " not in pieces[0][1].split(b"\n", 1)[0]:
        raise SystemExit(f"{url}: {b''.join(piece for _, piece in pieces).decode()}")
    came, tokens, rest = [], 0, b""
    for now, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if any(choice.get("text") for choice in chunk["choices"]):
                came.append(now)
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return {"came": came, "tokens": tokens}


async def together(url: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return await asyncio.gather(*(client(url, body) for body in bodies))


for request in sys.stdin:
    print(json.dumps(asyncio.run(together(**json.loads(request)))), flush=True)
