"""Workers: processes that are given tasks and answer in any order; or none, and the work is done where it is asked for.

Knows how they are started, talked to and ended. Knows nothing of what the tasks are.

A worker is a plain child process behind two pipes, and not one of `multiprocessing`'s: those run the caller's main
module again, and outlive a parent that is killed. Each has a thread here that waits for its answers. It is in a session
of its own, where Ctrl-C in the terminal doesn't reach it: it ends by its input.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from elm_mlx.data.filters import Filters
from elm_mlx.data.text_worker import Encode, Hash, Worker
from elm_mlx.errors import ElmError

_START = "import sys; sys.path[:] = sys.argv[1:]; from elm_mlx.data import text_worker; text_worker.main()"


class Answer(Protocol):
    """What will have been asked for."""

    def done(self) -> bool: ...
    def result(self) -> Any: ...


class Pool:
    """`workers` processes, 0 for none. To be closed, which ends them at once.

    Attributes:
        workers: as given.
    """

    def __init__(self, workers: int, tokenizer: Path, kept: Filters) -> None:
        self.workers = workers
        self._local = Worker(tokenizer, kept) if workers == 0 else None
        self._processes: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for _ in range(workers):
            process = _Process(pickle.dumps((tokenizer, kept)))
            self._processes.append(process)
            self._idle.put(process)
        # A thread for each worker, and one that reads files.
        self._threads = ThreadPoolExecutor(max(1, workers), "elm-mlx data")
        self._reader = ThreadPoolExecutor(1, "elm-mlx reading")

    def submit(self, task: Encode | Hash) -> Answer:
        """The task's answer. Its `result()` raises ElmError where the worker came to its end."""
        if self._local is not None:
            local = self._local
            return _Later(lambda: local.run(task))
        return self._threads.submit(self._asked, task)

    def read(self, work: Callable[[], Any]) -> Answer:
        """`work()`, one after the other in the order of these calls, beside what the caller does."""
        return _Later(work) if self._local is not None else self._reader.submit(work)

    def close(self) -> None:
        """End the workers, whatever they are at. May be called again."""
        self._reader.shutdown(wait=False, cancel_futures=True)  # it may wait for a server
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.close()

    def _asked(self, task: Encode | Hash) -> Any:
        process = self._idle.get()
        try:
            return process.ask(task)
        finally:
            self._idle.put(process)


class _Later:
    """Work that is done when its result is asked for, once."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._future = work, Future[Any]()

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> Any:
        if not self._future.done():
            self._future.set_result(self._work())
        return self._future.result()


class _Process:
    """A worker, from outside."""

    def __init__(self, greeting: bytes) -> None:
        command = [sys.executable, "-c", _START, *sys.path]
        # The package's BLAS is of no use there.
        environment = os.environ | {"ELM_MLX_BLAS": "off"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._tasks, self._results = self._process.stdin, self._process.stdout
        self._tasks.write(greeting)
        self._tasks.flush()

    def ask(self, task: Encode | Hash) -> Any:
        try:
            pickle.dump(task, self._tasks, pickle.HIGHEST_PROTOCOL)
            self._tasks.flush()
            answer = pickle.load(self._results)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            hint = "; memory may have run out: fewer workers need less" if code == -9 else ""
            raise ElmError(f"a process that prepares data {how}{hint}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.wait()
        for pipe in (self._tasks, self._results):
            with suppress(OSError):  # of what was left to be written
                pipe.close()
