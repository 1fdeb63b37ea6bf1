"""A server in a thread of the test's process, on a free port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from elm_mlx.inference.engine import Engine
from elm_mlx.serve.app import Service
from elm_mlx.serve.guard import Guard
from elm_mlx.serve.served_models import load_models
from elm_mlx.serve.server import listen, make_server
from elm_mlx.text import chat_template


class Served:
    """A running server: its address, its engine, and the lines of its log."""

    def __init__(self, port: int, engine: Engine, log: list[str]) -> None:
        self.port, self.engine, self.log = port, engine, log
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)


@contextmanager
def serving(
    models: Sequence[object],
    adapters: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    allow_origins: Sequence[str] = (),
    **engine_options: Any,
) -> Iterator[Served]:
    """Serves model directories as `elm-mlx serve` does."""
    served = load_models([*map(str, models)], adapters, None, lambda text: None)
    options = {"max_memory": 1 << 34, "prefix_bytes": 1 << 28, **engine_options}
    engine = Engine({name: model.loaded for name, model in served.items()}, **options)
    log: list[str] = []
    app = Guard(Service(engine, served).app(), host, api_key, allow_origins, log.append)
    bound, listening = listen("127.0.0.1", 0), threading.Event()
    port = bound.getsockname()[1]
    server = make_server(app, listening.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    try:
        assert listening.wait(30)
        yield Served(port, engine, log)
    finally:
        server.should_exit = True
        thread.join(30)
        engine.close(0)
        assert not thread.is_alive()


def make_chat(directory: Path) -> Path:
    """Gives a model directory the chat template of OpenELM-instruct."""
    (directory / chat_template.FILE_NAME).write_text(chat_template.OPENELM_INSTRUCT_JINJA)
    return directory
