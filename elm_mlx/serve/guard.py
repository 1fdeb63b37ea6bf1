"""Who may ask, and how much: Host, API key, content type, sizes and times, checked before any handler runs.

A page of another site can send requests to a server on this machine, under a name of its own too (DNS rebinding), so
the Host header is checked, nothing is said of other origins, and what is posted must be called JSON, which a foreign
page may not do without asking first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import itertools
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from elm_mlx.reading import printable
from elm_mlx.serve.answers import LEFT, ErrorAnswer, busy

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_HEADERS = 16 << 10  # bytes of headers and address
MAX_BODY = 4 << 20  # bytes
MAX_BODIES = 256 << 20  # bytes, of all requests that are being answered
BODY_SECONDS = 30.0  # for a body to come
LINGER_SECONDS = 2.0  # for a client to stop sending a body that is not read
STOPPING = 5  # seconds after which another server may be there
KEYED = ("/v1/", "/metrics")  # what needs the key; the page is open, and asks for it
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"  # no string is ever made into markup
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::\d{1,5})?")


def is_loopback(host: str) -> bool:
    """Returns whether an address or name reaches this machine alone, wherever it is asked for."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Guard:
    """Checks requests before `app` gets them, and writes a line of the log after each.

    Args:
        host: the address or name that the server is bound to.
        api_key: what clients must send as a bearer token; None for none.
        allow_origins: origins whose pages may use the server, or `*`.
        log: writes a line.

    Attributes:
        closing: requests are refused, for the server is to end.
        in_flight: requests that are being answered.
        body_bytes: of their bodies.
        outcomes: the number of requests by status. What fails in a stream, or has no client left, counts as that.
    """

    def __init__(
        self, app: App, host: str, api_key: str | None, allow_origins: Sequence[str], log: Callable[[str], None]
    ) -> None:
        self._app, self._log = app, log
        self._key = None if api_key is None else _digest(api_key.encode())
        self._origins = frozenset(allow_origins)
        self._loopback = is_loopback(host)
        self._names = {host.lower(), *(() if self._loopback else _own_names())}
        self.closing = False
        self.in_flight = 0
        self.body_bytes = 0
        self.outcomes: Counter[int] = Counter()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server speaks no other protocol"
        headers = dict(scope["headers"])  # each at most once, or the last: h11 refuses a second Host or length
        identity, start, status = f"req_{secrets.token_hex(12)}", time.monotonic(), 0
        added = {**_HEADERS, "x-request-id": identity, **self._cors(headers)}
        body = _LimitedBody(self, headers, receive)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not body.whole:  # what follows on the connection could not be told from it
                    added["connection"] = "close"
                own = {name for name, _ in message.get("headers", ())}
                more = [(name.encode(), value.encode()) for name, value in added.items() if name.encode() not in own]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            elif not body.whole and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await body.rest()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        state = scope.setdefault("state", {})
        state["outcomes"] = self.outcomes
        self.in_flight += 1
        try:
            await self._answered(scope, headers, body, answer)
        except ErrorAnswer as refusal:
            if status:  # too late to say so
                raise
            from starlette.responses import JSONResponse

            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, answer)
        except Exception as error:  # the client has been told that there is a defect, and no more
            self._log(f"{identity} a bug in elm-mlx: {printable(f'{type(error).__name__}: {error}')}")
        finally:
            self.in_flight -= 1
            self.body_bytes -= body.size
            outcome = state.get("outcome", status or LEFT)  # the application knows better how a stream ended
            self.outcomes[outcome] += 1
            seconds = time.monotonic() - start
            said = "".join(f" {value}" for value in (state.get("tokens"), state.get("said")) if value)
            path = scope["path"].encode("unicode_escape").decode()[:200]
            self._log(f"{identity} {scope['method']} {path} {outcome} {seconds:.2f} s{said}")

    async def _answered(
        self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes], body: _LimitedBody, answer: Send
    ) -> None:
        """Lets the application answer. Raises ErrorAnswer for a request that must not be answered."""
        self._check_host(headers)
        if (
            len(scope["query_string"]) + len(scope["path"]) + sum(map(len, itertools.chain(*scope["headers"])))
            > MAX_HEADERS
        ):
            raise ErrorAnswer(431, f"the headers are longer than {MAX_HEADERS >> 10} KiB")
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise ErrorAnswer(400, "Content-Length does not go with Transfer-Encoding")  # a proxy may take the other
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await _send(answer, 204, b"", {})
            return
        self._check(scope, headers)
        if self.closing:
            raise busy("the server is stopping", STOPPING)
        await self._app(scope, body.receive, answer)

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        if not self._knows(headers.get(b"host", b"").decode("latin-1")):
            raise ErrorAnswer(
                403, "this server has another name: ask for it by the address that it printed", code="unknown_host"
            )

    def _check(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> None:
        """Raises ErrorAnswer for a request without the key, or whose body is too large or no JSON."""
        if self._key is not None and scope["path"].startswith(KEYED):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
                raise ErrorAnswer(
                    401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ErrorAnswer(415, "Content-Type must be application/json")
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length[:20]) > MAX_BODY:
                raise _too_large()

    def _knows(self, value: str) -> bool:
        """Returns whether the Host header has a name of this server. An address is one, since no site can claim it."""
        found = _HOST.fullmatch(value)
        if found is None:
            return False
        name = found[1].strip("[]").lower().rstrip(".")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._names or (self._loopback and is_loopback(name))
        return address.is_loopback or not self._loopback

    def _cors(self, headers: Mapping[bytes, bytes]) -> dict[str, str]:
        """Returns what a browser must hear to let a page of an allowed origin read the answer."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or not self._origins & {origin, "*"}:
            return {}
        wanted = headers.get(b"access-control-request-headers", b"authorization, content-type")
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": wanted.decode("latin-1"),  # clients have some of their own
            "access-control-expose-headers": "x-request-id, retry-after",
            "access-control-max-age": "600",
            "cross-origin-resource-policy": "cross-origin",
            "vary": "Origin",
        }


class _LimitedBody:
    """The body of a request as it comes, with limits on its size, on that of all bodies, and on the time that it takes.

    Attributes:
        size: bytes that have come.
        whole: all of it has come.
    """

    def __init__(self, guard: Guard, headers: Mapping[bytes, bytes], receive: Receive) -> None:
        self._guard, self._receive, self.size = guard, receive, 0
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        self.whole = b"transfer-encoding" not in headers and headers.get(b"content-length", b"0") == b"0"

    async def receive(self) -> Message:
        """Returns the next message from the client. Raises ErrorAnswer where a limit is passed."""
        if self.whole:
            return await self._receive()
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except asyncio.TimeoutError:
            raise ErrorAnswer(408, f"the body did not come within {BODY_SECONDS:g} s") from None
        length = len(message.get("body", b""))
        self.size += length
        self._guard.body_bytes += length
        if self.size > MAX_BODY:
            raise _too_large()
        if self._guard.body_bytes > MAX_BODIES:
            raise busy("too many large requests are being answered", 5)
        self.whole = not message.get("more_body", False)
        return message

    async def rest(self) -> None:
        """Drops the rest. A client that is still sending would find the connection reset before it had read why."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drop(), LINGER_SECONDS)

    async def _drop(self) -> None:
        left = 4 * MAX_BODY
        while left > 0:
            message = await self._receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return


def _too_large() -> ErrorAnswer:
    return ErrorAnswer(413, f"the body is larger than {MAX_BODY >> 20} MiB", code="body_too_large")


async def _send(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _digest(key: bytes) -> bytes:
    """Keys are compared by their hashes, so that not even the length can be learnt from the time that it takes."""
    return hashlib.sha256(key).digest()


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name.split('.')[0]}.local", "localhost"}
