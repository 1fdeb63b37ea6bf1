"""Results of a benchmark, kept as JSON: medians, ratios of pairs, and how near each figure comes to the roofline."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

from elm_mlx import files, reading
from elm_mlx.bench import conditions
from elm_mlx.bench.conditions import Conditions
from elm_mlx.bench.suites import About, Case, Figures, Suite
from elm_mlx.errors import InputError
from elm_mlx.model.roofline import causal

VERSION = 3  # of the JSON, as results.schema.json describes it


@dataclass(frozen=True)
class Speeds:
    """The speeds of a machine.

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

    @classmethod
    def of_ratios(cls, pairs: Iterable[tuple[float | None, float | None]]) -> Spread | None:
        ratios = [first / second for first, second in pairs if first and second]
        return cls.of(ratios) if ratios else None


@dataclass
class Row:
    """A case, and the measurements of each side in it.

    Attributes:
        skipped: the reasons of sides that were left out.
        alike: how many tokens, from the first on, each text of a side has in common with ours, at least; of sides that
            tell what they wrote.
        conditions: the machine's state before and after, twice as many where it was interrupted and resumed.
    """

    case: Case
    about: dict[str, About] = field(default_factory=dict)
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    alike: dict[str, int] = field(default_factory=dict)
    conditions: list[Conditions] = field(default_factory=list)

    def done(self, suite: Suite) -> bool:
        """True where ours and each other side, unless it was left out, was measured as often as the suite asks."""
        counts = [len(self.figures.get(side, ())) for side in ("ours", *suite.against) if side not in self.skipped]
        return "ours" in self.figures and min(counts) >= suite.repeats

    def compare(self, side: str, text: Sequence[int], ours: Sequence[int]) -> None:
        """Takes what a side and ours wrote, all texts step by step."""
        if text:
            same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(text, ours, strict=False))]) // self.case.batch
            self.alike[side] = min(same, self.alike.get(side, same))

    def spread(self, side: str, figure: str) -> Spread | None:
        values = [value for each in self.figures.get(side, ()) if (value := getattr(each, figure))]
        return Spread.of(values) if values else None

    def ratio(self, side: str, figure: str) -> Spread | None:
        """The ratio of our figure to a side's, over pairs that were measured one right after the other."""
        pairs = zip(self.figures.get("ours", ()), self.figures.get(side, ()), strict=False)
        return Spread.of_ratios((getattr(ours, figure), getattr(theirs, figure)) for ours, theirs in pairs)


