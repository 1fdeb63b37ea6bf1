"""A benchmark run: models made, sides started, cases measured in turn, results kept as they come.

A machine that others use too is now faster, now slower: so all sides are measured one right after the other, as often
as is asked, and pairs are compared.
"""

from __future__ import annotations

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
from elm_mlx.bench import machine, measured_models, sides, suites
from elm_mlx.bench.results import Results, Row
from elm_mlx.bench.sides import Programs, Side, Unavailable
from elm_mlx.bench.suites import Case, Suite
from elm_mlx.callbacks import OnProgress, no_progress
from elm_mlx.errors import ElmError, InputError
from elm_mlx.model.config import PRESETS, ModelConfig

_PAUSE = 0.25  # seconds before each measurement: a BLAS's threads spin on after another side's last product
_WARM_TOKENS = 8  # that follow the prompt in the measurement that doesn't count


def run(
    suite: Suite,
    programs: Programs,
    save_to: Path,
    *,
    on_progress: OnProgress = no_progress,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Results:
    """Measures a suite. Ctrl-C or SIGTERM ends it with what there is; `complete` tells.

    Args:
        save_to: the JSON, written after each case from the first on that has figures; an old file stays till then.
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
    results = Results(suite.name, datetime.now(timezone.utc).isoformat(timespec="seconds"), machine.describe())
    with files.scratch_directory(save_to):  # or an hour might be lost to a directory that cannot be written
        if save_to.is_dir():
            raise ElmError(f"{save_to}: is a directory")
    save_to.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _terminable(), tempfile.TemporaryDirectory(prefix="elm-mlx-bench-") as scratch:
            for (model, precision), cases in groupby(suite.cases, lambda case: (case.model, case.precision)):
                group = _SameModel(suite, programs, results, on_progress)
                with closing(group.rows(model, precision, list(cases), Path(scratch))) as rows:
                    for row in rows:
                        results.rows.append(row)
                        if results.measured:
                            results.save(save_to)
                        on_row(row)
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


@dataclass
class _SameModel:
    """The cases of one model in one precision, for which every side is started once."""

    suite: Suite
    programs: Programs
    results: Results
    on_progress: OnProgress
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
                self._measure_machine(config)
            except Unavailable as error:
                yield from (Row(case, skipped={"ours": str(error)}) for case in cases)
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
                dtype = side.about.dtype

    def _measure_machine(self, config: ModelConfig | None) -> None:
        """Measures the machine in the type that ours computes in, and the norm, unless that was done before."""
        dtype, speeds, norms = self.open[0].about.dtype, self.results.speeds, self.results.norms
        if dtype not in speeds.matmul:
            self.on_progress(f"measuring the machine in {dtype}")
            time.sleep(_PAUSE)
            found = machine.measure(dtype)
            self.results.speeds = replace(
                found, matmul=speeds.matmul | found.matmul, bandwidth=max(speeds.bandwidth, found.bandwidth)
            )
        if self.suite.norms and config is not None:
            for length in sorted({1, *(case.prompt for case in self.suite.cases)}):
                if all((norm.dtype, norm.shape) != (dtype, (1, length, config.model_dim)) for norm in norms):
                    norms.append(machine.measure_norm(dtype, length, config.model_dim))

    def _measure(self, case: Case, config: ModelConfig | None) -> Row:
        row = Row(case, skipped=dict(self.skipped))
        if config is not None and case.prompt + case.new > config.max_context_length:
            row.skipped["ours"] = f"longer than the model's context of {config.max_context_length:,} tokens"
            return row
        warm = replace(case, new=min(case.new, _WARM_TOKENS))
        for turn in range(self.suite.repeats + 1):
            where = f"{turn} of {self.suite.repeats}" if turn else "warming up"
            ours: list[int] = []
            for number, side in enumerate(list(self.open), 1):
                if side.name in row.skipped:
                    continue
                self.on_progress(f"{case}: {where}, {side.name} ({number} of {len(self.open)})")
                time.sleep(_PAUSE)
                try:
                    figures, text = side.measure(case if turn else warm)
                except Unavailable as error:
                    row.skipped[side.name] = str(error)
                    row.figures.pop(side.name, None)
                    if not side.alive():  # nor is it started for another case
                        self.open.remove(side)
                        self.skipped[side.name] = str(error)
                    continue
                if turn:
                    row.about[side.name] = side.about
                    row.figures.setdefault(side.name, []).append(figures)
                    if side.name == "ours":
                        ours = text
                    else:
                        row.compare(side.name, text, ours)
        return row
