"""`elm-mlx report --watch`: a page that follows a run, in a browser and without one."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsers import chromium
from commands import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Watched:
    """A run's directory, and `report --watch` of it."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        command = [sys.executable, "-m", "elm_mlx", "report", str(path), "--watch", "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", self.process.stdout.readline())
        assert found
        self.url, self.port = found[0], int(found[1])

    def update(self, first: int, last: int, **values: float) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            for step in range(first, last + 1):
                file.write(json.dumps({"step": step, "loss": 3.0 - step / 100, "seconds": 1} | values) + "\n")

    def get(self, path: str, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path, headers=headers)
        return connection.getresponse()

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(20)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path / "run")
    yield watched
    watched.end()


def test_what_the_page_asks_for(watched: Watched) -> None:
    waiting = watched.get("/")
    assert waiting.status == 200 and b"metrics.jsonl: no such file" in waiting.read()
    assert watched.get("/content").status == 503
    watched.update(1, 3)
    page = watched.get("/").read().decode()
    assert "<body data-watched>" in page and "connect-src 'self'" in page and "{{" not in page
    first = watched.get("/content")
    tag, found = first.headers["ETag"], json.loads(first.read())
    assert found["runs"][0]["series"]["loss"]["step"] == [1, 2, 3]
    assert watched.get("/content", **{"If-None-Match": tag}).status == 304
    watched.update(4, 4)
    assert json.loads(watched.get("/content", **{"If-None-Match": tag}).read())["runs"][0]["clock"]["step"][-1] == 4
    assert watched.get("/content", Host="elsewhere.example").status == 400
    assert watched.get("/metrics.jsonl").status == 404


def test_the_page_follows_and_keeps_what_was_chosen(watched: Watched, browser: Browser) -> None:
    from playwright.sync_api import expect

    page = browser.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.extend([request.url] * (not request.url.startswith(watched.url))))
    page.goto(watched.url)
    expect(page.locator("p")).to_contain_text("no such file")
    watched.update(1, 30)
    steps = page.locator("#summary tr", has_text="steps").first.locator("td")
    expect(steps).to_have_text("30")
    page.get_by_label("log").first.check()
    page.locator("#axis").select_option("seconds")
    watched.update(31, 60, grad_norm=0.5)
    expect(steps).to_have_text("60")
    expect(page.locator("h3", has_text="grad norm")).to_have_count(1)
    expect(page.get_by_label("log").first).to_be_checked()
    expect(page.locator("#axis")).to_have_value("seconds")
    expect(page.locator("#state")).to_contain_text("new figures at")
    assert watched.end() == 0
    expect(page.locator("#state")).to_contain_text("has ended")
    expect(steps).to_have_text("60")
    assert wrong == []
    page.close()


def test_what_cannot_be_watched(run: Run, tmp_path: Path) -> None:
    assert "no such directory" in run("report", tmp_path / "none", "--watch")[2]
    assert "--watch writes no file" in run("report", tmp_path, "--watch", "--out", tmp_path / "page.html")[2]
