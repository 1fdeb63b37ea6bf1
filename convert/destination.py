"""A directory about to be written: whether it may take its name, whether it fits, and what it was made of.

Knows what `--overwrite` may replace, free space, and SHA-256 taken in the background. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from elm_mlx.errors import ElmError, InputError
from elm_mlx.files import free_bytes
from elm_mlx_convert.names import listed
from elm_mlx_convert.writer import foreign_entries

# Config, tokenizer and record of the largest vocabulary, with room to spare.
_OTHER_BYTES = 16 << 20


def check_destination(path: Path, overwrite: bool) -> None:
    """Refuses to replace what is not plainly a model directory."""
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: is a file, and a directory is to be written")
    if not overwrite:
        raise InputError(f"{path}: exists already; pass --overwrite to replace it, or choose another")
    foreign = foreign_entries(path)
    if foreign:
        raise InputError(
            f"{path}: is no model directory, or more than one: it holds {listed(foreign)}; nothing was replaced"
        )


def check_apart(files: Iterable[Path], path: Path) -> None:
    """Refuses a destination that a source itself lies in: its own conversion would replace it."""
    real = Path(os.path.realpath(path))  # unlike resolve(), no exception for a loop of links
    for file in files:
        if real in (file.absolute().parent, *file.resolve().parents):
            raise InputError(f"{path}: holds the source, {file.name}: choose another directory")


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
