"""A directory about to be written: whether it fits, and what it was made of.

Knows free space, and SHA-256 taken in the background. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from elm_mlx.errors import ElmError
from elm_mlx.files import free_bytes

# Config, tokenizer and record of the largest vocabulary, with room to spare.
_OTHER_BYTES = 16 << 20


def check_room(path: Path, nbytes: int) -> None:
    """Raises ElmError where weights of `nbytes`, and what goes with them, do not fit."""
    needed, free = nbytes + _OTHER_BYTES, free_bytes(path)
    if needed > free:
        raise ElmError(f"{path}: needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there")


@contextmanager
def hashing(files: Iterable[Path]) -> Iterator[Callable[[], dict[Path, str]]]:
    """Takes the files' SHA-256 in the background; what it yields waits for them, by file."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        try:
            futures = {file: pool.submit(sha256, file, stop) for file in files}
            yield lambda: {file: future.result() for file, future in futures.items()}
        finally:
            stop.set()


def sha256(file: Path, stop: threading.Event | None = None) -> str:
    """Of a file's bytes, in hexadecimal; of half of them once `stop` is set."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 16)  # stays in the cache: a third faster than 1 MB
    with file.open("rb", buffering=0) as stream:
        while (count := stream.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
