"""A batch in parts, each computed by a processor of its own.

On a CPU MLX computes a graph one operation after the other, and all that is no matrix product on one processor. That
is half of a training step, so the rows of a batch are shared out: each part is a graph of its own, in a stream and a
thread of its own, whose products use one processor. On a GPU, or with a BLAS that can't be told how many to use, a
batch is one part.

Knows how batches are cut and graphs are run; nothing of what they compute.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from elm_mlx import blas, device
from elm_mlx.data.batches import Batch

Outputs = TypeVar("Outputs")

_GRADIENT_BYTES = 1 << 28  # what all parts' gradients may take; where they'd take more, products are most of a step
_ARENAS, _MMAP_FROM, _TRIM_FROM = -8, -3, -1  # mallopt's names for them, in glibc


class Parts:
    """What cuts batches up and computes their parts at the same time.

    Args:
        gradient_bytes: what each part's gradients take; large ones make for fewer parts.
    """

    def __init__(self, gradient_bytes: int):
        self.most = most(gradient_bytes)
        if not device.on_gpu():
            _keep_freed_memory()
        # The first part is the calling thread's. The others' graphs are made there too, but evaluated elsewhere.
        self._streams = [mx.new_thread_unsafe_stream(mx.cpu) for _ in range(1, self.most)]
        self._pool = ThreadPoolExecutor(max(1, self.most - 1))

    def compute(self, build: Callable[[Batch], Outputs], batch: Batch, shared: Any) -> list[Outputs]:
        """`build` of each part, evaluated where there are several.

        `shared` is every array that all graphs start from: each has to be evaluated before, for only one thread may.
        """
        parts = cut(batch, self.most)
        if len(parts) == 1:
            return [build(batch)]
        return self.each([functools.partial(build, part) for part in parts], shared)

    def each(self, builds: Sequence[Callable[[], Outputs]], shared: Any) -> list[Outputs]:
        """What each of `builds`, `most` at most, returns, evaluated at the same time. `shared` as for `compute`."""
        mx.eval(shared)
        graphs = [builds[0]()]
        for stream, build in zip(self._streams, builds[1:], strict=False):
            mx.eval(mx.random.state)  # the next part's key
            with mx.stream(stream):
                graphs.append(build())
        mx.eval(mx.random.state)
        with blas.one_thread() if len(graphs) > 1 else nullcontext():
            others = [self._pool.submit(mx.eval, graph) for graph in graphs[1:]]
            try:
                mx.eval(graphs[0])
            finally:
                for other in others:
                    other.result()
        return graphs


def most(gradient_bytes: int) -> int:
    """Parts that are computed at the same time, at most, where the gradients of one take `gradient_bytes`."""
    processors = 1 if device.on_gpu() else blas.threads()
    return max(1, min(processors, _GRADIENT_BYTES // max(1, gradient_bytes)))


def cut(batch: Batch, count: int) -> list[Batch]:
    """`count` batches with the rows of `batch`, as many in each as can be; fewer where there are fewer rows."""
    rows = len(batch.inputs)
    edges = np.linspace(0, rows, min(count, rows) + 1).round().astype(int)

    return [batch.rows(slice(start, stop)) for start, stop in pairwise(edges)]


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc use freed memory again rather than give it back and be given cleared pages, in each thread apart.

    A step allocates and frees the same few hundred megabytes each time.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENAS, 1)
        mallopt(_MMAP_FROM, 1 << 30)
        mallopt(_TRIM_FROM, (1 << 31) - 1)
