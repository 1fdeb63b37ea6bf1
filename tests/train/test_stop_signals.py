"""Wishes to end: which signals are one, when a second one is another, and that the first is answered at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from elm_mlx.train import stop_signals
from elm_mlx.train.stop_signals import stop_requests

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Usual(Exception):
    """What a signal does as usual."""


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        raise Usual

    kept = {number: signal.signal(number, handle) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish_and_afterwards_what_it_was(number: signal.Signals) -> None:
    told = threading.Event()
    with stop_requests(told.set) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set() and told.wait(60)
    with pytest.raises(Usual):
        os.kill(os.getpid(), number)


def test_two_of_a_kind_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `timeout` sends them: one to its child, one to the group."""
    monkeypatch.setattr(stop_signals, "_ECHO", 3600.0)
    told: list[bool] = []
    with stop_requests(lambda: told.append(True)) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.is_set()
    assert told == [True]


def test_a_later_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "_ECHO", -1.0)
    with pytest.raises(Usual), stop_requests(lambda: None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(600):  # the waiting itself is interrupted
            time.sleep(0.1)
        raise AssertionError("it was not heard")
    assert stop.is_set()


def test_the_answer_does_not_wait_for_what_is_computed() -> None:
    """The main thread runs no Python until it was answered: it waits in C, as for MLX."""
    code = (
        "import os, signal\n"
        "from elm_mlx.train.stop_signals import stop_requests\n"
        "with stop_requests(lambda: os.write(1, b'answered')):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # nothing wakes this thread\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(input())\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.read(8) == b"answered"
        process.stdin.write(b"on\n")
        process.stdin.close()
        assert process.stdout.read() == b"on\n" and process.wait() == 0


def test_what_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with stop_requests(lambda: None) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()


def test_another_thread_hears_none() -> None:
    found = []

    def work() -> None:
        with stop_requests(lambda: None) as stop:
            found.append(stop.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    with pytest.raises(Usual):
        os.kill(os.getpid(), signal.SIGTERM)
