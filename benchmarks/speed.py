"""Speed against mlx-lm, as ratios from one run: `make bench`.

Every comparison is made in pairs, one side right after the other, and the median of the pairs' ratios is what
counts: a machine that others use too is now faster, now slower, but rarely between the two of a pair.

1. Process start to first token: `elm-mlx generate` against `mlx_lm.generate`, on the embedded model.
2. Against mlx-lm as it is installed, on OpenELM-270M with seeded bfloat16 weights, as published.
3. The same with mlx-lm given our BLAS and float32 weights, and the embedded model likewise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import elm_mlx  # before MLX, for its BLAS
from elm_mlx.config import ModelConfig

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# What others set for OpenBLAS would decide the result.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}


def seeded_model(config: ModelConfig, directory: Path) -> Path:
    """A model directory with random bfloat16 weights, the same ones each time."""
    import mlx.core as mx

    mx.random.seed(0)
    weights = {
        name: (mx.ones(shape) if len(shape) == 1 else mx.random.normal(shape) * shape[-1] ** -0.5).astype(mx.bfloat16)
        for name, shape in config.shapes().items()
    }
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    return directory


def embedded_model(directory: Path) -> Path:
    """The checkpoint that the project carries, converted."""
    source = ROOT / "examples/classics"
    command = [BIN / "elm-mlx", "convert", source / "checkpoint_average.pt", directory, "--overwrite"]
    subprocess.run([*command, "--tokenizer", source / "tokenizer.model"], check=True, capture_output=True)
    return directory


def worker(peer: str, model: Path, prompt: int, new: int) -> dict[str, float]:
    command = [sys.executable, Path(__file__).with_name("worker.py"), peer, model, *map(str, (prompt, new, 3))]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    runs = json.loads(done.stdout)
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def compare(title: str, model: Path, peer: str, prompt: int, new: int, pairs: int) -> list[str]:
    results = [(worker("ours", model, prompt, new), worker(peer, model, prompt, new)) for _ in range(pairs)]
    rows = []
    for name in ("prompt", "decode"):
        mine, theirs = ([pair[side][name] for pair in results] for side in (0, 1))
        what = f"{title}: {name}, tokens/s" + (f" ({prompt} tokens)" if name == "prompt" else "")
        rows.append(row(what, mine, theirs, [a / b for a, b in zip(mine, theirs, strict=True)]))
    return rows


def first_token(model: Path, pairs: int) -> str:
    """Seconds from the start of the process until it has printed one token and ended."""
    prompt = ["--prompt", "Once upon a time", "--max-tokens", "1"]
    ours = [BIN / "elm-mlx", "generate", model, *prompt]
    theirs = [BIN / "mlx_lm.generate", "--model", model, *prompt, "--ignore-chat-template"]

    def seconds(command: list[str | Path]) -> float:
        start = time.perf_counter()
        subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True)
        return time.perf_counter() - start

    seconds(ours), seconds(theirs)  # warm the disk's cache
    results = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    mine, other = ([pair[side] for pair in results] for side in (0, 1))
    return row("process start to first token, s", mine, other, [b / a for a, b in results])


def norms(repeats: int = 200) -> str:
    """The fused RMSNorm against the naive one, in bfloat16 as a GPU runs it and in float32 as a CPU does."""
    import mlx.core as mx

    from elm_mlx.norm import NaiveRMSNorm, RMSNorm

    def microseconds(norm: RMSNorm, x: mx.array) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            mx.eval(norm(x))
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6

    lines = []
    for dtype in (mx.float32, mx.bfloat16):
        x = mx.random.normal((1, 128, 1280)).astype(dtype)
        fused, naive = RMSNorm(1280), NaiveRMSNorm(1280)
        for norm in (fused, naive):
            norm.set_dtype(dtype)
        mx.eval(x, fused.parameters(), naive.parameters())
        name = str(dtype).removeprefix("mlx.core.")
        lines.append(f"{name} fused {microseconds(fused, x):.0f} µs, naive {microseconds(naive, x):.0f} µs")
    return f"RMSNorm of (1, 128, 1280) on {mx.default_device()}: {'; '.join(lines)}"


def row(title: str, mine: list[float], theirs: list[float], ratios: list[float]) -> str:
    middle = statistics.median
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"| {title} | {middle(mine):.4g} | {middle(theirs):.4g} | {middle(ratios):.2f} | {spread} |"


def machine() -> str:
    from importlib.metadata import version

    import mlx.core as mx

    return (
        f"{mx.device_info().get('device_name', platform.processor())}, {os.cpu_count()} cores, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, mlx {version('mlx')}, "
        f"mlx-lm {version('mlx-lm')}, BLAS: {elm_mlx.blas.status().name}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs for each comparison")
    pairs = parser.parse_args().pairs
    print(machine(), "\n", flush=True)
    print("| what | elm-mlx | mlx-lm | ratio, median of pairs | spread |\n| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        embedded, seeded = embedded_model(Path(small)), seeded_model(ModelConfig.preset("OpenELM-270M"), Path(large))
        print(first_token(embedded, 2 * pairs), flush=True)
        for title, model, peer, prompt, new, count in (
            ("embedded 3.6M, same BLAS and float32", embedded, "equal", 128, 256, pairs),
            ("270M, same BLAS and float32", seeded, "equal", 128, 32, pairs),
            ("270M, same BLAS and float32, long", seeded, "equal", 1024, 16, 2),
            ("270M as published, mlx-lm as installed", seeded, "stock", 128, 12, 2),
        ):
            print("\n".join(compare(title, model, peer, prompt, new, count)), flush=True)
    print(f"\n{norms()}")


if __name__ == "__main__":
    main()
