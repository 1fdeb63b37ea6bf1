"""Compiled functions are freed by their own thread: else two threads, or one, would wait for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from typing import Any

import mlx.core as mx

from elm_mlx.model.compiled import Compiled

# What is freed with `function` runs Python's code that lets other threads go on.
PROGRAM = """
import gc, threading, time, weakref
import elm_mlx
import mlx.core as mx
from elm_mlx.model.compiled import Compiled

freed = []

class Held:
    pass

def holding(free):
    def function(x):
        held = Held()
        weakref.finalize(held, free)

        @mx.custom_function
        def double(x):
            return x * 2

        @double.vjp
        def back(primals, cotangent, outputs, held=held):
            return cotangent * 2

        return double(x)

    made = Compiled(function)
    mx.eval(made(mx.ones(3)))
    return made

other = Compiled(lambda x: x + 1)
mx.eval(other(mx.ones(3)))

def free():
    time.sleep(0.2)
    freed.append(threading.current_thread() is threading.main_thread())
"""

ANOTHER_THREAD = """
garbage = [holding(free)]
garbage.append(garbage)
del garbage
collecting = threading.Thread(target=gc.collect)
collecting.start()
time.sleep(0.1)
print(other(mx.ones(3)).tolist())
collecting.join()
print(freed)
"""

ONE_BRINGS_ANOTHERS_END = """
last = [holding(free)]
first = holding(last.clear)
del first
print(other(mx.ones(3)).tolist())
print(freed)
"""


def said(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM + program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_another_thread_collects_is_freed_by_its_own() -> None:
    assert said(ANOTHER_THREAD) == ["[2.0, 2.0, 2.0]", "[True]"]


def test_one_that_brings_anothers_end() -> None:
    assert said(ONE_BRINGS_ANOTHERS_END) == ["[2.0, 2.0, 2.0]", "[True]"]


def test_what_is_read_and_changed_beside_the_arguments() -> None:
    state = [mx.array(1.0)]

    def count(x: mx.array) -> mx.array:
        state[0] = state[0] + 1
        return x + state[0]

    counting = Compiled(count, inputs=state, outputs=state)
    assert [counting(mx.array(10.0)).item() for _ in range(3)] == [12.0, 13.0, 14.0]


def test_it_is_freed_at_once_by_its_own_thread_and_with_it() -> None:
    def made() -> tuple[Any, weakref.ref[Any]]:
        function = lambda x: x + 1  # noqa: E731
        compiled = Compiled(function)
        mx.eval(compiled(mx.array(1.0)))
        return compiled, weakref.ref(function)

    compiled, function = made()
    assert function() is not None
    del compiled
    assert function() is None

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(made()))
    thread.start()
    thread.join()
    function = found.pop()
    assert function() is not None
    found.clear()
    assert function() is None


def test_one_that_cannot_be_made_leaves_nothing() -> None:
    for _ in range(2):
        try:
            Compiled(3)  # type: ignore[arg-type]
        except TypeError:
            pass
        else:
            raise AssertionError
