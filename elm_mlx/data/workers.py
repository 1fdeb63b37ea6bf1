"""Worker processes that make token ids of texts; or none, and the work is done where it is asked for.

A worker is a plain child process behind two pipes, and not one of `multiprocessing`'s: those run the caller's main
module again, and outlive a parent that is killed. Each has a thread here that waits for its answers. It is in a session
of its own, where Ctrl-C in the terminal doesn't reach it: it ends with its input, and so with its parent.

A worker imports this module, and with it neither MLX nor NumPy: it starts fast and stays small.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elm_mlx.data import filters, text_sources
from elm_mlx.data.bad_record import BadRecord, text_of
from elm_mlx.data.data_files import parse_line
from elm_mlx.data.filters import Filters
from elm_mlx.errors import ElmError, InputError
from elm_mlx.text import child_process
from elm_mlx.text.tokenizer import Tokenizer

MAX_BYTES = 64 << 20  # of a document: more is a collection of them, and would take gigabytes to tokenize
_START = "import sys; sys.path[:] = sys.argv[1:]; from elm_mlx.data import workers; workers.main()"

Outcome = bytes | str | BadRecord  # ids as unsigned 32-bit numbers, or which filter left it out, or what is wrong


@dataclass(frozen=True)
class Encode:
    """A task: encode lines of JSON, whose text is in field `key`, or texts. The answer is an Outcome for each."""

    contents: Sequence[bytes | str]
    key: str


@dataclass(frozen=True)
class Hash:
    """A task: hash a file's documents.

    The answer has 64 bits for each number of a document up to the file's last; 0 where there is none or it is bad.
    """

    path: Path
    key: str
    separator: str | None


class TextWorker:
    """Runs tasks, in this process or in a worker's."""

    def __init__(self, tokenizer: Path, kept: Filters) -> None:
        self._tokenizer, self._filters = Tokenizer.load(tokenizer), kept
        bos, self._eos = self._tokenizer.bos_id, self._tokenizer.eos_ids[:1]
        self._bos = [] if bos is None else [bos]

    def run(self, task: Encode | Hash) -> list[Outcome] | bytes:
        """Returns the task's answer."""
        if isinstance(task, Hash):
            return _hashes(task)
        return [self._outcome(content, task.key) for content in task.contents]

    def _outcome(self, content: bytes | str, key: str) -> Outcome:
        try:
            text = content if isinstance(content, str) else text_of(parse_line(content), key)
            if len(text) > MAX_BYTES:
                raise BadRecord(f"is a document of {len(text) >> 20:,} MB, above {MAX_BYTES >> 20}: split it")
            text = self._filters.normalized(text)
            objection = self._filters.objection(text)
            if objection is not None:
                return objection
            ids = self._tokenizer.encode(text, add_bos=False)
        except BadRecord as error:
            return error
        except InputError as error:
            return BadRecord(str(error))
        if len(ids) < self._filters.min_tokens:
            return filters.FEW_TOKENS
        return array("I", [*self._bos, *ids, *self._eos]).tobytes()


def _hashes(task: Hash) -> bytes:
    hashes = array("Q")
    for number, _, content in text_sources.documents(task.path, task.key, task.separator):
        with suppress(BadRecord):
            text = text_of(parse_line(content), task.key) if isinstance(content, bytes) else content
            if isinstance(text, str):
                hashes.extend([0] * (number - len(hashes)))
                hashes.append(filters.text_hash(text))
    return hashes.tobytes()


def main() -> None:
    """Runs in a worker: answers tasks until there are no more."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come among the answers
    tasks = sys.stdin.buffer
    try:
        worker = TextWorker(*pickle.load(tasks))
        while True:
            task = pickle.load(tasks)
            try:
                answer: object = worker.run(task)
            except Exception as error:
                answer = error if isinstance(error, ElmError) else RuntimeError(f"{type(error).__name__}: {error}")
            pickle.dump(answer, results, pickle.HIGHEST_PROTOCOL)
            results.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent is gone, or has no more to do
        os._exit(0)  # without flushing what nobody reads


class Pool:
    """`workers` processes, 0 for none. `close` ends them at once."""

    def __init__(self, workers: int, tokenizer: Path, kept: Filters) -> None:
        self.workers = workers
        self._local = TextWorker(tokenizer, kept) if workers == 0 else None
        self._processes: list[_Child] = []
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for _ in range(workers):
            process = _Child(pickle.dumps((tokenizer, kept)))
            self._processes.append(process)
            self._idle.put(process)
        # A thread for each worker, and one that reads files.
        self._threads = ThreadPoolExecutor(max(1, workers), "elm-mlx data")
        self._reader = ThreadPoolExecutor(1, "elm-mlx reading")

    def submit(self, task: Encode | Hash) -> Future[Any]:
        """Returns the future answer. Its `result()` raises ElmError where the worker came to its end."""
        return self._threads.submit(self._ask, task) if self._local is None else _done(self._local.run(task))

    def read(self, work: Callable[[], Any]) -> Future[Any]:
        """Runs `work()`, one after the other in the order of these calls, beside what the caller does."""
        return self._reader.submit(work) if self._local is None else _done(work())

    def close(self) -> None:
        """Ends the workers, whatever they are at. May be called again."""
        self._reader.shutdown(wait=False, cancel_futures=True)  # it may wait for a server
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.close()

    def _ask(self, task: Encode | Hash) -> Any:
        process = self._idle.get()
        try:
            return process.ask(task)
        finally:
            self._idle.put(process)


def _done(result: Any) -> Future[Any]:
    future = Future[Any]()
    future.set_result(result)
    return future


class _Child:
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
        child_process.end(self._process)
