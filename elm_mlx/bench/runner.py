"""A benchmark run: models made, sides started, cases measured in turn, results kept as they come.

Knows the order of these things, and that a machine that others use too is now faster, now slower: so all sides are
measured one right after the other, as often as is asked, and pairs are compared. Knows nothing of how results are
shown.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

from elm_mlx import device, files
from elm_mlx.bench import machine, models, sides, suites
from elm_mlx.bench.results import Results, Row
from elm_mlx.bench.sides import Programs, Side, Unavailable
from elm_mlx.bench.suites import Case, Suite
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import PRESETS, ModelConfig

_PAUSE = (
    0.25  # seconds before each measurement: a BLAS's threads spin on for a while after the other side's last product
)
_WARM_TOKENS = 8  # that follow the prompt in the measurement that doesn't count
Tell: TypeAlias = Callable[[str], None]


def run(
    suite: Suite,
    programs: Programs,
    save_to: Path,
    *,
    on_progress: Tell = lambda text: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Results:
    """Measure a suite. Ctrl-C or SIGTERM ends it with what there is; `complete` tells.

    Args:
        save_to: the JSON, written after each case from the first on that has figures; what is there stays till then.
        on_progress: told what is being done.
        on_row: told each case when it is done.

    Raises:
        InputError: the suite asks for what there is none of.
        ElmError: the results cannot be written.
    """
    suites.check(suite)
    if suite.compute_dtype is not None and suite.compute_dtype not in device.DTYPES:
        raise InputError(f"no compute dtype {suite.compute_dtype!r}; there are {', '.join(device.DTYPES)}")
    for name in dict.fromkeys(case.model for case in suite.cases):
        models.check(name)
    results = Results(suite.name, datetime.now(timezone.utc).isoformat(timespec="seconds"), machine.describe())
    with files.scratch_directory(save_to):  # or an hour might be lost to a directory that cannot be written
        if save_to.is_dir():
            raise ElmError(f"{save_to}: is a directory")
    save_to.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _terminable(), tempfile.TemporaryDirectory(prefix="elm-mlx-bench-") as scratch:
            for (model, precision), cases in groupby(suite.cases, lambda case: (case.model, case.precision)):
                group = _Group(suite, programs, results, save_to, on_progress, on_row)
                group.run(model, precision, list(cases), Path(scratch))
        results.complete = True
    except KeyboardInterrupt:
        pass
    if results.measured:
        results.save(save_to)
    return results


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


class _Group:
    """The cases of one model in one precision, for which every side is started once."""

    def __init__(
        self,
        suite: Suite,
        programs: Programs,
        results: Results,
        save_to: Path,
        on_progress: Tell,
        on_row: Callable[[Row], None],
    ):
        self._suite, self._programs, self._results = suite, programs, results
        self._save_to, self._on_progress, self._on_row = save_to, on_progress, on_row
        self._open: list[Side] = []
        self._skipped: dict[str, str] = {}

    def run(self, model: str, precision: str, cases: list[Case], scratch: Path) -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as own:
            try:
                if model in PRESETS:
                    needed = models.preset_memory(model, precision, self._suite.compute_dtype, cases)
                    models.check_memory(needed)  # before weights are made for it
                    self._on_progress(f"{model}, {precision}: making weights")
                path = models.prepare(model, precision, Path(own))
                config = models.config_of(path)
                self._start(path, models.memory_needed(path, config, self._suite.compute_dtype, cases))
                self._know(config)
                for case in cases:
                    self._finish(self._measure(case, config))
            except Unavailable as error:
                for case in cases:
                    self._finish(Row(case, skipped={"ours": str(error)}))
            finally:
                for side in self._open:
                    side.close()

    def _start(self, path: Path, needed: int) -> None:
        """Start the sides, ours first: what it computes in, the others are asked for. Raises Unavailable of ours."""
        dtype = self._suite.compute_dtype
        for name in ("ours", *self._suite.against):
            self._on_progress(f"{path.name}: loading, {name}")
            try:
                models.check_memory(needed)
                side = sides.start(name, path, dtype, self._programs)
            except Unavailable as error:
                if name == "ours":
                    raise
                self._skipped[name] = str(error)
                continue
            self._open.append(side)
            if name == "ours":
                dtype = side.about.dtype

    def _know(self, config: ModelConfig | None) -> None:
        """Measure the machine in the type that ours computes in, and the norm, unless that was done before."""
        about, speeds = self._open[0].about, self._results.speeds
        if about.dtype not in speeds.matmul:
            self._on_progress(f"measuring the machine in {about.dtype}")
            found = machine.measure([about.dtype])
            self._results.speeds = replace(
                found, matmul=speeds.matmul | found.matmul, bandwidth=max(speeds.bandwidth, found.bandwidth)
            )
        if self._suite.norms and config is not None:
            lengths = sorted({1, *(case.prompt for case in self._suite.cases)})
            for shape in ((1, length, config.model_dim) for length in lengths):
                if not any((norm.dtype, norm.shape) == (about.dtype, shape) for norm in self._results.norms):
                    self._results.norms.append(machine.measure_norm(about.dtype, *shape[1:]))

    def _measure(self, case: Case, config: ModelConfig | None) -> Row:
        row = Row(case, skipped=dict(self._skipped))
        if config is not None and case.prompt + case.new > config.max_context_length:
            row.skipped["ours"] = f"longer than the model's context of {config.max_context_length:,} tokens"
            return row
        for turn in range(self._suite.repeats + 1):
            for number, side in enumerate(list(self._open), 1):
                warming = turn == 0
                now = replace(case, new=min(case.new, _WARM_TOKENS)) if warming else case
                if side.name in row.skipped:
                    continue
                where = "warming up" if warming else f"{turn} of {self._suite.repeats}"
                self._on_progress(f"{case}: {where}, {side.name} ({number} of {len(self._open)})")
                time.sleep(_PAUSE)
                try:
                    figures = side.measure(now)
                except Unavailable as error:
                    self._give_up(side, row, str(error))
                    continue
                if not warming:
                    row.about[side.name] = side.about
                    row.figures.setdefault(side.name, []).append(figures)
        return row

    def _give_up(self, side: Side, row: Row, reason: str) -> None:
        """Go on without a side. One whose process has died is started for no other case either."""
        row.skipped[side.name] = reason
        row.figures.pop(side.name, None)
        if not side.alive():
            self._open.remove(side)
            self._skipped[side.name] = reason

    def _finish(self, row: Row) -> None:
        self._results.rows.append(row)
        if self._results.measured:
            self._results.save(self._save_to)
        self._on_row(row)
