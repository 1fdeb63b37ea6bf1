"""The machine that figures are of: what it is, and the two speeds that bound every model on it.

Knows how an operating system is asked. What it doesn't say is left out.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from elm_mlx import blas, device
from elm_mlx.bench.results import Norm, Speeds
from elm_mlx.model import roofline
from elm_mlx.model.network import NaiveRMSNorm, RMSNorm
from elm_mlx.version import __version__

_GIGABYTE = 1e9


def describe() -> dict[str, str]:
    """What a reader has to know of it, label by label."""
    memory = _total_memory()
    lines = {
        "processor": str(mx.device_info().get("device_name", platform.processor() or "not known")),
        "computes on": "GPU" if device.on_gpu() else "CPU",
        "cores": str(os.cpu_count()),
        "memory": f"{memory / _GIGABYTE:.0f} GB" if memory else "",
        "system": _system(),
        "python": platform.python_version(),
        "elm-mlx": __version__,
        "mlx": metadata.version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "BLAS": "" if device.on_gpu() else blas.status().name,
    }
    return {label: text for label, text in lines.items() if text}


def measure(dtypes: Iterable[str]) -> Speeds:
    """A quarter of a second for the bandwidth and for each type."""
    return Speeds(
        {name: roofline.matmul_speed(device.DTYPES[name]) for name in sorted(set(dtypes))}, roofline.read_bandwidth()
    )


def _system() -> str:
    name = "macOS" if sys.platform == "darwin" else platform.system()
    release = platform.mac_ver()[0] if sys.platform == "darwin" else platform.release()
    return f"{name} {release}, {platform.machine()}"


def _total_memory() -> int | None:
    if device.on_gpu() and (size := mx.device_info().get("memory_size")):
        return int(size)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, StopIteration):
        pass
    try:
        return int(subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True, check=True).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


_PAIRS, _CALLS = 7, 20


def measure_norm(dtype: str, positions: int, width: int) -> Norm:
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
