"""The process that runs code which a model wrote, and is run as a file by itself.

It has no environment, and forks for each answer. Before the fork runs anything of the answer it gives up, for good,
all that a computation does not need:

- descriptors: it has one, a pipe to this process for its results, and its limit is 0, so that it gets no other;
- system calls, on Linux: a seccomp filter lets memory, clocks, random bytes, `write` and `exit` through, and refuses
  every other: files, sockets, processes, threads, signals, waiting. On macOS a sandbox profile refuses everything. Nor
  does a crash leave a core dump, which systems may hand to a program whatever the limit of its size;
- time and memory: the kernel ends it after `seconds` of computing and refuses more memory than `memory`. This process
  ends it after WAITING times as long by the clock, where it writes more than `written`, and on macOS, whose kernel
  limits no memory, where it has filled that.

So it does not matter what runs there, be it machine code by `ctypes`. Nothing in its memory is secret: it has the
inputs, and never the values that are expected; nor what other answers said or returned, which may be right where this
one is wrong: they pass through this process in buffers that are filled in place and wiped. What a fork writes is taken
for no more than bytes.

At its start this process has a fork try what it must not be able to do, and run a function, and writes a line of JSON:
`{"escapes", "values"}`, what it could do nevertheless and what it computed, or `{"failure"}`. Then it reads requests, a
size in `SIZED` bytes and an object: `source`, `function`, and `inputs`, a list of arguments for each call. It answers
by a line, `{"size", "ended"}`, and `size` bytes, which the fork has written: `{"values"}` or `{"failure"}`, if it is
honest. `ended` says what ended it before it wrote anything.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import io
import json
import os
import platform
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SIZED = 8  # bytes of a request's size, the highest first
WAITING = 5  # times the seconds of computing, by the clock, on a busy machine

# What ended a fork before it wrote results.
TIME, SPACE, TEXT, NOTHING = "time", "memory", "text", "nothing"

_LINUX = sys.platform == "linux"

_MODULES = (  # that an answer may import: the fork can open no file
    "abc bisect calendar cmath collections.abc copy dataclasses datetime decimal enum fractions functools heapq "
    "itertools math numbers operator queue re statistics string textwrap types typing unicodedata _strptime"
)
_POLL = 5  # milliseconds between looks at what the fork has filled
_REASON = 300  # characters of it

# From linux/seccomp.h, prctl.h and bpf_common.h. A program loads a word of the call (0: its number, 4: the processor's
# kind), compares it and returns a verdict.
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _SET_PARENT_DEATH_SIGNAL, _SET_DUMPABLE, _FILTER = 38, 22, 1, 4, 2
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000

# By machine, how the kernel names it (linux/audit.h), and its numbers of the calls that are let through (asm/unistd.h).
# No madvise, by which root takes pages from the machine.
_CALLS = {
    "x86_64": (0xC000003E, {
        "write": 1, "close": 3, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "exit": 60,
        "gettimeofday": 96, "clock_gettime": 228, "exit_group": 231, "getrandom": 318,
    }),
    "aarch64": (0xC00000B7, {
        "write": 64, "close": 57, "mmap": 222, "mprotect": 226, "munmap": 215, "brk": 214, "mremap": 216, "exit": 93,
        "gettimeofday": 169, "clock_gettime": 113, "exit_group": 94, "getrandom": 278,
    }),
}  # fmt: skip


def main() -> None:
    """Arguments: the limits SECONDS, MEMORY and WRITTEN."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for name in _MODULES.split():
        importlib.import_module(name)
    os.environ.clear()
    limits = Limits(float(sys.argv[1]), *map(int, sys.argv[2:]))
    gc.freeze()
    results = bytearray(limits.written + 1)
    filled, ended = _in_fork(limits, results, _tried)
    _write({"failure": ended} if ended else json.loads(results[:filled]))
    while size := int.from_bytes(os.read(0, SIZED), "big"):
        request = bytearray(size)
        arrived = 0
        while arrived < size:
            arrived += (came := os.readv(0, [memoryview(request)[arrived:]]))
            if not came:
                return
        filled, ended = _in_fork(limits, results, lambda: _outcome(**json.loads(request)))  # noqa: B023
        answer = memoryview(results)[: 0 if ended else filled]
        _write({"size": len(answer), "ended": ended})
        while answer:
            answer = answer[os.write(1, answer) :]
        request[:], results[:filled] = bytes(size), bytes(filled)


class Limits(NamedTuple):
    """What one answer may take: seconds of computing, and bytes of memory and of results."""

    seconds: float
    memory: int
    written: int


def _in_fork(limits: Limits, results: bytearray, work: Callable[[], dict[str, Any]]) -> tuple[int, str | None]:
    """Fills `results` with what a confined fork writes, the JSON of what `work` returns if it is honest.

    Returns the number of bytes, and what ended the fork: nothing where these are results.
    """
    arrivals, own = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                _confine(own, limits)
                data = json.dumps(work()).encode()
            except BaseException as error:
                data = json.dumps({"failure": f"{type(error).__name__}: {error}"[:_REASON]}).encode()
            while data:
                data = data[os.write(own, data) :]
        finally:
            os._exit(0)
    os.close(own)
    try:
        return _collected(arrivals, child, limits, results)
    finally:
        os.close(arrivals)


