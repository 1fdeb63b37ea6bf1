"""The machine that figures are of: what it is, and the two speeds that bound every model on it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import mlx.core as mx

import elm_mlx
from elm_mlx import blas, device
from elm_mlx.bench.conditions import said
from elm_mlx.bench.results import NormTimes, Speeds
from elm_mlx.model import roofline
from elm_mlx.model.network import NaiveRMSNorm, RMSNorm
from elm_mlx.version import __version__

_PAIRS, _CALLS = 7, 20


def describe() -> dict[str, str]:
    """The machine and its software, label by label. What the system doesn't say is left out."""
    memory, mac = _total_memory(), sys.platform == "darwin"
    system = f"macOS {platform.mac_ver()[0]}" if mac else f"{platform.system()} {platform.release()}"
    lines = {
        "processor": str(mx.device_info().get("device_name", platform.processor() or "not known")),
        "vectors": _vectors(),
        "model": said("sysctl", "-n", "hw.model") if mac else "",
        "computes on": "GPU" if device.on_gpu() else "CPU",
        "cores": str(os.cpu_count()),
        "performance cores": said("sysctl", "-n", "hw.perflevel0.physicalcpu") if mac else "",
        "GPU cores": _gpu_cores() if mac else "",
        "memory": f"{memory / 1e9:.0f} GB" if memory else "",
        "system": f"{system}, {platform.machine()}",
        "python": platform.python_version(),
        "elm-mlx": __version__,
        "mlx": metadata.version("mlx"),
        "mlx-lm": metadata.version("mlx-lm"),
        "BLAS": "" if device.on_gpu() else blas.status().name,
    }
    return {label: text for label, text in lines.items() if text}


def measure(dtype: str) -> Speeds:
    """Measures matrix products and bandwidth, a quarter of a second each."""
    return Speeds({dtype: roofline.matmul_speed(device.DTYPES[dtype])}, roofline.read_bandwidth())


def measure_norm(dtype: str, positions: int, width: int) -> NormTimes:
    """Measures RMSNorm of `(1, positions, width)` by itself, fused and written out in turn: the paper's section 5."""
    x = mx.random.normal((1, positions, width), key=mx.random.key(0)).astype(device.DTYPES[dtype])
    fused, naive = RMSNorm(width), NaiveRMSNorm(width)
    for norm in (fused, naive):
        norm.set_dtype(device.DTYPES[dtype])
        mx.eval(x, norm.parameters(), norm(x))
    pairs = [(_microseconds(fused, x), _microseconds(naive, x)) for _ in range(_PAIRS)]
    return NormTimes(dtype, tuple(x.shape), [pair[0] for pair in pairs], [pair[1] for pair in pairs])


def _microseconds(norm: RMSNorm, x: mx.array) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        mx.eval(norm(x))
    return (time.perf_counter() - started) / _CALLS * 1e6


def _vectors() -> str:
    """The widest vectors of an x86 processor under Linux: a virtual machine's name may say no more than who made it."""
    flags = blas.processor().split()
    return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")


def _total_memory() -> int | None:
    if device.on_gpu() and (size := mx.device_info().get("memory_size")):
        return int(size)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, StopIteration):
        pass
    told = said("sysctl", "-n", "hw.memsize")
    return int(told) if told.isdigit() else None


def _gpu_cores() -> str:
    """Of a Mac, whose chips of one name differ in them; nothing where it doesn't say."""
    found = re.search(r'"gpu-core-count" = (\d+)', said("ioreg", "-r", "-d", "1", "-c", "AGXAccelerator"))
    return found[1] if found else ""


def commit() -> str | None:
    """The commit of this project's code: its checkout's, `-dirty-` and a hash of the changes behind it where files were
    changed, or the one that pip installed from a repository; None where neither says."""
    root = Path(elm_mlx.__file__).parents[1]
    if (root / ".git").exists():
        head, changed = (said("git", "-C", str(root), *words) for words in (("rev-parse", "HEAD"), ("diff", "HEAD")))
        changes = f"-dirty-{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else ""
        return head + changes if head else None
    with suppress(metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        origin = json.loads(metadata.distribution("elm-mlx").read_text("direct_url.json") or "{}")
        return str(origin["vcs_info"]["commit_id"])
    return None
