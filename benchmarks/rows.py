"""Products of few rows: `cblas.c` against the OpenBLAS that it stands in front of.

    python benchmarks/rows.py [ROWS…]

Every weight matrix of OpenELM-270M, seeded, times so many rows: a decode step of so many texts, but for what is no
product. Both take turns, ten times; milliseconds as the median, and as the least.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from elm_mlx import blas, device
from elm_mlx.model.config import ModelConfig

ROWS = (1, 2, 4, 8, 12, 16)
REPEATS = 10
PAUSE = 0.15  # seconds, in which the other side's threads come to rest


def main() -> None:
    """The table, a line for each number of rows; ends with a reason where there is nothing to measure."""
    found = blas.status()
    if blas.OWN_FEW_ROWS not in found.name:
        sys.exit(f"there is no C of ours here to measure: {found.name}")
    ours = ctypes.CDLL(found.path).cblas_sgemm
    theirs = ctypes.CDLL(str(blas._packaged_library())).scipy_cblas_sgemm
    shapes = [shape for shape in ModelConfig.preset("OpenELM-270M").shapes().values() if len(shape) == 2]
    draw = np.random.default_rng(0)
    weights = [draw.standard_normal(shape, np.float32) for shape in shapes]
    print(f"{device.machine()}; {sum(weight.nbytes for weight in weights) / 1e6:,.0f} MB of weights")
    print("| rows | OpenBLAS, ms | cblas.c, ms | ratio |\n| ---: | ---: | ---: | ---: |")
    for rows in map(int, sys.argv[1:] or ROWS):
        inputs = [draw.standard_normal((rows, shape[1]), np.float32) for shape in shapes]
        times: dict[str, list[float]] = {"theirs": [], "ours": []}
        for _ in range(REPEATS):
            for name, gemm in (("theirs", theirs), ("ours", ours)):
                time.sleep(PAUSE)
                times[name].append(_seconds(gemm, inputs, weights))
        ratio = median(a / b for a, b in zip(times["theirs"], times["ours"], strict=True))
        cells = (f"{1e3 * median(each):.0f} ({1e3 * min(each):.0f})" for each in times.values())
        print(f"| {rows} | {' | '.join(cells)} | {ratio:.2f} |")


def _seconds(gemm: Callable[..., None], inputs: list[np.ndarray], weights: list[np.ndarray]) -> float:
    outputs = [np.empty((len(x), len(weight)), np.float32) for x, weight in zip(inputs, weights, strict=True)]
    begun = time.perf_counter()
    for x, weight, y in zip(inputs, weights, outputs, strict=True):
        (rows, length), columns = x.shape, len(weight)
        gemm(
            101, 111, 112, rows, columns, length, ctypes.c_float(1), ctypes.c_void_p(x.ctypes.data), length,
            ctypes.c_void_p(weight.ctypes.data), length, ctypes.c_float(0), ctypes.c_void_p(y.ctypes.data), columns,
        )  # fmt: skip
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
