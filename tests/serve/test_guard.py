"""The guard, attacked: what is slow, endless, too large, malformed or from elsewhere, and the next request after it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from serving import Served

from elm_mlx.serve import guard
from elm_mlx.serve import server as server_module
from elm_mlx.serve.guard import MAX_BODY, Guard

KEY = "a-key-of-some-length"
QUESTION = {"model": "talker", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def hasty(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A server that waits for nobody."""
    for module, name in (
        (server_module, "HEADER_SECONDS"), (server_module, "WRITE_SECONDS"), (guard, "BODY_SECONDS"),
        (guard, "LINGER_SECONDS"), (server_module, "REFUSED_SECONDS"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 0.4)
    return server


@pytest.fixture(autouse=True)
def answers_the_next_request(server: Served) -> Iterator[None]:
    yield
    assert server.ask("/v1/chat/completions", QUESTION)[0] == 200


def response(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Reads until the server closes the connection."""
    data = b""
    while received := connection.recv(65536):
        data += received
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, json.loads(body)


def headers_of(length: object = 10, **more: str) -> bytes:
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(length), **more}
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items() if value)
    return f"POST /v1/chat/completions HTTP/1.1\r\n{fields}\r\n".encode()


@pytest.mark.parametrize("piece", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X-A: b\r\n"])
def test_a_client_that_sends_its_headers_slowly(hasty: Served, piece: bytes) -> None:
    with hasty.connect() as connection:
        started = time.monotonic()
        for byte in piece[:3]:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
        status, headers, content = response(connection)
        assert time.monotonic() - started < 3
    assert (status, headers["connection"], content["error"]["type"]) == (408, "close", "invalid_request_error")


def test_a_client_that_sends_its_second_headers_slowly(hasty: Served) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
        connection.sendall(b"GET /hea")
        started = time.monotonic()
        while connection.recv(65536):
            pass
        assert time.monotonic() - started < 3


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_does_not_end(hasty: Served, chunked: bool) -> None:
    more = {"Content_Length": "", "Transfer_Encoding": "chunked"} if chunked else {}
    with hasty.connect() as connection:
        connection.sendall(
            headers_of(1000, **more).replace(b"Content-Length: 1000\r\n", b"") if chunked else headers_of(1000)
        )
        for _ in range(3):
            connection.sendall(b"1\r\n{\r\n" if chunked else b"{")
            time.sleep(0.05)
        status, _, content = response(connection)
    assert status == 408 and "body" in content["error"]["message"]


def test_a_body_that_is_announced_as_too_large_is_not_read(server: Served) -> None:
    with server.connect() as connection:
        connection.sendall(headers_of(MAX_BODY + 1))
        connection.shutdown(socket.SHUT_WR)
        assert response(connection)[0] in (413,)
    status, headers, content = server.ask("/v1/chat/completions", b" " * (MAX_BODY + 1))
    assert (status, headers["connection"], content["error"]["code"]) == (413, "close", "body_too_large")
    assert server.ask("/v1/chat/completions", b" " * MAX_BODY)[0] == 400


def test_a_body_that_is_too_large_without_a_word(hasty: Served) -> None:
    with hasty.connect() as connection:
        connection.sendall(headers_of("").replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"))
        chunk = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16))
        for _ in range(MAX_BODY // (1 << 16) + 2):
            connection.sendall(chunk)
        assert response(connection)[0] == 413


def test_a_client_that_reads_nothing(hasty: Served) -> None:
    with hasty.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.settimeout(0.2)
        with contextlib.suppress(OSError):  # once it is closed
            connection.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
        serving.until(lambda: not hasty.server.server_state.connections, 10)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff", b'"text"', b"{" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"messages":' + b"[" * 200 + b"]" * 200 + b"}", b'{"seed": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}',
        b'{"prompt": [' + b"1," * (1 << 18) + b"1]}", b'{"temperature": NaN}', b'{"temperature": 1e999}',
        b'{"model": "talker", "prompt": "\\ud800"}', b'{"model": "\\ud800", "prompt": "a"}',
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_bodies_that_are_no_request(server: Served, path: str, body: bytes) -> None:
    status, _, content = server.ask(path, body)
    assert status in (400, 404) and "\n" not in content["error"]["message"]
    assert len(content["error"]["message"]) < 600


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
def test_a_body_of_another_kind(server: Served, kind: str) -> None:
    status, _, content = server.ask("/v1/chat/completions", QUESTION, {"Content-Type": kind})
    assert status == 415 and "application/json" in content["error"]["message"]


def test_a_kind_may_name_its_letters(server: Served) -> None:
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.ask("/v1/chat/completions", QUESTION, kind)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "",
             "[::2]:80", "0.0.0.0", "2130706433", "localhost@evil.example"]
)  # fmt: skip
def test_a_host_of_another_name(server: Served, host: str) -> None:
    for path, body in (("/", None), ("/v1/models", None), ("/v1/chat/completions", QUESTION), ("/health", None)):
        status, headers, content = server.ask(path, body, {"Host": host})
        assert (status, content["error"]["code"]) == (403, "unknown_host")
        assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "chat.localhost", "127.0.0.1:8080", "127.1.2.3", "[::1]:80"]
)
def test_a_host_of_this_machine(server: Served, host: str) -> None:
    assert server.ask("/health", headers={"Host": host})[0] == 200


def test_names_of_a_server_for_others() -> None:
    def knows(host: str) -> Any:
        return Guard(lambda *_: None, host, None, (), lambda line: None)._knows  # type: ignore[arg-type]

    for host in ("box.example", "0.0.0.0", "192.168.1.5", "::"):
        assert all(map(knows(host), [socket.gethostname(), "192.168.1.6", "[fe80::1]:80", "localhost", "127.0.0.1:1"]))
        assert not any(map(knows(host), ["evil.example", "", "example", "a@box.example", "box.example.evil"]))
    assert knows("box.example")("BOX.example:8080")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * (8 << 20),
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:20]),
)
def test_what_is_not_http(hasty: Served, sent: bytes) -> None:
    with hasty.connect() as connection:
        connection.sendall(sent)
        status, _, content = response(connection)
        assert 400 <= status < 500 and content["error"]["message"]


@pytest.mark.parametrize(
    "chunks", [b"zz\r\n", b"f" * 30 + b"\r\n", b"1;" + b"a" * (1 << 20), b"1\r\n{\r\n0\r\n" + b"X: y\r\n" * 100_000]
)
def test_chunks_that_are_none(hasty: Served, chunks: bytes) -> None:
    with hasty.connect() as connection:
        connection.sendall(headers_of("").replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n") + chunks)
        status, _, content = response(connection)
    assert status == 400 and "chunks" in content["error"]["message"]
    serving.until(lambda: hasty.guard.in_flight == 0)


def test_headers_are_bounded_however_they_come(server: Served) -> None:
    assert server.ask("/health", headers={"X-Long": "a" * 15_000})[0] == 200
    for path, headers in (
        ("/health", {"X-Long": "a" * 17_000}),
        (f"/health?{'a' * 17_000}", {}),
        (f"/{'a' * 17_000}", {}),
    ):
        status, _, content = server.ask(path, headers=headers)
        assert (status, content["error"]["message"]) == (431, "the headers are longer than 16 KiB")


def test_a_length_does_not_go_with_chunks(hasty: Served) -> None:
    with hasty.connect() as connection:
        sent = headers_of(2).replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(sent + b"2\r\n{}\r\n0\r\n\r\n")
        status, headers, content = response(connection)
    assert (status, headers["connection"]) == (400, "close") and "Transfer-Encoding" in content["error"]["message"]


def test_connections_are_bounded(hasty: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.until(lambda: not hasty.server.server_state.connections)
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 1.5)
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 5)
    held = [hasty.connect() for _ in range(5)]
    with hasty.connect() as one_more:
        status, headers, _ = response(one_more)
    assert (status, headers["retry-after"]) == (503, "1")
    for each in held:
        each.close()
    serving.until(lambda: not hasty.server.server_state.connections)


def test_connections_that_are_refused_are_bounded(hasty: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.until(lambda: not hasty.server.server_state.connections)
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 1.5)
    monkeypatch.setattr(server_module, "REFUSED_SECONDS", 1.5)
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 4)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(hasty.connect()) for _ in range(20)]
        serving.until(lambda: len(hasty.server.server_state.connections) <= 6)
        with contextlib.suppress(ConnectionError):
            assert not held[-1].recv(100)
    serving.until(lambda: not hasty.server.server_state.connections)


def test_no_descriptor_is_left(hasty: Served) -> None:
    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))  # noqa: PTH208 (of descriptors)

    serving.until(lambda: not hasty.server.server_state.connections)
    before = descriptors()
    for sent in (b"", b"GET", headers_of(100) + b"{", b"nonsense\r\n\r\n", headers_of(MAX_BODY + 1)) * 4:
        connection = hasty.connect()
        connection.sendall(sent)
        connection.close()
    serving.until(lambda: not hasty.server.server_state.connections)
    serving.until(lambda: descriptors() <= before)


def test_a_key(talker_dir: Path, server: Served) -> None:
    with serving.serving([talker_dir], api_key=KEY) as locked:
        wrong = ["", KEY[:-1], f"{KEY}x", "x" * len(KEY), "x" * 4000, KEY.upper(), "ÿ", f"{KEY} {KEY}"]
        for given in (None, *(f"Bearer {key}" for key in wrong), KEY, f"Basic {KEY}"):
            sent = {} if given is None else {"Authorization": given}
            for path, body in (
                ("/v1/models", None),
                ("/v1/chat/completions", QUESTION),
                ("/v1/x", None),
                ("/metrics", None),
            ):
                status, headers, content = locked.ask(path, body, sent)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert content["error"]["code"] == "invalid_api_key" and KEY not in content["error"]["message"]
        for given in (f"Bearer {KEY}", f"bearer  {KEY}"):
            assert locked.ask("/v1/chat/completions", QUESTION, {"Authorization": given})[0] == 200
        assert locked.ask("/health")[0] == locked.ask("/")[0] == locked.ask("/page.js")[0] == 200


def test_a_key_is_compared_in_the_same_time_whatever_it_is() -> None:
    from hmac import compare_digest

    right = guard._digest(KEY.encode())

    def seconds(given: bytes) -> float:
        return statistics.median(_timed(lambda: compare_digest(guard._digest(given), right)) for _ in range(3000))

    near, far = seconds(KEY[:-1].encode() + b"x"), seconds(b"x" * len(KEY))
    assert 0.5 < near / far < 2


def _timed(act: Any) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def test_other_origins_are_told_nothing(server: Served) -> None:
    origin = {"Origin": "https://evil.example"}
    _, headers, _ = server.ask("/v1/models", headers=origin)
    assert not any(name.startswith("access-control") for name in headers)
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    status, headers, _ = server.ask("/v1/chat/completions", headers=asked, method="OPTIONS")
    assert status == 204 and not any(name.startswith("access-control") for name in headers)


def test_an_origin_that_is_allowed(talker_dir: Path, server: Served) -> None:
    friend = "https://friend.example"
    with serving.serving([talker_dir], api_key=KEY, allow_origins=[friend]) as open_:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        status, headers, _ = open_.ask("/v1/chat/completions", headers={"Origin": friend, **asked}, method="OPTIONS")
        assert (status, headers["access-control-allow-origin"]) == (204, friend)
        assert "authorization" in headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in headers
        sent = {"Origin": friend, "Authorization": f"Bearer {KEY}"}
        status, headers, _ = open_.ask("/v1/chat/completions", QUESTION, sent)
        assert (status, headers["access-control-allow-origin"]) == (200, friend)
        assert open_.ask("/v1/models", headers={"Origin": friend})[1]["access-control-allow-origin"] == friend  # a 401
        _, headers, _ = open_.ask("/v1/models", headers={**sent, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in headers
        assert open_.ask("/health", headers={"Origin": friend, "Host": "evil.example"})[0] == 403


def test_every_answer_has_its_headers(server: Served) -> None:
    seen = set()
    for path, body in (("/", None), ("/v1/x", None), ("/v1/models", None), ("/v1/chat/completions", {})):
        _, headers, _ = server.ask(path, body)
        seen.add(headers["x-request-id"])
        assert "server" not in headers and headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY" and "content-security-policy" in headers
    assert len(seen) == 4


def test_what_all_bodies_take_together_is_bounded(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODIES", 300)
    assert server.ask("/v1/chat/completions", QUESTION)[0] == 200
    status, headers, content = server.ask("/v1/chat/completions", QUESTION | {"user": "a" * 300})
    assert (status, content["error"]["code"]) == (503, "overloaded") and int(headers["retry-after"]) > 0
    serving.until(lambda: server.guard.body_bytes == 0)
    assert server.ask("/v1/chat/completions", QUESTION)[0] == 200
