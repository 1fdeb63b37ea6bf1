"""A server for the web chat that says what a test tells it to, with the page's real files and its security policy."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from elm_mlx.serve.guard import POLICY

PAGE = Path(__file__).parents[2] / "elm_mlx" / "serve" / "page"
CHAT = {"id": "small-chat", "kind": "chat", "context_length": 2048, "base": None}
ADAPTER = {"id": "pirate", "kind": "chat", "context_length": 2048, "base": "small-chat"}
BASE = {"id": "small-base", "kind": "base", "context_length": 512, "base": None}


@dataclass
class Refusal:
    """An answer with an error's status."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Writing:
    """An answer that is streamed. `ending`: a finish reason, "error" for one in the stream, "cut" for no end at all."""

    text: str
    pause: float = 0.0  # seconds between pieces
    hold: float = 0.0  # seconds before the first
    ending: str = "stop"
    prompt_tokens: int = 10
    piece: int = 4  # characters
    sources: list[dict[str, Any]] | None = None


@dataclass
class ScriptedServer:
    """Answers with what `script` holds, in turn, then with `otherwise`. `bodies` has what was asked."""

    models: list[dict[str, Any]] = field(default_factory=lambda: [CHAT])
    key: str | None = None
    script: list[Writing | Refusal] = field(default_factory=list)
    otherwise: Writing | Refusal = field(default_factory=lambda: Writing("All is **well**."))
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0  # clients that left amid an answer
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Listens, on the same port as before if it did so before."""
        routes = [
            Route("/v1/models", self._models), Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/completions", self._answer, methods=["POST"]), Route("/{name:path}", self._file),
        ]  # fmt: skip
        config = uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=self.port, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
            assert self._thread.is_alive(), "the scripted server cannot listen"
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Goes away at once, amid what it is writing too."""
        for connection in list(self._server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _file(self, request: Request) -> Response:
        path = PAGE / (request.path_params["name"] or "index.html")
        if path.parent != PAGE or not path.is_file():
            return Response(status_code=404)
        return FileResponse(path, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    async def _models(self, request: Request) -> Response:
        return self._unauthorized(request) or JSONResponse({"object": "list", "data": self.models})

    async def _answer(self, request: Request) -> Response:
        if refused := self._unauthorized(request):
            return refused
        self.bodies.append(await request.json())
        step = self.script.pop(0) if self.script else self.otherwise
        if isinstance(step, Refusal):
            return _refused(step)
        return StreamingResponse(self._stream(step, "/chat/" in request.url.path), media_type="text/event-stream")

    def _unauthorized(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return _refused(Refusal(401, "this server needs an API key", "invalid_api_key"))

    async def _stream(self, writing: Writing, chat: bool) -> AsyncIterator[str]:
        pieces = [writing.text[at : at + writing.piece] for at in range(0, len(writing.text), writing.piece)]
        try:
            yield ": keep-alive\n\n"
            if writing.sources is not None:
                yield _event({"choices": [], "sources": writing.sources})
            await asyncio.sleep(writing.hold)
            for piece in pieces:
                yield _event(
                    {"choices": [{"index": 0, **({"delta": {"content": piece}} if chat else {"text": piece})}]}
                )
                await asyncio.sleep(writing.pause)
        except asyncio.CancelledError:
            self.left += 1
            raise
        if writing.ending == "cut":
            return
        if writing.ending == "error":
            yield _event(
                {"error": {"message": "the engine stopped", "type": "server_error", "param": None, "code": None}}
            )
            return
        last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield _event({"choices": [{"index": 0, **last, "finish_reason": writing.ending}]})
        usage = {"prompt_tokens": writing.prompt_tokens, "completion_tokens": len(pieces)}
        yield _event({"choices": [], "usage": {**usage, "total_tokens": sum(usage.values())}})
        yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _refused(refusal: Refusal) -> Response:
    error = {"message": refusal.message, "type": "invalid_request_error", "param": refusal.param, "code": refusal.code}
    return JSONResponse({"error": error}, refusal.status, refusal.headers)
