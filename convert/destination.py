"""A model directory being written: room for it, its weights a few megabytes at a time, hashes of its source, and proof.

The proof reads both sides from disk and compares every value. It knows how far rounding may move a value, and uses
none of the casts that made the files.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from elm_mlx import safetensors_file
from elm_mlx.errors import ElmError
from elm_mlx.files import free_bytes
from elm_mlx.safetensors_file import SHARD_BYTES, Pending
from elm_mlx_convert import safetensors_files
from elm_mlx_convert.tensors import ITEM_SIZES, LazyTensor, cast_blocks, to_float32

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


def written_bytes(tensors: Sequence[LazyTensor], dtype: str) -> int:
    """What the tensors take in `dtype`."""
    return sum(tensor.size for tensor in tensors) * ITEM_SIZES[dtype]


def write_weights(
    directory: Path,
    tensors: Sequence[LazyTensor],
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Writes `tensors`, cast to `dtype`, as `model.safetensors`, or as shards and their index.

    Args:
        shard_bytes: no shard is larger, unless a single tensor is.
        progress: called with the number of bytes written since the last call.

    Returns:
        The names of tensors that hold NaN or infinite values in the source.

    Raises:
        InputError: a value overflows `dtype`; names the tensor.
        OSError: the system could not write.
    """
    not_finite: list[str] = []
    pending = [Pending(t.name, dtype, t.shape, partial(cast_blocks, t, dtype, not_finite)) for t in tensors]
    safetensors_file.write_shards(
        directory, pending, shard_bytes, parameters=sum(t.size for t in tensors), progress=progress
    )
    return not_finite


GROUPS = ("embedding", "attention", "ffn", "norms", "head")

# Half the distance between neighbours, as a share of the value, and of the smallest ones, absolute.
_ROUNDING = {"float32": (0.0, 0.0), "bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}


@dataclass
class Difference:
    """How far the tensors of a group are from their source.

    Args:
        largest: absolute; of the tensor called `where`.
        magnitude: the largest absolute value in the group.
    """

    group: str
    tensors: int = 0
    values: int = 0
    largest: float = 0.0
    where: str = ""
    magnitude: float = 0.0


def group_of(name: str) -> str:
    """Which of GROUPS the canonically named weight belongs to."""
    if name.endswith("norm.weight"):
        return "norms"
    if name.startswith("lm_head."):
        return "head"
    return "attention" if ".attn." in name else "ffn" if ".ffn." in name else "embedding"


def compare(
    tensors: Sequence[LazyTensor], directory: Path, dtype: str, progress: Callable[[int], None] = lambda count: None
) -> list[Difference]:
    """Compares every value of `tensors` with what `directory` holds, cast to `dtype`.

    Args:
        progress: called with the number of bytes read from `directory` since the last call.

    Returns:
        The largest difference of each group that there is, in the order of GROUPS.

    Raises:
        ElmError: names the tensor that is missing or further off than rounding explains.
    """
    written: dict[str, LazyTensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        written |= safetensors_files.read(file)
    _same_names(tensors, written, dtype)
    found = {group: Difference(group) for group in GROUPS}
    for tensor in tensors:
        difference = found[group_of(tensor.name)]
        difference.tensors += 1
        difference.values += tensor.size
        row = 0
        for block in tensor.blocks():
            copy = written[tensor.name].read_rows(row, row + len(block))
            row += len(block)
            _compare_block(tensor, block, copy, dtype, difference)
            progress(copy.nbytes)
    return [difference for difference in found.values() if difference.tensors]


def _same_names(tensors: Sequence[LazyTensor], written: Mapping[str, LazyTensor], dtype: str) -> None:
    for tensor in tensors:
        copy = written.get(tensor.name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, dtype):
            raise ElmError(f"verification failed: {tensor.name} was not written as {tensor.shape} in {dtype}")
    if len(written) != len(tensors):
        raise ElmError(f"verification failed: {len(written)} tensors were written for {len(tensors)}")


def _compare_block(tensor: LazyTensor, block: np.ndarray, copy: np.ndarray, dtype: str, found: Difference) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        before, after = to_float32(block, tensor.dtype), to_float32(copy, dtype)
        difference = np.abs(before - after)
        relative, absolute = _ROUNDING[dtype]
        magnitude = np.abs(before)
        wrong = difference > magnitude * np.float32(relative) + np.float32(absolute)
        if not np.isfinite(difference).all():  # not numbers on one side: then the same on the other
            odd = ~np.isfinite(difference)
            same = (before == after) | (np.isnan(before) & np.isnan(after))
            wrong |= odd & ~same
            difference[odd], magnitude[odd] = 0, 0
    if wrong.any():
        at = np.unravel_index(int(wrong.argmax()), wrong.shape)
        raise ElmError(
            f"verification failed: {tensor.name} holds {float(after[at]):.9g} where its source holds "
            f"{float(before[at]):.9g}, further off than rounding to {dtype}; nothing was kept"
        )
    if difference.size:
        found.magnitude = max(found.magnitude, float(magnitude.max()))
        if float(difference.max()) > found.largest or not found.where:
            found.largest, found.where = float(difference.max()), tensor.name
