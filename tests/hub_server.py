"""A small hub: an HTTP server that answers huggingface_hub as the real one does, for repositories made by code."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class HubServer:
    """Repositories by name, each with one commit; data sets as `datasets/OWNER/NAME`.

    Other revisions than main and the commit are repositories of their own, `NAME@REVISION`.

    Attributes:
        refuses: repository -> status and error code that every request for its files gets.
        breaks: file -> after how many bytes a connection breaks, until that many times are used up.
        asked: method and path of every request, and its range.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refuses: dict[str, tuple[int, str]] = {}
        self.breaks: dict[str, list[int]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.knows_ranges = True

    def add(self, name: str, directory: Path, **more: bytes) -> str:
        """Makes a repository of a directory's files. Returns its commit."""
        files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*.*"))}
        self.repositories[name] = {**files, **more}
        return self.commit(name)

    def commit(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()

    def fetched(self, method: str = "GET") -> list[str]:
        """Names the files that were asked for, in order."""
        return [
            path.split("/resolve/")[1].partition("/")[2]
            for how, path, _ in self.asked
            if how == method and "/resolve/" in path
        ]

    @contextmanager
    def running(self) -> Iterator[str]:
        """Yields the address that it listens at."""
        hub = self

        class Handler(_Handler):
            server_of = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server_of, urlsplit(self.path).path
        hub.asked.append((self.command, unquote(path), self.headers.get("Range")))
        parts = [unquote(part) for part in path.strip("/").split("/")]
        api, kind = parts[0] == "api", ""
        if api or parts[0] == "datasets":
            kind = "datasets/" if "datasets" in parts[:2] else ""
            parts = parts[2 if api else 1 :]
        name = kind + "/".join(parts[:2])
        if api:
            self._describe(name, parts[3] if len(parts) > 3 else "main")
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file(name, parts[3], "/".join(parts[4:]))
        else:
            self._fail(404, "EntryNotFound")

    def _describe(self, name: str, revision: str) -> None:
        hub = self.server_of
        if name not in hub.repositories:
            self._fail(401, "RepoNotFound")
        elif f"{name}@{revision}" in hub.repositories:
            self._answer_about(f"{name}@{revision}")
        elif revision not in ("main", hub.commit(name)):
            self._fail(404, "RevisionNotFound")
        else:
            self._answer_about(name)

    def _answer_about(self, name: str) -> None:
        hub = self.server_of
        siblings = [{"rfilename": file, "size": len(data)} for file, data in hub.repositories[name].items()]
        about = {"_id": "0", "id": name, "modelId": name, "sha": hub.commit(name), "siblings": siblings, "tags": []}
        self._answer(json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str) -> None:
        hub = self.server_of
        if name in hub.refuses:
            return self._fail(*hub.refuses[name])
        other = next(
            (each for each in hub.repositories if each.startswith(name) and hub.commit(each) == revision), name
        )
        name = f"{name}@{revision}" if f"{name}@{revision}" in hub.repositories else other
        if file not in hub.repositories.get(name, {}):
            return self._fail(404, "EntryNotFound")
        data = hub.repositories[name][file]
        headers = {"X-Repo-Commit": hub.commit(name), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if file.endswith((".safetensors", ".bin")):
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        start = 0
        if hub.knows_ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(data[start:], headers, 206 if "Content-Range" in headers else 200, hub.breaks.get(file))
        return None

    def _answer(self, data: bytes, headers: dict[str, str], status: int = 200, breaks: list[int] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if breaks:
            data = data[: breaks.pop(0)]
            self.close_connection = True
        self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
