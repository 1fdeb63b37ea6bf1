"""RMSNorm by itself, fused and written out: the paper's question (section 5).

Knows how a layer is timed; nothing of models.
"""

from __future__ import annotations

import time

import mlx.core as mx

from elm_mlx import device
from elm_mlx.bench.results import Norm
from elm_mlx.model.norm import NaiveRMSNorm, RMSNorm

_PAIRS, _CALLS = 7, 20


def measure(dtype: str, positions: int, width: int) -> Norm:
    """Microseconds of norming `(1, positions, width)`, in turn by each."""
    x = mx.random.normal((1, positions, width), key=mx.random.key(0)).astype(device.DTYPES[dtype])
    fused, naive = RMSNorm(width), NaiveRMSNorm(width)
    for norm in (fused, naive):
        norm.set_dtype(device.DTYPES[dtype])
        mx.eval(x, norm.parameters(), norm(x))
    pairs = [(_microseconds(fused, x), _microseconds(naive, x)) for _ in range(_PAIRS)]
    return Norm(dtype, tuple(x.shape), [pair[0] for pair in pairs], [pair[1] for pair in pairs])


def _microseconds(norm: RMSNorm, x: mx.array) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        mx.eval(norm(x))
    return (time.perf_counter() - started) / _CALLS * 1e6
