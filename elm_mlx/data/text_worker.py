"""What a process that prepares data does: texts in, token ids out, through its standard input and output.

Knows filters and the tokenizer. Knows nothing of order, mixtures and batches, so that it doesn't matter which worker
is given what. Imports neither MLX nor NumPy: a worker starts fast and stays small.

A worker ends when its input does. That is so when its parent ends, too, however that ends.
"""

from __future__ import annotations

import os
import pickle
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elm_mlx.data import file_formats, filters, text_sources
from elm_mlx.data.file_formats import BadRecord
from elm_mlx.data.filters import Filters
from elm_mlx.errors import ElmError, InputError
from elm_mlx.text.tokenizer import Tokenizer

MAX_BYTES = 64 << 20  # of a document: more is a collection of them, and would take gigabytes to tokenize

Outcome = bytes | str | BadRecord  # ids as unsigned 32-bit numbers, or which filter left it out, or what is wrong


@dataclass(frozen=True)
class Encode:
    """To be encoded: lines of JSON, whose text is in field `key`, or texts."""

    contents: Sequence[bytes | str]
    key: str


@dataclass(frozen=True)
class Hash:
    """A file's documents to be hashed."""

    path: Path
    key: str
    separator: str | None


class Worker:
    """What the tasks are carried out by, in this process or in another."""

    def __init__(self, tokenizer: Path, kept: Filters) -> None:
        self._tokenizer, self._filters = Tokenizer.load(tokenizer), kept
        bos, self._eos = self._tokenizer.bos_id, self._tokenizer.eos_ids[:1]
        self._bos = [] if bos is None else [bos]

    def run(self, task: Encode | Hash) -> list[Outcome] | bytes:
        """Of each content its outcome; of a file what `_hashes` gives."""
        if isinstance(task, Hash):
            return _hashes(task)
        return [self._outcome(content, task.key) for content in task.contents]

    def _outcome(self, content: bytes | str, key: str) -> Outcome:
        try:
            text = content if isinstance(content, str) else text_sources.text_of(file_formats.parsed(content), key)
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
    """64 bits for each number of a document up to the file's last; 0 where there is none or it is not whole."""
    hashes = array("Q")
    for number, _, content in text_sources.documents(task.path, task.key, task.separator):
        try:
            text = content if isinstance(content, str) else None
            if isinstance(content, bytes):
                text = text_sources.text_of(file_formats.parsed(content), task.key)
        except BadRecord:
            text = None
        if text is not None:
            hashes.extend([0] * (number - len(hashes)))
            hashes.append(filters.text_hash(text))
    return hashes.tobytes()


def main() -> None:
    """Answer tasks until there are no more."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come among the answers
    tasks = sys.stdin.buffer
    try:
        worker = Worker(*pickle.load(tasks))
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
