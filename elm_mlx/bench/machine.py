"""The machine that figures are of: what it is, and the two speeds that bound every model on it.

Knows how an operating system is asked. What it doesn't say is left out.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from elm_mlx import blas, device
from elm_mlx.model import roofline
from elm_mlx.version import __version__

_GIGABYTE = 1e9


@dataclass(frozen=True)
class Speeds:
    """What the machine can do.

    Attributes:
        matmul: FLOP/s of a product of large matrices, by type.
        bandwidth: bytes a second that a product with a single row reads.
    """

    matmul: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0


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
