"""The cost of preparing text for a training run: `python benchmarks/pipeline.py`.

1. Preparing alone: tokens/s of this process, and of worker processes; processor time for a million tokens, that of all
   processes and of what they started, which hardly depends on what else the machine does; how long until a worker
   answers.
2. Beside training: steps on text that is prepared meanwhile, against steps on the same kind of batches from memory, in
   pairs, one right after the other. A window as long as a pair's side has every side prepare as much as it uses up.
   What counts is the median of the pairs' ratios, workers' use of the processor included, and the time that a step
   waits for its batch.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import elm_mlx  # before MLX, for its BLAS
from elm_mlx.data.batches import Batch
from elm_mlx.data.filters import Filters
from elm_mlx.data.stream import Reading, TextBatches
from elm_mlx.data.text_sources import TextSource
from elm_mlx.data.workers import Encode, Pool
from elm_mlx.model.config import ModelConfig

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "examples/classics/tokenizer.model"
TEXTS = ROOT / "../shared/data/classics/train.jsonl.gz"
ROWS, LENGTH = 8, 256
# As the embedded model is.
CONFIG = {
    "num_layers": 8, "model_dim": 192, "head_dim": 32, "num_gqa_groups": 2, "normalize_qk_projections": True,
    "share_input_output_layers": True, "ffn_multipliers": (0.5, 4.0), "qkv_multipliers": (0.5, 1.0),
    "ffn_dim_divisor": 64, "rope_max_length": 1024, "max_context_length": 512, "vocab_size": 4096,
}  # fmt: skip


def opened(texts: Path, workers: int, window: int) -> TextBatches:
    """Opens batches of texts that are shuffled within `window` tokens, encoded by so many workers."""
    return TextBatches(
        [TextSource(str(texts))], TOKENIZER, Filters(), Reading(ROWS, LENGTH, 0, window, workers=workers)
    )


def alone(texts: Path, workers: int, seconds: float) -> str:
    """Tokens/s once everything has begun; processor time from the start to the end, and its share of training."""
    before = processor_seconds()
    with opened(texts, workers, ROWS * LENGTH * 16) as batches:
        next(batches)
        begun = time.perf_counter()
        first = batches.counts()[0].tokens
        while time.perf_counter() - begun < seconds:
            next(batches)
        tokens = batches.counts()[0].tokens
        speed = (tokens - first) / (time.perf_counter() - begun)
    used = (processor_seconds() - before) / tokens
    return f"| {workers} | {speed:,.0f} | {used * 1e6:.2f} | {used * 1e4:.2%} |"


def processor_seconds() -> float:
    """Returns the processor time of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def first_answer() -> float:
    """Seconds from the start of a worker until it has encoded a word."""
    begun = time.perf_counter()
    pool = Pool(1, TOKENIZER, Filters())
    pool.submit(Encode(["word"], "text")).result()
    taken = time.perf_counter() - begun
    pool.close()
    return taken


def stepper() -> Callable[[Batch], None]:
    """A function that makes one update by a batch."""
    import mlx.core as mx

    from elm_mlx.model.network import Model
    from elm_mlx.train.loop_settings import Schedule, Settings
    from elm_mlx.train.step import Step, global_norm

    mx.random.seed(0)
    model = Model(ModelConfig.scaled(**CONFIG))  # type: ignore[arg-type]
    step = Step(model, Settings(Schedule(1e-3, 1), weight_decay=0.1))

    def update(batch: Batch) -> None:
        loss, gradients, count = step.gradients(batch)
        norm = global_norm(gradients) / count
        step.apply(gradients, norm, count, 1e-3)
        mx.eval(loss, step.state())

    return update


def timed(update: Callable[[Batch], None], batches: Iterator[Batch], steps: int) -> tuple[float, float]:
    """Seconds in all, and those of them that went by until there was a batch."""
    begun, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        update(batch)
    return time.perf_counter() - begun, waited


def beside_training(texts: Path, workers: int, pairs: int, steps: int) -> str:
    """Returns a row: tokens/s trained, the share of waiting, and the time more than on batches from memory."""
    update = stepper()
    with opened(texts, workers, steps * ROWS * LENGTH) as live:
        memory = cycle(islice(live, steps))
        timed(update, memory, 4)  # compiled
        timed(update, live, steps)
        sides = [(timed(update, live, steps), timed(update, memory, steps)) for _ in range(pairs)]
    ratios = [prepared / held for (prepared, _), (held, _) in sides]
    waits = [waited / prepared for (prepared, waited), _ in sides]
    speed = statistics.median(steps * ROWS * LENGTH / prepared for (prepared, _), _ in sides)
    return (
        f"| {workers} | {speed:,.0f} | {statistics.median(waits):.2%} | {statistics.median(ratios) - 1:+.1%} "
        f"| {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="steps of a pair's side")
    parser.add_argument("--seconds", type=float, default=4, help="for each figure of preparing alone")
    options = parser.parse_args()
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, BLAS: {elm_mlx.blas.status().name}\n")
    print("| workers | tokens/s prepared | processor seconds for 1M tokens | of a core, training at 10,000 tokens/s |")
    print("| ---: | ---: | ---: | ---: |")
    for workers in (0, 1, 2):
        print(alone(options.texts, workers, options.seconds), flush=True)
    print(f"\nA worker's first answer: {statistics.median(first_answer() for _ in range(5)):.2f} s after its start\n")
    print("| workers | tokens/s trained | waiting for batches | time more than from memory | spread of the pairs |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for workers in (0, 1):
        print(beside_training(options.texts, workers, options.pairs, options.steps), flush=True)


if __name__ == "__main__":
    main()
