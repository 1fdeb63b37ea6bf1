"""A benchmark run: models made, sides started, cases measured in turn, results kept as they come.

A machine that others use too is now faster, now slower: so all sides are measured one right after the other, as often
as is asked, and pairs are compared.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from itertools import groupby
from pathlib import Path

from elm_mlx import device, files
from elm_mlx.bench import conditions, machine, measured_models, results, sides, suites
from elm_mlx.bench.conditions import Conditions
from elm_mlx.bench.results import Results, Row, Speeds
from elm_mlx.bench.sides import Programs, Side, Unavailable
from elm_mlx.bench.suites import Case, Measured, Suite
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import PRESETS, ModelConfig

_PAUSE = 0.25  # seconds before each measurement: a BLAS's threads spin on after another side's last product
_COOLING, _LOOK = 300.0, 5.0  # seconds at most until a Mac that is hot has cooled, and from look to look
_WARM_TOKENS = 8  # that follow the prompt in the measurement that doesn't count


def run(
    suite: Suite,
    programs: Programs,
    save_to: Path,
    *,
    note: str = "",
    on_note: Callable[[str], None] = lambda text: None,
    on_progress: OnProgress = no_progress,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Results:
    """Measures a suite. Ctrl-C or SIGTERM ends it with what there is; `complete` tells.

    Args:
        save_to: the JSON, written after each turn from the first on that has figures; an old file stays till then. One
            of the same suite, machine and code that was interrupted is gone on with.
        note: what a reader should know of the machine beside what it says itself.
        on_note: called before anything is measured with why the machine may be slow, and with what there is already.
        on_row: called with each case when it is done.

    Raises:
        InputError: the suite has an unknown side, precision, type or model.
        ElmError: the results cannot be written.
    """
    suites.check(suite)
    if suite.compute_dtype is not None and suite.compute_dtype not in device.DTYPES:
        raise InputError(f"compute dtype {suite.compute_dtype!r} is not one of {', '.join(device.DTYPES)}")
    for name in dict.fromkeys(case.model for case in suite.cases):
        measured_models.check(name)
    if programs.gguf is not None and len({(case.model, case.precision) for case in suite.cases}) > 1:
        raise InputError(f"--gguf {programs.gguf}: is one model: measure one at a time")
    found = _begun(suite, save_to, alone=programs.gguf is not None or programs.kvp is not None)
    found.load, found.note = max(found.load, conditions.load()), note or found.note
    with files.scratch_directory(save_to):  # or an hour might be lost to a directory that cannot be written
        if save_to.is_dir():
            raise ElmError(f"{save_to}: is a directory")
    for reason in conditions.warnings([conditions.read()], found.load, os.cpu_count()):
        on_note(f"the machine may be slower than it can be: {reason}")
    if found.rows:
        count = sum(row.done(suite) for row in found.rows)
        on_note(f"{save_to} has {count} of {len(suite.cases)} cases, and is gone on with; remove it to measure anew")
    try:
        with _terminable(), tempfile.TemporaryDirectory(prefix="elm-mlx-bench-") as scratch:
            done = {row.case for row in found.rows if row.done(suite)}
            left = [case for case in suite.cases if case not in done]
            for (model, precision), cases in groupby(left, lambda case: (case.model, case.precision)):
                group = _SameModel(suite, programs, found, save_to, on_progress)
                with closing(group.rows(model, precision, list(cases), Path(scratch))) as rows:
                    for row in rows:
                        on_row(row)
        found.complete = all(row.done(suite) or "ours" in row.skipped for row in found.rows)
    except KeyboardInterrupt:
        pass
    if found.measured:
        found.save(save_to)
    return found


def _begun(suite: Suite, path: Path, alone: bool) -> Results:
    """Returns what an interrupted run of the same suite, with the same code on this machine, has left in `path`; or
    results without rows, as where it runs `alone`, with files that results do not name."""
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    new = Results(suite, when, machine.describe(), machine.commit())
    try:
        old = results.load(path)
    except InputError:  # there is none, or it is something else
        return new
    if alone or old.complete or (old.suite, old.machine, old.commit) != (new.suite, new.machine, new.commit):
        return new
    return replace(old, rows=[row for row in old.rows if row.figures])  # for others there may be room now


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C: seeded weights are removed, and workers ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)


@dataclass
class _SameModel:
    """The cases of one model in one precision, for which every side is started once."""

    suite: Suite
    programs: Programs
    results: Results
    save_to: Path
    on_progress: OnProgress
    dtype: str = ""  # that ours computes in
    last: Conditions | None = None
    open: list[Side] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def rows(self, model: str, precision: str, cases: list[Case], scratch: Path) -> Generator[Row, None, None]:
        dtype = self.suite.compute_dtype
        with tempfile.TemporaryDirectory(dir=scratch) as own:
            try:
                if model in PRESETS:  # before weights are made for it
                    preset = ModelConfig.preset(model)
                    stored = measured_models.stored_bytes(preset, precision)
                    measured_models.check_memory(measured_models.memory_needed(preset, stored, dtype, cases))
                    self.on_progress(f"{model}, {precision}: making weights")
                path = measured_models.prepare(model, precision, Path(own))
                config = measured_models.config_of(path)
                stored = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
                self._start(path, partial(measured_models.memory_needed, config, stored, dtype, cases))
                self._measure_norms(config)
            except Unavailable as error:
                for case in cases:
                    row = self._row(case)
                    if not row.figures:
                        row.skipped["ours"] = str(error)
                    self._keep(row)
                    yield row
            else:
                yield from (self._measure(case, config) for case in cases)
            finally:
                for side in self.open:
                    side.close()

    def _start(self, path: Path, needed: Callable[[str], int]) -> None:
        """Starts the sides, ours first: the others compute in the same type. Raises Unavailable of ours.

        `needed` tells the bytes that a side takes.
        """
        dtype = self.suite.compute_dtype
        for name in ("ours", *self.suite.against):
            self.on_progress(f"{path.name}: loading, {name}")
            try:
                measured_models.check_memory(needed(name))
                side = sides.start(name, path, dtype, self.programs)
            except Unavailable as error:
                if name == "ours":
                    raise
                self.skipped[name] = str(error)
                continue
            self.open.append(side)
            if name == "ours":
                dtype = self.dtype = side.about.dtype

    def _measure_norms(self, config: ModelConfig | None) -> None:
        """Measures the norm by itself in the type that ours computes in, unless that was done before."""
        dtype, norms = self.dtype, self.results.norms
        if self.suite.norms and config is not None:
            for length in sorted({1, *(case.prompt for case in self.suite.cases)}):
                if all((norm.dtype, norm.shape) != (dtype, (1, length, config.model_dim)) for norm in norms):
                    norms.append(machine.measure_norm(dtype, length, config.model_dim))

    def _read_conditions(self) -> Conditions:
        """Reads the machine's state and measures its speeds, the best of which count as the machine's."""
        dtype, speeds = self.dtype, self.results.speeds
        self.on_progress(f"measuring the machine in {dtype}")
        read = conditions.read()
        time.sleep(_PAUSE)
        found = machine.measure(dtype)
        best = {dtype: max(found.matmul[dtype], speeds.matmul.get(dtype, 0.0))}
        self.results.speeds = Speeds(speeds.matmul | best, max(speeds.bandwidth, found.bandwidth))
        return replace(read, matmul=found.matmul[dtype], bandwidth=found.bandwidth)

    def _cool(self) -> None:
        """Waits until a Mac that is hot has cooled, for some minutes at most."""
        ends = time.monotonic() + _COOLING
        while conditions.heat() not in (None, "nominal") and time.monotonic() < ends:
            self.on_progress("waiting until the machine has cooled")
            time.sleep(_LOOK)

    def _measure(self, case: Case, config: ModelConfig | None) -> Row:
        row = self._row(case)
        if config is not None and case.prompt + case.new > config.max_context_length:
            row.skipped["ours"] = f"longer than the model's context of {config.max_context_length:,} tokens"
            self._keep(row)
            return row
        self._cool()
        self.last = self.last or self._read_conditions()  # what follows one case precedes the next
        row.conditions.append(self.last)
        self._turn(row, replace(case, new=min(case.new, _WARM_TOKENS)), "warming up")
        for turn in range(len(row.figures.get("ours", ())), self.suite.repeats):
            measured = self._turn(row, case, f"{turn + 1} of {self.suite.repeats}")
            ours: list[int] = next((text for side, (_, text) in measured if side.name == "ours"), [])
            for side, (figures, text) in measured:
                row.about[side.name] = side.about
                row.figures.setdefault(side.name, []).append(figures)
                if side.name != "ours":
                    row.compare(side.name, text, ours)
            self._keep(row)
        self.last = self._read_conditions()
        row.conditions.append(self.last)
        self._keep(row)
        return row

    def _turn(self, row: Row, case: Case, where: str) -> list[tuple[Side, Measured]]:
        """Measures each side once, ours first; one that cannot be measured is left out of the row from then on."""
        measured = []
        for number, side in enumerate(list(self.open), 1):
            if side.name in row.skipped:
                continue
            self.on_progress(f"{row.case}: {where}, {side.name} ({number} of {len(self.open)})")
            time.sleep(_PAUSE)
            try:
                measured.append((side, side.measure(case)))
            except Unavailable as error:
                self._leave_out(row, side.name, str(error))
                if not side.alive():  # nor is it started for another case
                    self.open.remove(side)
                    self.skipped[side.name] = str(error)
        return measured

    def _row(self, case: Case) -> Row:
        """Returns the row of a case, with the turns that an interrupted run has left of it."""
        row = next((row for row in self.results.rows if row.case == case), Row(case))
        for side, reason in self.skipped.items():
            self._leave_out(row, side, reason)
        return row

    def _leave_out(self, row: Row, side: str, reason: str) -> None:
        row.skipped[side] = reason
        for kept in (row.figures, row.about, row.alike):
            kept.pop(side, None)

    def _keep(self, row: Row) -> None:
        """Saves the results with what the row has now."""
        rows = self.results.rows
        if row not in rows:
            rows.append(row)
            rows.sort(key=lambda each: self.suite.cases.index(each.case))
        if self.results.measured:
            self.results.save(self.save_to)
