"""Worker processes: they answer, they import little, and none outlives its parent or speaks out of turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import texts

from elm_mlx.data.filters import Filters
from elm_mlx.data.workers import Encode, Pool
from elm_mlx.errors import ElmError

PARENT = """
import sys, time
from itertools import islice
from pathlib import Path
sys.path[:0] = {paths}
import texts
batches = texts.made([Path({path!r})], Path({tokenizer!r}), workers=2)
next(batches)
try:
    print(*(worker._process.pid for worker in batches._pool._processes), flush=True)
    while True:
        next(batches)
        time.sleep(0.001)
except KeyboardInterrupt:
    batches.close()
    print("closed", flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def start(tmp_path: Path, tokenizer: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A process with two workers in a group of its own, and the workers' ids."""
    tests = Path(__file__).parents[1]
    program = PARENT.format(
        paths=[str(tests)],
        path=str(texts.write(tmp_path / "a.jsonl", texts.texts(300))),
        tokenizer=str(tokenizer),
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )  # fmt: skip
    assert parent.stdout is not None
    return parent, [int(pid) for pid in parent.stdout.readline().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="starts a process group")
class TestTheEnd:
    def test_no_worker_outlives_a_parent_that_is_killed(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        parent, workers = start(tmp_path, tiny_tokenizer_file)
        assert len(workers) == 2 and all(map(alive, workers))
        parent.kill()
        _, errors = parent.communicate(timeout=20)
        assert wait_until_gone(workers) and errors == ""

    def test_ctrl_c_is_quiet(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        parent, workers = start(tmp_path, tiny_tokenizer_file)
        os.killpg(parent.pid, signal.SIGINT)
        output, errors = parent.communicate(timeout=20)
        assert (output, errors, parent.returncode) == ("closed\n", "", 0) and wait_until_gone(workers)

    def test_a_worker_that_is_killed(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        path = texts.write(tmp_path / "a.jsonl", texts.texts(300))
        with texts.made([path], tiny_tokenizer_file, workers=1) as batches:
            next(batches)
            (worker,) = batches._pool._processes
            worker._process.kill()
            message = "a process that prepares data was killed by signal 9; memory may have run out"
            with pytest.raises(ElmError, match=message):
                for _ in range(100_000):
                    next(batches)

    def test_closing_ends_them_whatever_they_are_at(self, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
        pool = Pool(2, tiny_tokenizer_file, Filters())
        for _ in range(9):
            pool.submit(Encode(["word " * 200_000], "text"))
        pids = [process._process.pid for process in pool._processes]
        started = time.monotonic()
        pool.close()
        assert time.monotonic() - started < 5 and not any(map(alive, pids))
        pool.close()


def test_a_worker_imports_neither_mlx_nor_numpy() -> None:
    program = (
        "import elm_mlx.data.workers, sys; print({'mlx.core', 'numpy', 'elm_mlx.model.network'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_error_in_a_worker_is_told(tiny_tokenizer_file: Path) -> None:
    pool = Pool(1, tiny_tokenizer_file, Filters())
    try:
        with pytest.raises(RuntimeError, match="AttributeError: "):
            pool.submit(Encode([3], "text")).result()  # type: ignore[list-item]
        assert pool.submit(Encode(["short"], "text")).result() == ["short"]  # and it goes on
    finally:
        pool.close()
