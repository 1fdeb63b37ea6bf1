"""Measurements, and what follows from them: medians, ratios of pairs, and how near each comes to the roofline.

Knows JSON, in which all of it is kept, and arithmetic. Knows nothing of how anything is measured or shown.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elm_mlx import files, reading
from elm_mlx.bench.suites import About, Case, Figures
from elm_mlx.errors import InputError
from elm_mlx.model.roofline import causal

VERSION = 1  # of the JSON


@dataclass(frozen=True)
class Speeds:
    """What the machine can do.

    Attributes:
        matmul: FLOP/s of a product of large matrices, by type.
        bandwidth: bytes a second that a product with a single row reads.
    """

    matmul: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0


@dataclass(frozen=True)
class Spread:
    """The median of some values, the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Row:
    """A case, and what each side did in it. `skipped` says of the others why not."""

    case: Case
    about: dict[str, About] = field(default_factory=dict)
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def spread(self, side: str, figure: str) -> Spread | None:
        values = [getattr(each, figure) for each in self.figures.get(side, ())]
        values = [value for value in values if value]
        return Spread.of(values) if values else None

    def ratio(self, side: str, figure: str) -> Spread | None:
        """How many times as fast ours is: of each pair that was measured one right after the other."""
        pairs = zip(self.figures.get("ours", ()), self.figures.get(side, ()), strict=False)
        values = [(getattr(ours, figure), getattr(theirs, figure)) for ours, theirs in pairs]
        ratios = [ours / theirs for ours, theirs in values if ours and theirs]
        return Spread.of(ratios) if ratios else None


@dataclass(frozen=True)
class Bound:
    """What a figure of ours is bound by.

    Attributes:
        flops, bytes: that must be computed and moved: for the whole prompt, or for one decode step.
        by: "matmul" or "bandwidth", whichever takes the machine longer.
        share: of that speed, what was reached; from 0 to about 1.
    """

    flops: int
    bytes: int
    by: str
    share: float


@dataclass
class Norm:
    """RMSNorm by itself: microseconds of each of the pairs that were measured."""

    dtype: str
    shape: tuple[int, ...]
    fused: list[float]
    naive: list[float]

    @property
    def ratio(self) -> Spread:
        return Spread.of([naive / fused for fused, naive in zip(self.fused, self.naive, strict=True)])


@dataclass
class Results:
    """A benchmark, whole or as far as it came.

    Attributes:
        when: it began, in UTC, as ISO 8601 writes it.
        machine: labels and texts.
        complete: whether nothing was interrupted.
    """

    suite: str
    when: str
    machine: dict[str, str]
    speeds: Speeds = field(default_factory=Speeds)
    rows: list[Row] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    complete: bool = False

    @property
    def measured(self) -> bool:
        """Whether there is a figure at all."""
        return any(row.figures for row in self.rows)

    def save(self, path: Path) -> None:
        """Raises ElmError where it cannot be written."""
        values: dict[str, Any] = {"version": VERSION, **asdict(self)}
        for row, written in zip(self.rows, values["rows"], strict=True):
            written["roofline"] = {name: asdict(bound) for name, bound in bounds(row, self.speeds).items() if bound}
        files.write_text(path, json.dumps(values, indent=1) + "\n")


def load(path: Path) -> Results:
    """What `Results.save` wrote. Raises InputError where it is something else."""
    try:
        values = reading.json_object(path, reading.TEXT_BYTES)
        if values.pop("version") != VERSION:
            raise InputError(f"{path}: is of another version of elm-mlx")
        rows = [
            Row(
                Case(**row["case"]),
                {side: About(**(about | {"notes": tuple(about["notes"])})) for side, about in row["about"].items()},
                {side: [Figures(**each) for each in figures] for side, figures in row["figures"].items()},
                row["skipped"],
            )
            for row in values.pop("rows")
        ]
        norms = [Norm(**(norm | {"shape": tuple(norm["shape"])})) for norm in values.pop("norms")]
        return Results(**(values | {"speeds": Speeds(**values["speeds"]), "rows": rows, "norms": norms}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: holds no results of elm-mlx bench: {error}") from None


def bounds(row: Row, speeds: Speeds) -> dict[str, Bound | None]:
    """What bounds ours: `prompt`, of the time to the first token, and `decode`, of a step half way through.

    Every weight is read at least once, in a step every position's keys and values too. None where it is not known.
    """
    case, about = row.case, row.about.get("ours")
    first, rate = row.spread("ours", "first"), row.spread("ours", "decode")
    if about is None or not about.flops:
        return {"prompt": None, "decode": None}

    def bound(tokens: int, seen: int, positions: int, seconds: float) -> Bound | None:
        flops = case.batch * (tokens * about.flops + seen * about.flops_seen + about.flops_head)
        moved = about.weight_bytes + case.batch * positions * about.cache_bytes
        return _bound(flops, moved, seconds, about.dtype, speeds)

    half = case.prompt + case.new // 2
    return {
        "prompt": bound(case.prompt, causal(case.prompt), case.prompt, first.median) if first else None,
        "decode": bound(1, half, half, case.batch / rate.median) if rate else None,
    }


def _bound(flops: int, moved: int, seconds: float, dtype: str, speeds: Speeds) -> Bound | None:
    matmul = speeds.matmul.get(dtype)
    if not matmul or not speeds.bandwidth:
        return None
    computing, moving = flops / matmul, moved / speeds.bandwidth
    return Bound(flops, moved, "matmul" if computing > moving else "bandwidth", max(computing, moving) / seconds)
