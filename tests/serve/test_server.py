"""The command `serve` in a process of its own: what it says, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from commands import Run, modules_of, packages
from serving import ANSWER, ScriptedEngine

from elm_mlx.errors import InputError
from elm_mlx.serve import server as server_module
from elm_mlx.serve.guard import MAX_BODY, Guard

QUESTION = {"model": "talker", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


@contextlib.contextmanager
def started(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts the command, and waits until it listens. Yields its process and its address."""
    command = [sys.executable, "-m", "elm_mlx", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            assert process.stderr is not None
            found = None
            while found is None:
                line = process.stderr.readline()
                assert line, "it has ended"
                found = re.fullmatch(r"elm-mlx: serving .* at (http://\S+/) \(Ctrl-C ends it\)\n", line)
            yield process, found[1]
        finally:
            process.kill()


def ask(url: str, body: object = None, key: str | None = None) -> Any:
    headers = {"Content-Type": "application/json", **({} if key is None else {"Authorization": f"Bearer {key}"})}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_and_ends_when_it_is_told_to(talker_dir: Path, tiny_model_dir: Path, sent: signal.Signals) -> None:
    with started(talker_dir, tiny_model_dir) as (process, url):
        assert [model["id"] for model in ask(f"{url}v1/models")["data"]] == ["talker", "model"]
        answer = ask(f"{url}v1/chat/completions", QUESTION)
        assert answer["choices"][0]["message"]["content"] == ANSWER
        process.send_signal(sent)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    assert " POST /v1/chat/completions 200 " in err and "Traceback" not in err


def test_a_draft_model_guesses(tiny_model_dir: Path) -> None:
    asked = {"model": "model", "prompt": "hello", "max_tokens": 100, "temperature": 0}
    texts = []
    for drafts in ((), ("--draft-model", tiny_model_dir, "--num-draft-tokens", 4)):
        with started(tiny_model_dir, *drafts) as (_, url):
            texts.append(ask(f"{url}v1/completions", asked)["choices"][0]["text"])
            with urllib.request.urlopen(f"{url}metrics") as response:
                figures = response.read().decode()
    assert texts[0] == texts[1]
    found = re.search(r"^elm_mlx_drafted_tokens\S* (\d+)", figures, re.MULTILINE)
    assert found is not None and int(found[1]) > 0


def test_answers_in_flight_come_to_their_end_and_others_are_refused(talker_dir: Path) -> None:
    with serving.serving([talker_dir], engine=ScriptedEngine()) as server:
        heard: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=lambda: heard.put(server.ask("/v1/chat/completions", QUESTION))).start()
        (submitted,) = server.engine.wait_for(1)
        submitted.read()
        server.server.handle_exit(signal.SIGTERM, None)
        for path, body in (("/v1/chat/completions", QUESTION), ("/health", None)):
            status, headers, content = server.ask(path, body)
            assert (status, headers["retry-after"], content["error"]["type"]) == (503, "5", "server_error")
        submitted.say("the end", "stop")
        status, _, answer = heard.get(timeout=10)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "the end")
        serving.until(lambda: server.server.should_exit)


def test_an_answer_that_does_not_end_is_not_waited_for(talker_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "END_SECONDS", 0.2)
    with serving.serving([talker_dir], engine=ScriptedEngine()) as server:
        asking = threading.Thread(target=lambda: server.ask("/v1/chat/completions", QUESTION))
        asking.start()
        (submitted,) = server.engine.wait_for(1)
    assert submitted.cancelled.wait(10)
    asking.join(10)


def test_a_second_interruption_ends_it_at_once(talker_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with serving.serving([talker_dir]) as server:
        for sent in (signal.SIGINT, signal.SIGTERM):
            server.server.handle_exit(sent, None)
        assert not ended
        server.server.handle_exit(signal.SIGINT, None)
        assert ended == [130]


def test_a_signal_before_it_listens_ends_it(talker_dir: Path) -> None:
    guard = Guard(lambda *_: None, "127.0.0.1", None, (), lambda line: None)  # type: ignore[arg-type]
    server = server_module.make_server(guard, lambda: None)
    server.handle_exit(signal.SIGTERM, None)
    with server_module.listen("127.0.0.1", 0) as bound:
        asyncio.run(asyncio.wait_for(server.serve([bound]), 20))


def test_a_key_from_the_environment(tiny_model_dir: Path) -> None:
    with started(tiny_model_dir, "--host", "0.0.0.0", ELM_MLX_API_KEY="from-there") as (process, url):
        port = url.rpartition(":")[2]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"http://127.0.0.1:{port}v1/models")
        assert ask(f"http://127.0.0.1:{port}v1/models", key="from-there")["data"]
        process.terminate()
        assert process.wait(20) == 0
        assert "from-there" not in (process.stderr.read() if process.stderr else "")


