"""Signals that ask a run to end, such as Ctrl-C, as an event that it looks at between two updates."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

_ECHO = 1.0  # seconds in which another signal of a kind is the same wish: `timeout` sends one to us, one to our group
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_requests(on_stop: Callable[[], None]) -> Iterator[Event]:
    """An event that Ctrl-C, SIGTERM and SIGHUP set. A second of the same kind, after a second, does as usual.

    Python's own handlers have to wait until MLX has computed what it is at, which can take long: so `on_stop` is
    called from a thread. What is ignored, as SIGHUP is under nohup, stays so.
    """
    event, again, main = Event(), set[int](), threading.get_ident()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        event.set()
        if number in again:
            signal.signal(number, kept[signal.Signals(number)])
            signal.raise_signal(number)

    def listen() -> None:
        first: dict[int, float] = {}
        while number := os.read(reader, 1)[0]:
            if number not in kept:
                continue
            now = time.monotonic()
            if not first:
                on_stop()
            if now - first.setdefault(number, now) > _ECHO and number not in again:
                again.add(number)
                signal.pthread_kill(main, number)  # so that `handle` runs, even where it was waiting for something

    kept = {number: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listener = threading.Thread(target=listen, name="elm-mlx signals", daemon=True)
    listener.start()
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in kept:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.write(writer, b"\0")  # no signal has this number
        listener.join()
        os.close(reader)
        os.close(writer)
