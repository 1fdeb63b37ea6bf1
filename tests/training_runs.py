"""Data for fine-tuning runs, what their metrics say, and ports for several processes."""

from __future__ import annotations

import json
import socket
from pathlib import Path


def write_data(path: Path) -> Path:
    """A directory with 24 examples to train on and 4 to validate."""
    path.mkdir()
    for name, count in (("train", 24), ("valid", 4)):
        rows = ({"prompt": "the quick " * (i % 4 + 1), "completion": f"brown fox {i}"} for i in range(count))
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def updates(out: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of the metrics, validations included."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss", line.get("valid_loss"))) for line in lines]


def gradient_norms(out: Path) -> list[float]:
    """Of every update, before clipping: what a sum over processes that is off shows first."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


def free_port() -> int:
    """One that is free, as is the next: the ring takes a port for each process."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