def test_what_cannot_be_started_is_one_line(run: Run, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELM_MLX_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, said in (
            (["--port", port], f"port {port}"),
            (["--host", "no.such.host.invalid", "--api-key", "a"], "no such address"),
            (["--host", "0.0.0.0", "--port", "0"], "--api-key"),
            (["--host", "::", "--port", "0"], "--api-key"),
            (["--api-key", "", "--port", "0"], "--api-key"),
            (["--api-key", "ключ", "--port", "0"], "--api-key"),
            (["--allow-origin", "*", "--port", "0"], "--api-key"),
            (["--allow-origin", "friend.example", "--port", "0"], "https://"),
            (["--allow-origin", "https://friend.example/", "--port", "0"], "https://"),
            (["--max-memory", "lots"], "8GB"),
            (["--max-memory", "1KB", "--port", "0"], "allow more"),
            (["--adapter", "x=nowhere", "--port", "0"], "nowhere"),
            (["--draft-model", "nowhere", "--port", "0"], "nowhere"),
            (["--draft-model", tiny_model_dir, "--prompt-lookup", "--port", "0"], "give one of the two"),
            (["--num-draft-tokens", "3", "--port", "0"], "--draft-model"),
            (["--port", "99999"], "port"),
        ):
            found, out, err = run("serve", tiny_model_dir, *arguments)
            *notes, error = err.splitlines()
            assert (found, out) == (2, "") and said in error and "Traceback" not in err, err
            assert all("weights computed in" in each for each in notes)
    found, _, err = run("serve", tiny_model_dir, tiny_model_dir, "--port", "0")
    assert found == 2 and "NAME=DIR" in err
    for models in (["nowhere"], ["--model", tiny_model_dir, "--model", "nowhere"]):
        found, _, err = run("serve", *models, "--port", "0")
        assert found == 2 and "nowhere" in err


def test_a_port_that_is_taken_meanwhile_is_one_line() -> None:
    bound = server_module.listen("127.0.0.1", 0)
    with contextlib.closing(bound), server_module.listen("127.0.0.1", bound.getsockname()[1]) as other:
        other.listen()
        with pytest.raises(InputError, match="--port takes another"):
            server_module.run(None, bound)  # type: ignore[arg-type]


def test_sizes_have_units() -> None:
    from elm_mlx.cli.serve import _bytes

    sizes = [_bytes("--max-memory", text) for text in ("1000", "8GB", "1.5 gb", "512MB", "20k", "4GiB")]
    assert sizes == [1000, 8 * 10**9, 15 * 10**8, 512 * 10**6, 20_000, 4 << 30]


def test_the_browser_is_opened_once_it_listens(run: Run, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)

    def serve_nothing(server: Any, bound: socket.socket) -> None:
        server._tell_started()
        bound.close()

    monkeypatch.setattr(server_module, "run", serve_nothing)
    code, _, err = run("serve", tiny_model_dir, "--port", "0", "--open")
    assert code == 0 and f"at {opened[0]} " in err


def test_only_serve_imports_a_server() -> None:
    _, _, modules = modules_of("chat", "--help")
    assert not packages(modules) & {"starlette", "uvicorn", "h11", "mlx"}
    _, _, modules = modules_of("serve", "--help")
    assert not packages(modules) & {"starlette", "uvicorn", "h11", "mlx"}


def test_a_defect_is_an_answer_and_a_line_in_the_log(talker_dir: Path) -> None:
    with serving.serving([talker_dir], engine=ScriptedEngine()) as server:
        server.engine.refusal = KeyError("a mistake")
        status, headers, content = server.ask("/v1/chat/completions", QUESTION)
        assert status == 500 and "a mistake" not in content["error"]["message"]
        serving.until(lambda: len(server.log) == 2)
        assert server.log[0] == f"{headers['x-request-id']} a bug in elm-mlx: KeyError: 'a mistake'"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("padding", [0, MAX_BODY // 2, MAX_BODY])
def test_curl_reads_what_it_is_told(server: serving.Served, tmp_path: Path, padding: int) -> None:
    """Of a large body curl asks whether to send it (`Expect: 100-continue`)."""
    asked = QUESTION | {"stream": True, "user": "a" * padding}
    (tmp_path / "ask.json").write_text(json.dumps(asked))
    command = ["curl", "-sS", "--max-time", "30", "-H", "Content-Type: application/json", "-d", "@ask.json"]
    command += ["-w", "\n%{http_code}", f"{server.url}/v1/chat/completions"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60)
    answer, _, status = done.stdout.rpartition("\n")
    if padding < MAX_BODY:
        events = [line.removeprefix("data: ") for line in answer.split("\n\n")]
        assert (status, events[-2]) == ("200", "[DONE]")
        deltas = [json.loads(each)["choices"][0]["delta"].get("content", "") for each in events[:-2]]
        assert "".join(deltas) == ANSWER
    else:
        assert (status, json.loads(answer)["error"]["code"]) == ("413", "body_too_large")
