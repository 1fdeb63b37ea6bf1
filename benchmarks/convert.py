"""Time and memory of converting a float32 checkpoint of the 270M (1.1 GB, seeded weights).

Beside it, in turns and on the same machine, the least that the job could take: copying the file, and casting
its values to 16 bits in numpy. Run it as `python benchmarks/convert.py`; the checkpoint is made first, by code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRESET = "OpenELM-270M"

MAKE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import numpy as np
import torch_files
from elm_mlx.model.config import ModelConfig
from elm_mlx_convert.names import to_corenet
random = np.random.default_rng(270)
shapes = ModelConfig.preset(sys.argv[3]).shapes()
weights = {to_corenet(name): random.standard_normal(shape, np.float32) * 0.02 for name, shape in shapes.items()}
torch_files.save(Path(sys.argv[1]), {name: torch_files.tensor(weight) for name, weight in weights.items()})
"""

BASELINE = """
import shutil, sys
import numpy as np
shutil.copyfile(sys.argv[1], sys.argv[2])
with open(sys.argv[1], "rb") as file:
    while (values := np.fromfile(file, np.float32, 1 << 20)).size:
        with np.errstate(over="ignore", invalid="ignore"):
            values.astype(np.float16)
"""


def run(command: list[str]) -> tuple[float, float]:
    """Wall-clock seconds and peak RSS in MB of a process, start included."""
    os.sync()  # so that it does not wait for what others have left to be written
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[:4]} ended with {process.returncode}")
    return seconds, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    """Prints the best seconds of either side, their ratio, and the peak memory of converting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to work; by default a temporary directory")
    arguments = parser.parse_args()
    tests = Path(__file__).resolve().parent.parent / "tests"
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        source, copy, out = (str(Path(name, part)) for part in ("model.pt", "copy.pt", "out"))
        run([sys.executable, "-c", MAKE, source, str(tests), PRESET])
        size = Path(source).stat().st_size / 1e9
        print(f"{PRESET}, float32, {size:.2f} GB, to bfloat16; {arguments.rounds} rounds in turns")
        ours, baseline = [], []
        for _ in range(arguments.rounds):
            baseline.append(run([sys.executable, "-c", BASELINE, source, copy]))
            Path(copy).unlink()
            ours.append(run([sys.executable, "-m", "elm_mlx", "convert", source, out]))
            shutil.rmtree(out)
        best, least = min(ours)[0], min(baseline)[0]
        print(f"copy and numpy cast   best {least:.2f} s of {', '.join(f'{s:.2f}' for s, _ in baseline)}")
        print(f"elm-mlx convert       best {best:.2f} s of {', '.join(f'{s:.2f}' for s, _ in ours)}")
        print(f"ratio                 {best / least:.2f} (median {median(ours) / median(baseline):.2f})")
        print(f"peak RSS              {max(rss for _, rss in ours):.0f} MB")


def median(runs: list[tuple[float, float]]) -> float:
    """Returns the median of the runs' seconds."""
    return sorted(seconds for seconds, _ in runs)[len(runs) // 2]


if __name__ == "__main__":
    main()
