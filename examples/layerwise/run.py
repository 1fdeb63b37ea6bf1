"""Layer-wise against uniform scaling, with as many parameters and FLOPs: `python examples/layerwise/run.py`.

Trains what study.py lists, as many models at a time as there are processors, each on one of them. Stopped and run
again, it goes on where it was; what `records.jsonl` in --out has is not trained again. page.py makes tables of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, RLock

HERE = Path(os.path.relpath(Path(__file__).parent))
sys.path.append(str(HERE.parent))

import books as texts  # noqa: E402
import study  # noqa: E402
from command import elm  # noqa: E402
from study import Cell, Record, Training  # noqa: E402

from elm_mlx import files  # noqa: E402

CLASSICS = HERE.parent / "classics"
RECORDS, RECORD, INTERRUPTED = "records.jsonl", "record.json", 130
RATES = (0.008, 0.016)  # and beyond, while the best of them is the first or the last
MOST_RATES = 7
QUICK = ["optimizer.steps=4", "optimizer.warmup=1", "run.batch_size=2", "data.validation_rows=4", "data.window=2048"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare layer-wise with uniform scaling.")
    parser.add_argument("--books", type=Path, default=CLASSICS / "extract.jsonl.gz", help="what is trained on")
    parser.add_argument("--held-out", type=Path, default=CLASSICS / "held-out.jsonl.gz", help="what is measured on")
    parser.add_argument("--out", type=Path, default=Path("build/layerwise"), help="where everything is written")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="trainings side by side")
    parser.add_argument("--quick", action="store_true", help="four updates, two rates, two seeds: only to see it run")
    arguments = parser.parse_args()
    out, quick = arguments.out, arguments.quick
    fields = prepare(arguments.books, out) + (QUICK if quick else [])
    trainings = Trainings(out, arguments.held_out, fields, 16 if quick else None)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: trainings.stop())
    with files.hold(out), ThreadPoolExecutor(arguments.at_once) as pool:
        for cells in study.PARTS[:1] if quick else study.PARTS:
            if quick:
                cells = tuple(replace(cell, seeds=study.SEEDS[:2]) for cell in cells)
            for failure in pool.map(lambda cell: fill(trainings, cell, len(RATES) if quick else MOST_RATES), cells):
                if failure:
                    sys.exit(failure)


def prepare(books: Path, out: Path) -> list[str]:
    """Writes documents and a vocabulary into `out`, unless they are there; returns the recipe's fields that say so."""
    data, tokenizer = out / "data", out / "tokenizer.model"
    if not tokenizer.exists():
        texts.write_documents(books, data)
        vocabulary = ["--vocab-size", 1024, "--character-coverage", 0.9995]
        elm("train-tokenizer", data / "train.jsonl", "--out", tokenizer, *vocabulary)
    source = f'[{{path = "{data / "train.jsonl"}"}}]'
    return [f"tokenizer={tokenizer}", f"data.validation={data / 'watched.jsonl'}", f"data.sources={source}"]


class Stopped(Exception):
    """Somebody ended the study, or a training failed; the text says how."""


def fill(trainings: Trainings, cell: Cell, most_rates: int) -> str | int | None:
    """Trains a cell's models. Returns what the program is to end with if that came to nothing."""
    try:
        kind = Training(cell.size, cell.shape, cell.initial, study.TRIAL, 0, 0)
        tried = tune(lambda rate: trainings.watched_loss(replace(kind, rate=rate)), RATES, most_rates)
        best = min(tried, key=tried.__getitem__)
        for seed in cell.seeds:
            for times in cell.times:
                trainings.record(replace(kind, budget=cell.budget, rate=times * best, seed=seed))
    except Stopped as stopped:
        trainings.stop()
        return stopped.args[0]
    return None


def tune(loss: Callable[[float], float], rates: Sequence[float], most: int) -> dict[float, float]:
    """Returns losses by learning rate: rates are halved or doubled until the best lies between two that are worse."""
    tried = {rate: loss(rate) for rate in rates}
    while len(tried) < most:
        best = min(tried, key=tried.__getitem__)
        if best not in (min(tried), max(tried)):
            break
        rate = best / 2 if best == min(tried) else best * 2
        tried[rate] = loss(rate)
    return dict(sorted(tried.items()))


class Trainings:
    """The study's trainings, each a process, and what has come of them.

    Args:
        held_out: books that are measured on; `windows` of each, or all.
        fields: of the recipe, for all of them.
    """

    def __init__(self, out: Path, held_out: Path, fields: Sequence[str], windows: int | None) -> None:
        self._out, self._held_out, self._fields, self._windows = out, held_out, list(fields), windows
        self._lock, self._stopping = RLock(), Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._records = study.read(out / RECORDS)

    def watched_loss(self, training: Training) -> float:
        """Returns nats a token at the end, on documents that are not trained on; infinite where it broke off."""
        last = self.record(training)["validation"][-1][1]
        return math.inf if last is None else float(last)

    def record(self, training: Training) -> Record:
        """Returns a training's record, and trains first where there is none. Raises Stopped."""
        if training not in self._records:
            made = self._trained(training)
            with self._lock:
                self._records[training] = made
                files.write_json_lines(self._out / RECORDS, self._records.values())
            print(f"{training.name}: {made['validation'][-1][1]}, {made['tokens_per_second']:,} tokens/s", flush=True)
        return self._records[training]

    def stop(self) -> None:
        """Ends all trainings, each after an update."""
        with self._lock:  # none is just being started, then
            self._stopping.set()
            for process in self._running:
                process.send_signal(signal.SIGINT)

    def _trained(self, training: Training) -> Record:
        directory = self._out / "runs" / training.name
        directory.mkdir(parents=True, exist_ok=True)
        asked = {
            "training": asdict(training), "out": str(directory), "fields": self._fields, "windows": self._windows,
            "held_out": str(self._held_out) if training.seed else None,
        }  # fmt: skip
        command = [sys.executable, str(HERE / "training.py"), json.dumps(asked)]
        with self._lock:
            if self._stopping.is_set():
                raise Stopped(INTERRUPTED)
            # On one processor each, two trainings do half as much again as one after the other on both.
            process = subprocess.Popen(command, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.remove(process)
        if code:
            interrupted = code in (INTERRUPTED, -signal.SIGINT) or self._stopping.is_set()
            raise Stopped(INTERRUPTED if interrupted else f"{training.name} ended with exit code {code}")
        made: Record = json.loads((directory / RECORD).read_text("utf-8"))
        return made


if __name__ == "__main__":
    main()
