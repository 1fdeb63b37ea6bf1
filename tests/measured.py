"""What a benchmark might have measured, in round figures."""

from __future__ import annotations

from elm_mlx.bench.results import NormTimes, Results, Row, Speeds
from elm_mlx.bench.suites import About, Case, Figures, Suite

ABOUT = About("elm-mlx", "float32", 100, weight_bytes=4000, cache_bytes=8, flops=200, flops_seen=4, flops_head=60)
SPEEDS = Speeds({"float32": 1e6}, 2e6)  # not to be changed


def row(batch: int = 1) -> Row:
    ours = [Figures(0.01, 1000.0, 100.0, 5_000_000), Figures(0.02, 500.0, 90.0, 6_000_000), Figures(0.015, 667.0, 95.0)]
    theirs = [Figures(0.02, 500.0, 50.0, None), Figures(0.02, 500.0, 60.0, None), Figures(0.04, 250.0, 10.0, None)]
    figures = {"ours": ours, "mlx-lm": theirs}
    return Row(
        Case("OpenELM-270M", "bfloat16", 10, 5, batch), {"ours": ABOUT, "mlx-lm": About("mlx-lm", "float32")}, figures,
        {"pytorch": "not here | there"}, {"mlx-lm": 3},
    )  # fmt: skip


def whole() -> Results:
    norm, measured = NormTimes("float32", (1, 2, 3), [10.0, 20.0], [30.0, 20.0]), row()
    return Results(
        Suite("quick", (measured.case,), ("mlx-lm", "pytorch")), "2026-01-02T03:04:05+00:00",
        {"processor": "<b>", "cores": "2"}, speeds=SPEEDS, rows=[measured], norms=[norm], complete=True,
    )  # fmt: skip
