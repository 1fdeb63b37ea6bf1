"""Listening: the socket, limits on connections that uvicorn has not, signals, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from elm_mlx.errors import InputError
from elm_mlx.serve.guard import App

HEADER_SECONDS = 10.0  # for a request's headers to come
WRITE_SECONDS = 60.0  # for a client to read what waits for it
IDLE_SECONDS = 30  # between two requests on a connection
END_SECONDS = 10  # for answers in flight, when the server is to stop
MAX_CONNECTIONS = 1000
_FILES = 2 * MAX_CONNECTIONS  # descriptors, of which macOS allows 256 unless asked


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, and not yet listening. Raises InputError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: no such address ({getattr(error, 'strerror', None) or error})") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(f"cannot listen at {host}, port {port} ({error.strerror}): --port takes another") from None
    return bound


def url_of(bound: socket.socket, host: str) -> str:
    """Returns the address for people; of a server that listens at every address, that of this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{bound.getsockname()[1]}/"


def make_server(app: App, started: Callable[[], None]) -> uvicorn.Server:
    """Returns uvicorn's server of `app`; `started` is called when it listens."""
    config = uvicorn.Config(
        app, http=_Connection, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=END_SECONDS,
    )  # fmt: skip
    return _Server(config, started)


def run(server: uvicorn.Server, bound: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C, and then until the answers in flight end, `END_SECONDS` at most.

    A second Ctrl-C does not wait for them.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server.serve([bound]))


class _Server(uvicorn.Server):
    """uvicorn's server, whose end by a signal is a good one."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes the signals, and does not raise them again at the end, as uvicorn does. Only a main thread has any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


class _Connection(H11Protocol):
    """uvicorn's connection, which a client can hold neither by half a header nor by reading nothing."""

    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_due = _cancelled(self._headers_due)
        self._reading_due = _cancelled(self._reading_due)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._headers_due = _cancelled(self._headers_due)
        elif self._headers_due is None:
            self._expect_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self._reading_due or self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading_due = _cancelled(self._reading_due)

    def _expect_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> Any:
    if timer is not None:
        timer.cancel()
