"""Functions that MLX compiles, freed by the thread that made them.

MLX frees a compiled function under a lock that the next call of any other takes, of the same thread. What is freed with
it may run Python's code, which lets go of the interpreter's lock; so where another thread's garbage collection frees
it, that thread waits for the interpreter, and the owner, which has it, for MLX's lock: both for ever. And where one
that is freed brings the end of another, a thread waits for itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import mlx.core as mx


class _Leavings(threading.local):
    """Of each thread, the functions that are to be freed by it."""

    def __init__(self) -> None:
        self.left: deque[Any] = deque()
        self._freeing = False

    def free(self) -> None:
        if not self._freeing:  # one after the other
            self._freeing = True
            try:
                while self.left:
                    self.left.popleft()
            finally:
                self._freeing = False


_here = _Leavings()


class Compiled:
    """`function` as `mx.compile` compiles it, to be called by the thread that makes it.

    Args:
        inputs, outputs: what it reads and changes beside its arguments, as `mx.compile` takes them.
    """

    def __init__(self, function: Callable[..., Any], inputs: Any = None, outputs: Any = None) -> None:
        self._left = _here.left
        self._compiled = mx.compile(function, inputs=inputs, outputs=outputs)

    def __call__(self, *arguments: Any) -> Any:
        _here.free()
        return self._compiled(*arguments)

    def __del__(self) -> None:
        self._left.append(vars(self).pop("_compiled", None))
        if self._left is _here.left:
            _here.free()
