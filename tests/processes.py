"""The processes of a test: signals as a program started in the foreground has them, and nothing left running.

A parent that ignores a signal hands that on to its children: `nohup` does so with SIGHUP, and a shell with SIGINT and
SIGQUIT for what it starts in the background. Tests that send these would wait for ever.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker

from elm_mlx.inference import grammar_worker
from elm_mlx.problems import sandbox_worker
from elm_mlx.text import jinja_worker

STAYING = (jinja_worker, grammar_worker, sandbox_worker)

_ENDING = 5.0  # seconds that a process which is on its way out may take

_started = False  # whether any process has been started since the last look
_known: set[int] = set()


def reset_signals() -> None:
    """Lets the programs that tests start hear SIGINT, SIGQUIT, SIGTERM and SIGHUP, whatever this process ignores.

    What ignored SIGHUP goes on to outlive its terminal: it handles it by doing nothing, which its children do not
    inherit. So do pytest-xdist's workers, whose end is their parent's.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN or "PYTEST_XDIST_WORKER" in os.environ:
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    sys.addaudithook(_note_start)


def snapshot() -> set[int]:
    """The processes that this one and its children have started, and that are still there."""
    global _started, _known
    if _started:
        _known = set(_children())
        _started = False  # looking started one too
    return _known


def end_new(before: set[int]) -> list[str]:
    """Kills what has been started since the snapshot `before` and does not end by itself. Returns its commands."""
    if not _started:
        return []
    deadline = time.monotonic() + _ENDING
    while new := {pid: command for pid, command in _children().items() if pid not in before}:
        if time.monotonic() > deadline:
            for pid in new:
                os.kill(pid, signal.SIGKILL)
            return sorted(new.values())
        time.sleep(0.05)
    return []


def _note_start(event: str, arguments: tuple[object, ...]) -> None:
    global _started
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec"):
        _started = True


def _children() -> dict[int, str]:
    """Every living process below this one, and its command; not Python's own, and none of STAYING."""
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 3) for line in listed.stdout.splitlines()]
    parents = {int(pid): (int(parent), state, args) for pid, parent, state, args in (r for r in rows if len(r) == 4)}
    ours = {os.getpid()}
    while more := {pid for pid, (parent, *_) in parents.items() if parent in ours} - ours:
        ours |= more
    tracker = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    return {
        pid: args
        for pid, (parent, state, args) in parents.items()
        if pid in ours - {os.getpid(), tracker} and not state.startswith("Z") and not args.startswith("ps -A ")
        if not (parent == os.getpid() and any(module.__file__ in args for module in STAYING))
    }
