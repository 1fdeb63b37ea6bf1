"""A run's files for people and programs, written and read back: `metrics.jsonl`, and `run.json` beside it.

Any numeric key of a line is a column over steps. A run may still be under way: a last line without its end is left for
later. Imports no MLX.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elm_mlx import files, reading
from elm_mlx.callbacks import Report
from elm_mlx.directories import RUN_RECORD
from elm_mlx.errors import ElmError, InputError
from elm_mlx.version import __version__

METRICS = "metrics.jsonl"
# What a column is seen against, and a mark that validations' losses tell: no columns.
_NO_COLUMN = ("step", "seconds", "tokens", "trained_tokens", "best")


@dataclass
class Column:
    """The values of one key; steps rise. What came no number is NaN or infinite here too."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> bool:
        """Appends; where the run has gone back to `step`, what it had from there on is replaced. True if it has."""
        before = len(self.steps)
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        went_back = len(self.steps) < before
        self.steps.append(step)
        self.values.append(value)
        return went_back

    def add_up(self, step: int, value: float) -> bool:
        """Appends the sum of `value` and all before `step`."""
        before = bisect_left(self.steps, step)
        return self.add(step, (self.values[before - 1] if before else 0.0) + value)

    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


@dataclass
class RunMetrics:
    """The metrics of one run, read from its directory.

    Attributes:
        name: what tells it from the others that it was read with.
        about: `run.json`, nested keys joined by dots, values as text; empty where there is none.
        columns: by key, in the order of their first lines; `skipped` is 0 or 1.
        tokens, seconds: spent in updates up to and with each one; validations are in neither.
        samples: of the first and of the last validation that asked the model, their steps, and verdict, prompt and
            answer of each.
        notes: what a reader should know of the files, a sentence each.
    """

    name: str
    path: Path
    about: dict[str, str] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)
    tokens: Column = field(default_factory=Column)
    seconds: Column = field(default_factory=Column)
    samples: list[tuple[int, list[tuple[str, ...]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def column(self, key: str) -> Column:
        return self.columns.get(key, Column())

    @property
    def steps(self) -> int:
        """Updates made."""
        return max((column.steps[-1] for column in self.columns.values()), default=0)


def describe(out: Path, about: Mapping[str, Any]) -> None:
    """Writes a run's settings and its machine beside its metrics. Raises ElmError."""
    from elm_mlx import device

    values = {**about, "machine": device.machine(), "version": __version__}
    files.write_json(out / RUN_RECORD, values)


def line_of(report: Report) -> dict[str, Any]:
    """Returns a report's values by their names in the metrics; those of None are left out."""
    values = {name: value for name, value in asdict(report).items() if value is not None}
    prefix = next((split for split in ("valid_", "test_") if f"{split}loss" in values), "")
    return values | {prefix + name: value for name, value in values.pop("measures").items()}


def append(out: Path, report: Report) -> None:
    """Appends a line to the run's metrics. Raises ElmError."""
    try:
        with (out / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line_of(report)) + "\n")
    except OSError as error:
        on = "--resume goes on from the last checkpoint"
        raise ElmError(f"{out / METRICS}: cannot be written: {error.strerror}; {on}") from None


def cut(out: Path, step: int) -> None:
    """Drops the lines of steps after `step`, tests, which are made of a run's end, and a line that was cut short."""
    path = out / METRICS
    if path.exists():
        kept = (line for line, found in _values_of(path) if found["step"] <= step and "test_loss" not in found)
        files.write_text(path, "".join(f"{line}\n" for line in kept))


def lines_of(out: Path, first: int, last: int) -> list[dict[str, Any]]:
    """Returns what the run's metrics have of the steps from `first` to `last`: updates, validations, tests."""
    path = out / METRICS
    return [found for _, found in _values_of(path) if first <= found["step"] <= last] if path.exists() else []


def _values_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each line that can be read, as it stands and as values; not the half that a killed run may have left."""
    for line in reading.content(path, reading.CORPUS_BYTES).decode(errors="replace").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int | float):
            yield line, found


def read(paths: Sequence[Path]) -> list[RunMetrics]:
    """Reads the runs in these directories, each once, in this order.

    Raises:
        InputError: one is no directory, or there is no line of metrics to read in it.
    """
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    return [_read(path, name) for path, name in zip(unique.values(), _names(list(unique)), strict=True)]


def readable(text: str) -> str:
    """Returns `text` as UTF-8 can hold it: names of files may be no text at all."""
    return text.encode("utf-8", "replace").decode()


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns for each absolute path as many of its last parts as distinguish it from the others."""
    names = []
    for path in paths:
        count = 1
        while any(other.parts[-count:] == path.parts[-count:] for other in paths if other != path):
            count += 1
        names.append(readable("/".join(path.parts[-count:])))
    return names


def _read(path: Path, name: str) -> RunMetrics:
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give the directory that a run was written to")
    run = RunMetrics(name, path)
    damaged = repeated = 0
    for line in _lines(path / METRICS):
        try:
            repeated += _take(run, json.loads(line))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged += 1
    if not run.columns:
        raise InputError(f"{path / METRICS}: holds no line that can be read" + (" yet" if not damaged else ""))
    if damaged:
        run.notes.append(f"{damaged:,} damaged {'line' if damaged == 1 else 'lines'} in {METRICS} left out")
    if repeated:
        times = "once" if repeated == 1 else f"{repeated:,} times"
        run.notes.append(f"the run went back {times}; of each step, the last is shown")
    valid = run.column("valid_loss")
    if valid.steps[1:] and valid.steps[0] == 0 and not min(valid.values[1:]) < valid.values[0]:
        run.notes.append("no validation's loss is below the one before training: the model has become worse")
    run.about = _about(run)
    return run


def _lines(path: Path) -> Iterator[bytes]:
    """Returns the lines that are whole; the last one too if only its end is missing."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give the directory that a run was written to")
    with reading.opened(path) as file:
        while line := reading.limited_line(file, reading.SETTINGS_BYTES, str(path)):
            if line.strip() and (line.endswith(b"\n") or _is_json(line)):
                yield line


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _take(run: RunMetrics, line: Any) -> bool:
    """Adds a line's numbers. Returns whether the run went back with it. Raises what a line that is none makes raise."""
    step = line["step"]
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise ValueError(step)
    numbers = {key: float(value) for key, value in line.items() if isinstance(value, int | float)}
    went_back = False
    if "loss" in numbers:
        for total, key in ((run.tokens, "tokens"), (run.seconds, "seconds")):
            spent = numbers.get(key, 0.0)
            went_back = total.add_up(step, spent if 0 <= spent < math.inf else 0.0)
    for key, value in numbers.items():
        if key not in _NO_COLUMN:
            run.columns.setdefault(readable(key), Column()).add(step, value)
    if "samples" in line:
        shown = [
            tuple(readable(str(each[part])) for part in ("verdict", "prompt", "answer")) for each in line["samples"]
        ]
        run.samples[1:] = [(step, shown)]
    return went_back


def _about(run: RunMetrics) -> dict[str, str]:
    path = run.path / RUN_RECORD
    try:
        found = reading.json_object_if_there(path)
        return dict(_flat("", found)) if found else {}
    except InputError:
        run.notes.append(f"{RUN_RECORD} cannot be read")
        return {}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield readable(prefix), readable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
