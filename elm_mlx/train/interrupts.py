"""Ctrl-C and SIGTERM as a wish to end, which a run grants when it has something to go on from.

Knows signals, and nothing of what is interrupted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests(on_stop: Callable[[], None]) -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set. A second Ctrl-C interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        event.set()
        on_stop()
        signal.signal(number, kept[signal.Signals(number)])

    for number in kept:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
