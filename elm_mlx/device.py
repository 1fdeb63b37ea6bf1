"""Every decision that depends on what MLX computes on: a GPU (Metal, CUDA) or a CPU.

Knows nothing of models. Whoever needs such a decision asks here, so that both answers can be
tested on one machine by replacing `on_gpu`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import resource
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from elm_mlx import blas
from elm_mlx.errors import InputError

_WORKING_SET = "max_recommended_working_set_size"  # of Metal: what all buffers should take at most
_LARGE, _FULL = 0.5, 0.8  # of it: a model that is worth wiring; when freed buffers are given back
_WIRED_MARGIN = 2 << 30  # for what a model computes
_GRADIENT_BYTES = 1 << 28  # what all parts' gradients may take; where they'd take more, products are most of a step
_ARENAS, _MMAP_FROM, _TRIM_FROM = -8, -3, -1  # mallopt's names for them, in glibc
_RUSAGE_INFO_V4, _LIFETIME_MAX_PHYS_FOOTPRINT = 4, 2 + 28  # its place in the struct, in words

DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def on_gpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.gpu))


@dataclass(frozen=True)
class Computation:
    """The type to compute in, with a note to the user, if any.

    Attributes:
        as_stored: float32 is multiplied by weights as they are stored, in 16 bits or quantized.
        rounds: many rows, as a prompt has, are rounded to the weights' bfloat16 for that.
        unpack: quantized weights are expanded at load.
    """

    dtype: mx.Dtype
    as_stored: bool = False
    rounds: bool = False
    unpack: bool = False
    note: str | None = None


def computation(
    stored: mx.Dtype,
    parameters: int,
    packed: bool = False,
    requested: str | None = None,
    readable_bytes: int | None = None,
) -> Computation:
    """Returns the type to compute in for weights as they are stored.

    A GPU has 16-bit units. MLX's CPU loops for 16-bit and quantized weights are 10 to 300 times slower than products of
    float32. Those can read the weights as they are stored, with a library of `blas`. Where they can't, weights are
    widened, if that leaves a fifth of the free memory. On request a processor that multiplies bfloat16 does so for
    prompts, if weights are stored in it; others go on in float32, and so does float16, and the note says so.

    Args:
        stored: the weights' type; of quantized ones, that of their scales.
        parameters: how many there are.
        packed: whether they are quantized.
        requested: the user's choice, which goes before all.
        readable_bytes: what the weights take, if products may read them as they are; None where they are to be widened.

    Raises:
        InputError: `requested` is no float type.
    """
    if requested is not None and requested not in DTYPES:
        raise InputError(f"compute dtype {requested!r} is not one of {', '.join(DTYPES)}")
    kind = "quantized" if packed else str(stored).removeprefix("mlx.core.")
    narrow = packed or stored != mx.float32
    readable = readable_bytes if narrow and blas.reads_stored() and not on_gpu() else None
    if readable is not None and requested in (None, kind):
        rounds = requested == "bfloat16" and blas.rounds_rows()
        prompts = ", prompts in bfloat16" if rounds else ", which this processor multiplies faster" if requested else ""
        kept = f"{kind} weights computed in float32{prompts}, read as they are stored ({readable / 1e9:.2f} GB)"
        return Computation(mx.float32, as_stored=True, rounds=rounds, note=kept)
    if requested is not None and on_gpu():
        return Computation(DTYPES[requested])
    if requested == "float32":
        return Computation(mx.float32, unpack=packed)
    if requested is not None:
        loops = f"computing in {requested} by MLX's loops, which is slow on a CPU: leave out --compute-dtype there"
        return Computation(DTYPES[requested], note=loops)
    if on_gpu() or not narrow:
        return Computation(stored)
    needed, available = 4 * parameters, available_memory()
    if available is not None and needed > 0.8 * available:
        slow = (
            f"computing with {kind} weights, slowly on a CPU: float32 would take {needed / 1e9:.1f} GB "
            f"of the {available / 1e9:.1f} GB of memory that are free"
        )
        return Computation(stored, note=slow)
    fast = f"{kind} weights computed in float32, faster on a CPU ({needed / 1e9:.2f} GB)"
    return Computation(mx.float32, unpack=packed, note=fast)


def machine() -> str:
    """Returns the name of what computes, for the records of measurements."""
    name = mx.device_info().get("device_name", platform.processor())
    where = f"{platform.system()} {platform.machine()}, mlx {mx.__version__}"
    return f"{name}, {os.cpu_count()} cores, {where}, on {'GPU' if on_gpu() else 'CPU'}"


def compile_hindrance() -> str | None:
    """Why a step is not to be compiled; None where it is.

    On a CPU MLX builds libraries with the C++ compiler, under a name that anyone can foretell in the directory for
    temporary files, and loads what it finds there. So that place must be ours alone: else another user's code would
    run in this process, or, where we cannot write, MLX would fail.
    """
    if on_gpu():
        return None
    path = Path(next(filter(None, map(os.environ.get, ("TMPDIR", "TMP", "TEMP", "TEMPDIR"))), "/tmp"))
    try:
        for name in ("mlx", mx.__version__, "cpu"):
            path /= name
            path.mkdir(mode=0o700, exist_ok=True)
            status = path.lstat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022 or not stat.S_ISDIR(status.st_mode):
                return f"{path} is not this user's alone"
        return None if os.access(path, os.W_OK) else f"{path} cannot be written"
    except OSError as error:
        return f"{path}: {error.strerror}"


def total_memory() -> int | None:
    """Bytes of memory that the machine has, or its container may use; None where the system does not say."""
    if sys.platform == "darwin":
        return _metal("memory_size")
    total, limit = _meminfo("MemTotal"), _container_limit()
    return total if total is None or limit is None else min(total, limit)


def available_memory() -> int | None:
    """Bytes that a process can still take; None where the system does not say.

    Of Linux what is free, a container's limit counted. On macOS, which makes room by compressing and moving what
    others hold, what Metal recommends to hold at most, less what MLX holds already.
    """
    if sys.platform == "darwin":
        working_set = _metal(_WORKING_SET)
        return None if working_set is None else max(0, working_set - mx.get_active_memory())
    available, limit = _meminfo("MemAvailable"), _container_limit()
    if available is None or limit is None:
        return available
    try:
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available
    used -= int(statistics.get("inactive_file", 0))  # cached files, which make room when it is needed
    return min(available, max(0, limit - used))


def peak_memory() -> int:
    """Bytes at most in use so far, freed buffers that MLX keeps counted.

    On macOS the physical footprint, by which the system decides whom to end; on Linux the resident set, and of a GPU of
    its own MLX's count.
    """
    if sys.platform == "darwin":
        return _peak_footprint() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if on_gpu():
        return int(mx.get_peak_memory())
    try:
        # getrusage's figure starts from that of whatever process started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wire(nbytes: int) -> None:
    """Keeps a model of so many bytes in memory, where it is large for a Mac: macOS may else page it out between tokens.

    No more than the model and a margin is wired, and nothing for a small one: what is wired nobody else can use, and
    Macs whose memory was wired whole have frozen.
    """
    working_set = _metal(_WORKING_SET) if on_gpu() else None
    if working_set is not None:
        large = nbytes > _LARGE * working_set
        mx.set_wired_limit(min(nbytes + _WIRED_MARGIN, working_set) if large else 0)  # more is an error


def trim_cache() -> None:
    """Gives back the freed buffers that MLX keeps, where with what is in use they fill most of a Mac's memory.

    Batches and texts of many lengths leave buffers of many sizes.
    """
    working_set = _metal(_WORKING_SET) if on_gpu() else None
    if working_set is not None and mx.get_active_memory() + mx.get_cache_memory() > _FULL * working_set:
        mx.clear_cache()


def most_parts(gradient_bytes: int = 0) -> int:
    """Graphs that `Parts` should evaluate at once, at most, where the gradients of one take `gradient_bytes`."""
    processors = 1 if on_gpu() else blas.threads()
    return max(1, min(processors, _GRADIENT_BYTES // max(1, gradient_bytes)))


class Parts:
    """Graphs that are evaluated at the same time, at `most` so many, each in a stream and a thread of its own.

    On a CPU MLX computes a graph one operation after the other, and all that is no matrix product on one processor.
    That is half of a training step, so its batch is cut into parts, of which the products use one processor each. On a
    GPU, or with a BLAS that can't be told how many to use, a batch is one part.
    """

    def __init__(self, most: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.most = most
        if not on_gpu():
            keep_freed_memory(1 << 30, (1 << 31) - 1)
        # The first part is the calling thread's. The others' graphs are made there too, but evaluated elsewhere.
        self._streams = [mx.new_thread_unsafe_stream(mx.cpu) for _ in range(1, most)]
        self._pool = ThreadPoolExecutor(max(1, most - 1))

    def streams(self, count: int, shared: Any) -> Iterator[AbstractContextManager[Any]]:
        """Contexts, to make each of `count` graphs in its own.

        `shared` is every array that all graphs start from: each has to be evaluated before, for only one thread may.
        """
        if count > 1:
            mx.eval(shared)
        yield nullcontext()
        for stream in self._streams[: count - 1]:
            mx.eval(mx.random.state)  # the next part's key
            yield mx.stream(stream)

    def evaluate(self, graphs: Sequence[Any]) -> None:
        """Evaluates the graphs that were made in `streams`, where there are several."""
        if len(graphs) == 1:
            return
        mx.eval(mx.random.state)
        with blas.one_thread():
            others = [self._pool.submit(mx.eval, graph) for graph in graphs[1:]]
            try:
                mx.eval(graphs[0])
            finally:
                for other in others:
                    other.result()


@functools.cache
def keep_freed_memory(largest: int, most: int) -> None:
    """Have glibc use freed memory again rather than give it back and be given cleared pages, in each thread apart.

    A step allocates and frees the same arrays each time. Threads that there are already keep heaps of their own.

    Args:
        largest: bytes of an array from which on its pages are given back as it is freed.
        most: bytes that are kept at the heap's end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_ARENAS, 1)
        mallopt(_MMAP_FROM, largest)
        mallopt(_TRIM_FROM, most)


def _metal(key: str) -> int | None:
    """A figure that Metal gives of a Mac; None elsewhere."""
    try:
        return int(mx.device_info(mx.gpu).get(key, 0)) or None if sys.platform == "darwin" else None
    except (RuntimeError, ValueError):  # a Mac without such a GPU
        return None


def _peak_footprint() -> int | None:
    """The most that macOS has ever counted for this process, as its Activity Monitor does; None where it won't say."""
    words = (ctypes.c_uint64 * 64)()  # struct rusage_info_v4, sys/resource.h: a UUID of two words, then 36 figures
    try:
        if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, ctypes.byref(words)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return int(words[_LIFETIME_MAX_PHYS_FOOTPRINT]) or None


def _meminfo(key: str) -> int | None:
    """A line of Linux' /proc/meminfo, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _container_limit() -> int | None:
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no container, or "max": no limit
        return None