def _collected(arrivals: int, child: int, limits: Limits, results: bytearray) -> tuple[int, str | None]:
    """Reads into `results` what the fork writes until it ends or a limit is reached, and then ends it."""
    deadline = time.monotonic() + WAITING * limits.seconds
    look = select.poll()
    look.register(arrivals, select.POLLIN)
    look.register(0, 0)  # nothing but its end, which is that of who asked
    filled, ended = 0, None
    while ended is None:
        found = look.poll(1000 * max(0, deadline - time.monotonic()) if _LINUX else _POLL)
        if any(descriptor != arrivals for descriptor, _ in found) or time.monotonic() > deadline:
            ended = TIME
        elif found:
            came = os.readv(arrivals, [memoryview(results)[filled:]])
            filled += came
            if not came:
                break
            if filled > limits.written:
                ended = TEXT
        elif not _LINUX and _footprint(child) > limits.memory:
            ended = SPACE
    while not filled and ended is None:  # it ends of its own accord: why?
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return 0, TIME if code == -signal.SIGPROF else f"signal {-code}" if code < 0 else NOTHING
        time.sleep(0.0005)
        if time.monotonic() > deadline:
            ended = TIME
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return filled, ended


def _footprint(process: int) -> int:
    """Returns the bytes of memory that a process has filled, on macOS."""
    # libproc.h: RUSAGE_INFO_V0 is a UUID and ten figures, of which the eighth is ri_phys_footprint.
    figures = (ctypes.c_uint64 * 12)()
    return figures[9] if ctypes.CDLL(None).proc_pid_rusage(process, 0, ctypes.byref(figures)) == 0 else 0


def _confine(results: int, limits: Limits) -> None:
    """Leaves this process nothing but computing and the descriptor `results`. Raises OSError where that fails."""
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(0, results)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if _LINUX else 0
    os.closerange(results + 1, highest if 0 < highest < 1 << 20 else 1 << 20)
    if _LINUX:
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        memory = used + limits.memory if most == resource.RLIM_INFINITY else min(most, used + limits.memory)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    else:
        _apply_profile()  # which may need a descriptor
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(kind, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    if _LINUX:
        _filter_calls()


def _filter_of(machine: str) -> list[tuple[int, int, int, int]]:
    """Returns the seccomp filter of a machine as instructions: code, steps if true, steps if false, operand."""
    kind, calls = _CALLS[machine]
    checks = [(_IF_EQUAL, len(calls) - i, 0, number) for i, number in enumerate(calls.values())]
    return [
        (_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, kind), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0), *checks, (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW),
    ]  # fmt: skip


def _filter_calls() -> None:
    program = _filter_of(platform.machine())
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    filter_of_calls = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    for option, *values in (
        (_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0),
        (_SET_DUMPABLE, 0, 0),
        (_SET_NO_NEW_PRIVILEGES, 1, 0),
        (_SET_SECCOMP, _FILTER, ctypes.addressof(filter_of_calls)),
    ):
        if prctl(option, *values, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl fails")


def _apply_profile() -> None:
    reason = ctypes.c_char_p()
    if ctypes.CDLL("/usr/lib/libSystem.dylib").sandbox_init(b"(version 1)(deny default)", 0, ctypes.byref(reason)):
        raise OSError(errno.EPERM, "sandbox_init fails")


def _tried() -> dict[str, Any]:
    """Returns `escapes`, what a confined process can do nevertheless, and the values of a function that it runs."""
    attempts: dict[str, Callable[[], object]] = {
        "reading files": lambda: os.open("/", os.O_RDONLY),
        "looking at files": Path("/").stat,
        "removing files": Path("/no such file").unlink,
        "making files": Path("/no such folder/of it").mkdir,
        "sockets": socket.socket,
        "processes": lambda: os.fork() or os._exit(0),
        "programs": lambda: os.execv("/no such program", ["/no such program"]),
        "signals": lambda: os.kill(os.getppid(), 0),
    }
    found = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES, errno.EMFILE):
                continue
        found.append(name)
    return {"escapes": found, **_outcome("def f(x): return x + 1", "f", [[1]])}


def _outcome(source: str, function: str, inputs: list[list[Any]]) -> dict[str, Any]:
    """Returns `values`, what the function returns for each input. Raises whatever the source raises."""
    random.seed(0)
    nowhere = _Nowhere()
    sys.stdout, sys.stderr, sys.stdin = nowhere, nowhere, io.StringIO()
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    exec(compile(source, "answer", "exec", dont_inherit=True), module.__dict__)  # else our __future__ is the answer's
    called = getattr(module, function)
    return {"values": [_plain(called(*each)) for each in inputs]}


class _Nowhere(io.TextIOBase):
    """Where an answer prints to."""

    def write(self, text: str) -> int:
        return len(text)


def _plain(value: Any) -> Any:
    """Returns a value of JSON's kinds, a tuple as a list. Raises TypeError for any other."""
    if type(value) in (list, tuple):
        return [_plain(each) for each in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(each) for key, each in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"it returns {type(value).__name__}")


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
