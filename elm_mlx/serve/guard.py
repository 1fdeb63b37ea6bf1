"""Who may ask, and how much: Host, API key, content type, sizes and times, checked before any handler runs.

A page of another site can send requests to a server on this machine, under a name of its own too (DNS rebinding), so
the Host header is checked, nothing is said of other origins, and what is posted must be called JSON, which a foreign
page may not do without asking first.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from elm_mlx.serve.answers import ErrorAnswer

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BODY = 4 << 20  # bytes
BODY_SECONDS = 30  # for a body to come
KEYED = ("/v1/", "/metrics")  # what needs the key; the page is open, and asks for it
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
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
    """

    def __init__(
        self, app: App, host: str, api_key: str | None, allow_origins: Sequence[str], log: Callable[[str], None]
    ) -> None:
        self._app, self._log = app, log
        self._key = None if api_key is None else _digest(api_key.encode())
        self._origins = frozenset(allow_origins)
        self._loopback = is_loopback(host)
        self._names = {host.lower(), *(() if self._loopback else _own_names())}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server speaks no other protocol"
        headers = dict(scope["headers"])  # each at most once, or the last: h11 refuses a second Host or length
        identity, start, status = f"req_{secrets.token_hex(12)}", time.monotonic(), 0
        added = {**_HEADERS, "x-request-id": identity, **self._cors(headers)}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in message.get("headers", ())}
                more = [(name.encode(), value.encode()) for name, value in added.items() if name.encode() not in own]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        state = scope.setdefault("state", {})
        try:
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await _send(answer, 204, b"", {})
                return
            self._check(scope, headers)
            await self._app(scope, _limited(headers, receive), answer)
        except ErrorAnswer as refusal:
            if status:  # too late to say so
                raise
            from starlette.responses import JSONResponse

            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, answer)
        finally:
            seconds = time.monotonic() - start
            said = "".join(f" {value}" for value in (state.get("tokens"), state.get("said")) if value)
            path = scope["path"].encode("unicode_escape").decode()[:200]
            self._log(f"{scope['method']} {path} {status or 'left'} {seconds:.2f} s{said}")

    def _check(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> None:
        """Raises ErrorAnswer for a request that must not be answered."""
        if not self._knows(headers.get(b"host", b"").decode("latin-1")):
            raise ErrorAnswer(
                403, "this server has another name: ask for it by the address that it printed", code="unknown_host"
            )
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
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": "authorization, content-type",
            "access-control-expose-headers": "x-request-id, retry-after",
            "access-control-max-age": "600",
            "cross-origin-resource-policy": "cross-origin",
            "vary": "Origin",
        }


def _limited(headers: Mapping[bytes, bytes], receive: Receive) -> Receive:
    """Returns `receive` with limits on the size of a body, and on the time that it takes to come."""
    loop = asyncio.get_running_loop()
    deadline, size, whole = loop.time() + BODY_SECONDS, 0, False

    async def limited() -> Message:
        nonlocal size, whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - loop.time()))
        except asyncio.TimeoutError:
            raise ErrorAnswer(
                408, f"the body did not come within {BODY_SECONDS} s", headers={"Connection": "close"}
            ) from None
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise _too_large()
        whole = not message.get("more_body", False)
        return message

    return limited


def _too_large() -> ErrorAnswer:
    return ErrorAnswer(413, f"the body is larger than {MAX_BODY >> 20} MiB", headers={"Connection": "close"})


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
