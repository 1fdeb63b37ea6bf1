"""A server in a thread of the test's process, with a real engine or one that says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import chat_templates
import httpx
import tiny

from elm_mlx.documents.retrieval import DocumentIndex
from elm_mlx.inference.engine import Engine
from elm_mlx.inference.requests import Embedded, EngineStatistics, Generated, PromptRead, Request, ScoredToken
from elm_mlx.serve.app import Service
from elm_mlx.serve.guard import Guard
from elm_mlx.serve.served_models import load_models
from elm_mlx.serve.server import listen, make_server
from elm_mlx.text import chat_template
from elm_mlx.text.tokenizer import Tokenizer

ANSWER = "old kings and dogs"  # which a `talker` says


class Served:
    """A running server: its address, its engine, its guard, uvicorn's server, and the lines of its log."""

    def __init__(self, port: int, engine: Any, guard: Guard, server: Any, log: list[str]) -> None:
        self.port, self.engine, self.guard, self.server, self.log = port, engine, guard, server, log
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Sends a path as it is, and a `body` of bytes too. Returns status, headers and body: of JSON its value."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            sent = {"Content-Type": "application/json"} if data is not None else {}
            connection.request(method or ("GET" if data is None else "POST"), path, data, {**sent, **(headers or {})})
            response = connection.getresponse()
            content = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, found, json.loads(content) if is_json else content.decode()

    def events(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """Returns the data of a stream's events, and its comments as texts."""
        status, headers, text = self.ask(path, {**body, "stream": True})
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), text
        assert text.endswith("\n\n")
        data = [line.removeprefix("data: ") for line in text.removesuffix("\n\n").split("\n\n")]
        return [json.loads(each) if each.startswith("{") else each for each in data]


@contextmanager
def serving(
    models: Sequence[object],
    adapters: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    allow_origins: Sequence[str] = (),
    log_prompts: bool = False,
    documents: DocumentIndex | None = None,
    engine: Any = None,
    kvps: Sequence[str] = (),
    **engine_options: Any,
) -> Iterator[Served]:
    """Serves model directories as `elm-mlx serve` does; by `engine`, where one is given."""
    served = load_models([*map(str, models)], adapters, None, lambda text: None, kvps)
    if engine is None:
        options = {"max_memory": 1 << 34, "prefix_bytes": 1 << 28, **engine_options}
        options["predictions"] = {name: model.kvp for name, model in served.items() if model.kvp is not None}
        engine = Engine({name: model.loaded for name, model in served.items()}, **options)
    log: list[str] = []
    service = Service(cast(Engine, engine), served, log_prompts, documents)
    app = Guard(service.app(), host, api_key, allow_origins, log.append)
    bound, listening = listen("127.0.0.1", 0), threading.Event()
    port = bound.getsockname()[1]
    server = make_server(app, listening.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    try:
        assert listening.wait(30)
        yield Served(port, engine, app, server, log)
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
        engine.close(0)
        assert not thread.is_alive()


def make_chat(directory: Path) -> Path:
    """Gives a model directory the chat template of OpenELM-instruct."""
    (directory / chat_template.FILE_NAME).write_text(chat_template.OPENELM_INSTRUCT_JINJA)
    return directory


def make_talker(path: Path, tokenizer: Tokenizer) -> Path:
    """Writes a model with a chat template that answers whatever it is asked by `ANSWER`."""
    tiny.write_directory(path, tiny.spelling_model(tokenizer, ANSWER), tokenizer.path.read_bytes())
    (path / chat_template.FILE_NAME).write_text(chat_templates.PLAIN)
    return path


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@dataclass
class Submitted:
    """A request that a scripted engine was given. What happens to it is the test's."""

    request: Request | tuple[int, ...]
    listen: Callable[[Any], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()

    def read(self, cached: int = 0) -> None:
        assert isinstance(self.request, Request)
        self.listen(PromptRead(len(self.request.ids), cached))

    def say(self, text: str, finish_reason: str | None = None, token: int = 5) -> None:
        self.listen(Generated(text, ScoredToken(token, -0.5), finish_reason))


class ScriptedEngine:
    """An engine that keeps what it is given, and says nothing by itself. `refusal` is raised in place of taking it."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal = refusal
        self.fault: str | None = None
        self.submitted: list[Submitted] = []

    def submit(self, request: Request, on_event: Callable[[Any], None]) -> Submitted:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(Submitted(request, on_event))
        return self.submitted[-1]

    def embed(self, model: str, ids: Sequence[int], on_event: Callable[[Any], None]) -> Submitted:
        self.submitted.append(Submitted(tuple(ids), on_event))
        on_event(Embedded((0.5, -1.25), len(ids)))
        return self.submitted[-1]

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(*range(len(fields(EngineStatistics))))

    def trouble(self) -> str | None:
        return self.fault

    def close(self, timeout: float) -> None:
        pass

    def wait_for(self, count: int) -> list[Submitted]:
        """Returns the requests that were given, once there are so many."""
        until(lambda: len(self.submitted) >= count)
        return self.submitted
