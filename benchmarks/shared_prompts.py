"""The gradients of a policy's answers, with prompts that are read once for several against prompts that are not.

    python benchmarks/shared_prompts.py [MODEL]

MODEL is the demo model by default, all of whose weights are trained. Answers have random tokens; each kind of batch is
timed in turns, and the medians' ratio is printed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import elm_mlx  # noqa: F401  before MLX, for its BLAS

# isort: split
import mlx.core as mx
import numpy as np

from elm_mlx.store.loading import open_model
from elm_mlx.train.loop_settings import Schedule, Settings
from elm_mlx.train.policy_gradient import PolicyGradient, WeighedAnswer, batches_of
from elm_mlx.train.step import Step

GROUPS, SAMPLES, ROWS, TURNS = 8, 8, 32, 3
LENGTHS = [(25, 11), (100, 11), (40, 40), (100, 40), (200, 40)]  # of prompts and answers


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "build/classics")
    model = open_model(path, "float32").model
    model.unfreeze()
    model.set_dtype(mx.float32)
    step = Step(model, Settings(Schedule(1e-4, 1)), None, PolicyGradient())
    print("| prompt | answers | shared | not shared | |\n| --- | --- | --- | --- | --- |")
    for prompt, answer in LENGTHS:
        answers = drawn(prompt, answer)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(1 + TURNS):
            for shared, found in seconds.items():
                started = time.perf_counter()
                for batch in batches_of(answers, ROWS, shared):
                    mx.eval(step.gradients(batch)[:2])
                found.append(time.perf_counter() - started)
        once, again = (median(seconds[shared][1:]) for shared in (True, False))  # the first compile
        print(f"| {prompt} tokens | {answer} | {once:.2f} s | {again:.2f} s | {again / once:.1f} times |", flush=True)


def drawn(prompt: int, answer: int) -> list[WeighedAnswer]:
    """Returns answers of about so many tokens, several to each prompt."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(GROUPS):
        ids = tuple(draw.integers(3, 1000, prompt).tolist())
        for length in draw.integers(3 * answer // 4, answer * 5 // 4 + 1, SAMPLES).tolist():
            tokens = tuple(draw.integers(3, 1000, length).tolist())
            made.append(WeighedAnswer(ids, tokens, (-1.0,) * length, float(draw.normal())))
    return made


if __name__ == "__main__":
    main()
