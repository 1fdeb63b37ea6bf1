"""Listening: the socket, limits on connections that uvicorn has not, signals, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from elm_mlx.errors import InputError
from elm_mlx.serve.answers import ErrorAnswer, busy
from elm_mlx.serve.guard import Guard

HEADER_SECONDS = 10.0  # for a request's headers to come
WRITE_SECONDS = 60.0  # for a client to read what waits for it
IDLE_SECONDS = 30  # between two requests on a connection
REFUSED_SECONDS = 2.0  # for a client that is refused to stop sending
END_SECONDS = 10.0  # for answers in flight, when the server is to stop
MAX_CONNECTIONS = 1000
_FILES = 2 * MAX_CONNECTIONS  # descriptors, of which macOS allows 256 unless asked


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, and not yet listening. Raises InputError where it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: no such address ({getattr(error, 'strerror', None) or error})") from None
    # Of localhost, which has an address of both kinds, the one that all clients try.
    family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _taken(host, port, error) from None
    return bound


def _taken(host: str, port: int, error: OSError) -> InputError:
    return InputError(f"cannot listen at {host}, port {port} ({error.strerror}): --port takes another")


def url_of(bound: socket.socket, host: str) -> str:
    """Returns the address for people; of a server that listens at every address, that of this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{bound.getsockname()[1]}/"


def make_server(app: Guard, started: Callable[[], None]) -> uvicorn.Server:
    """Returns uvicorn's server of `app`; `started` is called when it listens."""
    config = uvicorn.Config(
        app, http=_Connection, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_keep_alive=IDLE_SECONDS, log_level="critical",
        timeout_graceful_shutdown=1,  # for what is left when answers have had their time
    )  # fmt: skip
    return _Server(config, app, started)


def run(server: uvicorn.Server, bound: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C, and then until the answers in flight end, `END_SECONDS` at most.

    Other requests are refused meanwhile. A second Ctrl-C does not wait: it ends the process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        bound.listen()
    except OSError as error:  # another process was here since it was bound
        host, port, *_ = bound.getsockname()
        raise _taken(host, port, error) from None
    asyncio.run(server.serve([bound]))


class _Server(uvicorn.Server):
    """uvicorn's server, whose end by a signal is a good one, and does not come as a closed door."""

    def __init__(self, config: uvicorn.Config, guard: Guard, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._guard, self._tell_started = guard, started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._tell_started()

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        if self._guard.closing and sig == signal.SIGINT:
            os._exit(128 + sig)
        self._guard.closing = True
        if self._loop is None:  # it does not listen yet
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_end)

    def _begin_end(self) -> None:
        self._end = self._end or asyncio.get_running_loop().create_task(self._end_in_time())

    async def _end_in_time(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while self._guard.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.should_exit = True

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
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 1.5 * MAX_CONNECTIONS:  # no descriptors are left to say so
            self.transport.abort()
        elif len(self.connections) > MAX_CONNECTIONS:
            self._refuse(busy(f"{MAX_CONNECTIONS} connections are open already", 1))
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_due = _cancelled(self._headers_due)
        self._reading_due = _cancelled(self._reading_due)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        super().data_received(data)
        if not self._idle:
            self._headers_due = _cancelled(self._headers_due)
        elif self._headers_due is None:
            self._expect_headers()

    def send_400_response(self, msg: str) -> None:
        """Is called for what is no HTTP."""
        what = (
            "this is no HTTP request, or its headers are too long" if self._idle else "the body's chunks are malformed"
        )
        self._refuse(ErrorAnswer(400, what))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self._reading_due or self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading_due = _cancelled(self._reading_due)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._abort_in_time()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_in_time()

    @property
    def _idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        slow = ErrorAnswer(408, f"no request came within {HEADER_SECONDS:g} s")
        self._headers_due = self.loop.call_later(HEADER_SECONDS, self._refuse, slow)

    def _refuse(self, refusal: ErrorAnswer) -> None:
        """Closes the connection, and says why where no answer has begun.

        What the client still sends is read and dropped for a while: the connection of one that was not read to its end
        is reset, and with it goes the answer.
        """
        if self._refused or self.transport.is_closing():
            return
        cycle = self.cycle
        if (self._idle and self.conn.our_state is not h11.IDLE) or (not self._idle and cycle.response_started):
            self.transport.close()
        else:
            self._refused = True
            if not self._idle:  # its body has come to a bad end
                cycle.disconnected = True
                cycle.message_event.set()
            body = json.dumps(refusal.body).encode()
            told = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            lines = "".join(f"{name}: {value}\r\n" for name, value in {**told, **refusal.headers}.items())
            self.transport.write(f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n".encode())
            self.transport.write(f"{lines}\r\n".encode() + body)
            self.transport.write_eof()
            self.transport.resume_reading()
            self.loop.call_later(REFUSED_SECONDS, self.transport.close)
        self._abort_in_time()

    def _abort_in_time(self) -> None:
        """Ends a connection that is closed, and whose client does not take the rest."""
        if self._refused or self.transport.is_closing():
            self.loop.call_later(WRITE_SECONDS, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> Any:
    if timer is not None:
        timer.cancel()
