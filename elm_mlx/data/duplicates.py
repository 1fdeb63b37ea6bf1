"""Documents that repeat an earlier one's text, found once, before any is read for training.

Of equal texts the first is kept: by the order of sources in the mixture, of files by name, of documents in a file.
That is a property of the data alone, so that no seed, epoch, number of processes or resumed run changes it, and no
process needs to remember what it, or another, has seen. The price is that every file is read and hashed before the
first run, at many times the speed of training; a file's hashes are then kept in the user's cache, 8 bytes a document,
until its size or time of change is another. Hashes have 64 bits: among a hundred million documents, chance takes one
for another with a probability of 1 in 3,700.

Finding them takes some 40 bytes a document while it goes on, and 1 byte a document afterwards. Streamed data sets are
not looked at: nobody could say which of their documents is the first without downloading all of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from elm_mlx import files
from elm_mlx.data.text_sources import TextFiles
from elm_mlx.data.workers import Hash, Pool
from elm_mlx.errors import ElmError

_FORMAT = 1  # of what is cached, and of how texts are hashed

Marks = list[npt.NDArray[np.bool_]]  # of each file, by the document's number, whether to leave it out


def find(sources: Sequence[TextFiles], pool: Pool, cache: Path | None) -> list[Marks]:
    """Returns the marks of each source's files.

    Args:
        cache: a directory for hashes; None to keep none.
    """
    tasks = [Hash(path, each.source.key, each.source.separator) for each in sources for path in each.paths]
    cached = [_cached(task, cache) for task in tasks]
    answers = [None if path and path.exists() else pool.submit(task) for path, task in zip(cached, tasks, strict=True)]
    hashes = []
    for path, answer in zip(cached, answers, strict=True):
        data = answer.result() if answer else path.read_bytes() if path else b""
        hashes.append(np.frombuffer(data, np.uint64))
        if answer and path:
            _keep(path, data)
    marks = iter(_repeated(hashes))
    return [[next(marks) for _ in each.paths] for each in sources]


def default_cache() -> Path | None:
    """Returns the directory that keeps hashes by default."""
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "elm-mlx", "hashes")
    except RuntimeError:  # no home
        return None
    return path if path.is_absolute() else None


def _repeated(hashes: list[npt.NDArray[np.uint64]]) -> Marks:
    """Marks the numbers of each array that stood before, in it or in those before it; 0 never counts."""
    every = np.concatenate([*hashes, np.empty(0, np.uint64)])
    marks = every != 0
    marks[np.unique(every, return_index=True)[1]] = False
    return np.split(marks, np.cumsum([len(each) for each in hashes]))[:-1]


def _cached(task: Hash, cache: Path | None) -> Path | None:
    if cache is None:
        return None
    status = task.path.stat()
    parts = (_FORMAT, str(task.path.resolve()), status.st_size, status.st_mtime_ns, task.key, task.separator)
    return cache / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.u64"


def _keep(path: Path, data: bytes) -> None:
    with suppress(ElmError, OSError):  # read-only, full: the next run hashes again
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.new_file(path) as file:
            file.write(data)