@dataclass(frozen=True)
class Bound:
    """The roofline of a figure of ours.

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
class NormTimes:
    """RMSNorm by itself: microseconds of each of the pairs that were measured."""

    dtype: str
    shape: tuple[int, ...]
    fused: list[float]
    naive: list[float]

    @property
    def ratio(self) -> Spread | None:
        return Spread.of_ratios(zip(self.naive, self.fused, strict=True))


@dataclass
class Results:
    """A benchmark, whole or as far as it came.

    Attributes:
        when: the time that it began, in UTC, as ISO 8601 writes it.
        machine: labels and texts.
        commit: of this project's code, `-dirty-` and a hash of the changes behind it; None where that is not known.
        load: processes that ran or waited in the minute before it began, or was resumed: the most of them.
        note: what whoever measured says of the machine.
        complete: whether every case of the suite had its turn.
    """

    suite: Suite
    when: str
    machine: dict[str, str]
    commit: str | None = None
    load: float = 0.0
    note: str = ""
    speeds: Speeds = field(default_factory=Speeds)
    rows: list[Row] = field(default_factory=list)
    norms: list[NormTimes] = field(default_factory=list)
    complete: bool = False

    @property
    def measured(self) -> bool:
        """True where there is a figure at all."""
        return any(row.figures for row in self.rows)

    @property
    def warnings(self) -> list[str]:
        """Reasons why the machine may have been slower than it can be."""
        cores = self.machine.get("cores", "")
        readings = [each for row in self.rows for each in row.conditions]
        return conditions.warnings(readings, self.load, int(cores) if cores.isdigit() else None)

    def save(self, path: Path) -> None:
        """Writes them, with the directory where that is missing. Raises ElmError where the file cannot be written."""
        values: dict[str, Any] = {"version": VERSION, **asdict(self)}
        for row, written in zip(self.rows, values["rows"], strict=True):
            written["roofline"] = {name: asdict(bound) for name, bound in bounds(row, self.speeds).items() if bound}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, values)


def load(path: Path) -> Results:
    """Reads the file of `Results.save`. Raises InputError where it is something else."""
    try:
        values = reading.json_object(path, reading.TEXT_BYTES)
        if values.pop("version") != VERSION:
            raise InputError(f"{path}: was written by another version of elm-mlx; measure anew")
        rows = [
            Row(
                Case(**row["case"]),
                {side: About(**(about | {"notes": tuple(about["notes"])})) for side, about in row["about"].items()},
                {side: [Figures(**each) for each in figures] for side, figures in row["figures"].items()},
                row["skipped"],
                row["alike"],
                [Conditions(**each) for each in row["conditions"]],
            )
            for row in values.pop("rows")
        ]
        norms = [NormTimes(**(norm | {"shape": tuple(norm["shape"])})) for norm in values.pop("norms")]
        asked = values.pop("suite")
        cases, against = tuple(Case(**case) for case in asked["cases"]), tuple(asked["against"])
        typed = {
            "suite": Suite(**(asked | {"cases": cases, "against": against})),
            "speeds": Speeds(**values["speeds"]),
            "rows": rows,
            "norms": norms,
        }
        return Results(**(values | typed))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: holds no results of elm-mlx bench: {error}") from None


def schema_faults(path: Path) -> list[str]:
    """Returns what in a file of `Results.save` does not fit results.schema.json, a line each.

    Nothing is looked at where the package `jsonschema` is not installed. Raises InputError where the file is no JSON.
    """
    values = reading.json_object(path, reading.TEXT_BYTES)
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        return []
    schema = json.loads(resources.files("elm_mlx.bench").joinpath("results.schema.json").read_text("utf-8"))
    errors = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).iter_errors(values)
    return [f"{error.json_path}: {reading.printable(error.message)}" for error in errors]


def _share(case: Case, about: About) -> float:
    """Returns the bytes of keys and values as the case keeps them, of those that are computed: with a scale and a bias
    for 64."""
    size = 4 if about.dtype == "float32" else 2
    return 1.0 if case.kv_bits is None else (case.kv_bits / 8 + 2 * size / 64) / size


def bounds(row: Row, speeds: Speeds) -> dict[str, Bound | None]:
    """The bounds of ours: `prompt`, of the time to the first token, and `decode`, of a step half way through.

    Every weight is read at least once, in a step every position's keys and values too. None where it is not known, as
    of prompts in bfloat16 on a CPU.
    """
    case, about = row.case, row.about.get("ours")
    first, rate = row.spread("ours", "first"), row.spread("ours", "decode")
    matmul = speeds.matmul.get(about.dtype) if about is not None and about.flops else None
    if about is None or not matmul or not speeds.bandwidth:
        return {"prompt": None, "decode": None}

    def bound(tokens: int, seen: int, positions: int, seconds: float) -> Bound:
        flops = case.batch * (
            tokens * about.flops - (tokens - 1) * about.flops_unread + seen * about.flops_seen + about.flops_head
        )
        moved = about.weight_bytes + round(case.batch * positions * about.cache_bytes * _share(case, about))
        computing, moving = flops / matmul, moved / speeds.bandwidth
        return Bound(flops, moved, "matmul" if computing > moving else "bandwidth", max(computing, moving) / seconds)

    half = case.prompt + case.new // 2
    return {
        "prompt": bound(case.prompt, causal(case.prompt), case.prompt, first.median)
        if first and not about.rounds
        else None,
        "decode": bound(1, half, half, case.batch / rate.median) if rate else None,
    }
