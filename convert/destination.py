"""A directory that is being made: room for it, its weights in bounded memory, hashes of its sources, and proof.

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
from typing import Any

import numpy as np

from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import ElmError
from elm_mlx.files import check_room, new_directory
from elm_mlx.safetensors_file import SHARD_BYTES, Pending, write_shards
from elm_mlx_convert.tensors import LazyTensor, cast_blocks, read_safetensors, to_float32

Hashes = Callable[[], dict[Path, str]]


@contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Raises what the system refuses in the block as an ElmError about `path`."""
    try:
        yield
    except BrokenPipeError:  # of whoever reads what the command prints
        raise
    except OSError as error:
        raise ElmError(f"{path}: was not made: {error.filename or 'input or output'}: {error.strerror}") from None


@contextmanager
def new_hashed_directory(
    path: Path, sources: Iterable[Path], nbytes: int, *, overwrite: bool
) -> Iterator[tuple[Path, Hashes]]:
    """Yields a directory that becomes `path` when the block ends, and a function that gives its sources' SHA-256.

    The sources are read in the background.

    Args:
        nbytes: of the weights that are to be written.

    Raises:
        ElmError: they, and what goes with them, do not fit; or as `files.new_directory`.
    """
    check_room(path, nbytes)
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        try:
            futures = {file: pool.submit(sha256, file, stop) for file in sources}
            with new_directory(path, replace=overwrite) as directory:
                yield directory, lambda: {file: future.result() for file, future in futures.items()}
        finally:
            stop.set()


def sha256(file: Path, stop: threading.Event | None = None) -> str:
    """Returns the hash of a file's bytes in hexadecimal, or of some of them once `stop` is set."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 16)  # stays in the cache: a third faster than 1 MB
    with file.open("rb", buffering=0) as stream:
        while (count := stream.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def file_record(files: Iterable[Path], hashes: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Returns what `conversion.json` says of source files."""
    return [{"name": file.name, "bytes": file.stat().st_size, "sha256": hashes[file]} for file in files]


def progress_of(on_progress: OnProgress, what: str, total: int) -> Callable[[int], None]:
    """Returns a function to call with the number of bytes done since its last call."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        on_progress(what, done, total)

    return add


def write_weights(
    directory: Path,
    tensors: Sequence[LazyTensor],
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress = no_progress,
) -> list[str]:
    """Writes `tensors`, cast to `dtype`, as `model.safetensors`, or as shards and their index.

    Args:
        shard_bytes: no shard is larger, unless a single tensor is.
        on_progress: called with "write" and bytes.

    Returns:
        The names of tensors that hold NaN or infinite values in the source.

    Raises:
        InputError: a value overflows `dtype`; names the tensor.
        OSError: the system could not write.
    """
    not_finite: list[str] = []
    pending = [Pending(t.name, dtype, t.shape, partial(cast_blocks, t, dtype, not_finite)) for t in tensors]
    progress = progress_of(on_progress, "write", sum(tensor.nbytes for tensor in pending))
    write_shards(directory, pending, shard_bytes, parameters=sum(t.size for t in tensors), progress=progress)
    return not_finite


GROUPS = ("embedding", "attention", "ffn", "norms", "head")

# Half the distance between neighbours, as a share of the value, and of the smallest ones, absolute.
ROUNDING = {"float32": (0.0, 0.0), "bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}


@dataclass
class Difference:
    """The distance of a group's tensors from their source.

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
    """Returns the one of GROUPS that a weight belongs to, by its canonical name or that of another family's."""
    if name.endswith("norm.weight"):
        return "norms"
    if name.startswith("lm_head."):
        return "head"
    return "attention" if "attn." in name else "ffn" if ".ffn." in name or ".mlp." in name else "embedding"


def compare(
    tensors: Sequence[LazyTensor], directory: Path, dtype: str, on_progress: OnProgress = no_progress
) -> list[Difference]:
    """Compares every value of `tensors` with what `directory` holds, cast to `dtype`.

    Args:
        on_progress: called with "verify" and bytes of `directory`.

    Returns:
        The largest difference of each group that there is, in the order of GROUPS.

    Raises:
        ElmError: names the tensor that is missing or further off than rounding explains.
    """
    written: dict[str, LazyTensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        written |= read_safetensors(file)
    for tensor in tensors:
        copy = written.get(tensor.name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, dtype):
            raise ElmError(f"verification failed: {tensor.name} was not written as {tensor.shape} in {dtype}")
    if len(written) != len(tensors):
        raise ElmError(f"verification failed: {len(written)} tensors were written for {len(tensors)}")
    progress = progress_of(on_progress, "verify", sum(tensor.nbytes for tensor in written.values()))
    found = {group: Difference(group) for group in GROUPS}
    for tensor in tensors:
        difference = found[group_of(tensor.name)]
        difference.tensors += 1
        difference.values += tensor.size
        row = 0
        for block in tensor.blocks():
            values = written[tensor.name].read_rows(row, row + len(block))
            row += len(block)
            _compare_block(tensor, block, values, dtype, difference)
            progress(values.nbytes)
    return differences(found)


def differences(found: Mapping[str, Difference]) -> list[Difference]:
    """Returns the differences that there are, in the order of GROUPS."""
    return [found[group] for group in GROUPS if group in found and found[group].tensors]


def _compare_block(tensor: LazyTensor, block: np.ndarray, copy: np.ndarray, dtype: str, found: Difference) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        before, after = to_float32(block, tensor.dtype), to_float32(copy, dtype)
        difference = np.abs(before - after)
        relative, absolute = ROUNDING[dtype]
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
