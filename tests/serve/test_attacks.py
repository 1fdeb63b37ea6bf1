"""Damaged requests, and clients that leave: the server answers the next one, and keeps nothing of them."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import serve_attacks
import serving
from serving import ANSWER, ScriptedEngine, Served

from elm_mlx.serve import completions

QUESTION = {"model": "talker", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 (of descriptors)


def answers(server: Served) -> bool:
    answer: Any = server.ask("/v1/chat/completions", QUESTION)[2]
    return bool(answer["choices"][0]["message"]["content"] == ANSWER)


def test_damaged_requests_are_answered_or_refused_by_what_is_wrong(server: Served) -> None:
    statuses, wrong = serve_attacks.attack(server.port, "talker", "model", 300)
    assert not wrong
    assert statuses[200] > 20 and statuses[400] > 150
    serving.until(lambda: serve_attacks.at_rest(server.port))
    assert answers(server) and not any("a bug in elm-mlx" in line for line in server.log)


def test_clients_that_leave_free_their_places(server: Served) -> None:
    assert answers(server)
    serving.until(lambda: not server.server.server_state.connections)
    before, finished = descriptors(), serve_attacks.figures(server.port)["elm_mlx_cancelled_total"]
    asyncio.run(serve_attacks.leave(server.port, "talker", 60))
    serving.until(lambda: serve_attacks.at_rest(server.port))
    assert answers(server)
    serving.until(lambda: not server.server.server_state.connections and server.guard.in_flight == 0)
    serving.until(lambda: descriptors() <= before)
    assert serve_attacks.figures(server.port)["elm_mlx_cancelled_total"] > finished
    assert not any("a bug in elm-mlx" in line for line in server.log)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_is_noticed_at_once(talker_dir: Path, stream: bool, begun: bool) -> None:
    with serving.serving([talker_dir], engine=ScriptedEngine()) as server:
        with server.connect() as connection:
            body = b'{"model": "talker", "messages": [{"role": "user", "content": "a"}], "n": 2, "stream": %s}'
            body %= b"true" if stream else b"false"
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            submitted = server.engine.wait_for(2)
            if begun:
                submitted[0].read()
                submitted[0].say("once")
                if stream:
                    assert b"200 OK" in connection.recv(1000)
        assert all(each.cancelled.wait(5) for each in submitted)
        serving.until(lambda: server.guard.in_flight == 0)
        assert " POST /v1/chat/completions 499 " in server.log[0]
        assert 'elm_mlx_http_requests_total{status="499"} 1' in server.ask("/metrics")[2]


def test_a_batch_of_prompts_leaves_places_to_others(talker_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "IN_FLIGHT", 2)
    with serving.serving([talker_dir], engine=ScriptedEngine()) as server:
        found: list[Any] = []
        body = {"model": "talker", "prompt": ["a", "b", "c", "d", "e"]}
        asking = threading.Thread(target=lambda: found.append(server.ask("/v1/completions", body)))
        asking.start()
        for number in range(5):
            submitted = server.engine.wait_for(number + 1)[number]
            assert len(server.engine.submitted) <= number + 2
            submitted.read()
            submitted.say(f"{number}", "stop")
        asking.join(10)
        assert [choice["text"] for choice in found[0][2]["choices"]] == ["0", "1", "2", "3", "4"]


def test_more_answers_than_the_queue_takes_wait_for_each_other(talker_dir: Path) -> None:
    with serving.serving([talker_dir], max_rows=1, max_queue=2) as server:
        status, _, content = server.ask("/v1/chat/completions", QUESTION | {"n": 7})
        assert status == 200 and {each["message"]["content"] for each in content["choices"]} == {ANSWER}
        chunks = server.events("/v1/chat/completions", QUESTION | {"n": 5})
        assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in chunks[:-1]) == 5
