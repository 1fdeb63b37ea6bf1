"""Every decision that depends on what MLX computes on: a GPU (Metal, CUDA) or a CPU.

Knows nothing of models. Whoever needs such a decision asks here, so that both answers can be
tested on one machine by replacing `on_gpu`.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import mlx.core as mx

from elm_mlx.errors import InputError

DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def on_gpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.gpu))


def compute_dtype(
    stored: mx.Dtype, parameters: int, packed: bool = False, requested: str | None = None
) -> tuple[mx.Dtype, str | None]:
    """What to compute in, and a note for the user when that is not what is stored.

    A GPU has 16-bit units. MLX's CPU loops for 16-bit and quantized weights are 10 to 300 times slower than
    a float32 product by BLAS, so there the weights are widened, where that leaves a fifth of the free memory.

    Args:
        stored: the weights' type; of quantized ones, that of their scales.
        parameters: how many there are.
        packed: whether they are quantized.
        requested: the user's choice, which goes before all.

    Raises:
        InputError: `requested` is no float type.
    """
    if requested is not None:
        if requested not in DTYPES:
            raise InputError(f"no compute dtype {requested!r}; there are {', '.join(DTYPES)}")
        return DTYPES[requested], None
    if on_gpu() or (stored == mx.float32 and not packed):
        return stored, None
    needed, available = 4 * parameters, available_memory()
    kind = "quantized" if packed else str(stored).removeprefix("mlx.core.")
    if not _widened_fits(parameters, available):
        return stored, (
            f"computing with {kind} weights, slowly on a CPU: float32 would take {needed / 1e9:.1f} GB "
            f"of the {(available or 0) / 1e9:.1f} GB of memory that are free"
        )
    return mx.float32, f"{kind} weights computed in float32, faster on a CPU ({needed / 1e9:.2f} GB)"


def unpacks(dtype: mx.Dtype, parameters: int) -> bool:
    """Whether quantized weights are expanded at load to compute in `dtype`: on a CPU, to be multiplied by BLAS."""
    return not on_gpu() and dtype == mx.float32 and _widened_fits(parameters, available_memory())


def _widened_fits(parameters: int, available: int | None) -> bool:
    return available is None or 4 * parameters <= 0.8 * available


def available_memory() -> int | None:
    """Bytes that a process can still take, a container's limit counted; None where the system does not say."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    lines = (line for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    available = next((int(line.split()[1]) * 1024 for line in lines), None)
    if available is None:
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no container, or "max": no limit
        return available
    return min(available, max(0, limit - used))


def peak_memory() -> int:
    """Bytes at most in use so far: MLX's own count on a GPU, the process's resident set on a CPU."""
    if on_gpu():
        return int(mx.get_peak_memory())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
