"""A model of another family against mlx-lm with the same weights in float32 and the same BLAS.

`OPENBLAS_NUM_THREADS=1 python benchmarks/other_model.py MODEL` gives milliseconds of processor time a token, medians of
rounds that take turns: with one thread that says something on a busy machine too, where tokens/s do not. On
one with nothing else to do, leave the variable out and look at the time. What mlx-lm does with weights as they are
stored is not measured: on a CPU that is too slow to wait for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import elm_mlx
from elm_mlx import device

# isort: split
import mlx.core as mx

from elm_mlx import generation
from elm_mlx.cache import make_prompt_cache
from elm_mlx.sampling import Sampler

PROMPT, ANSWER = 128, 16
Span = tuple[float, float]  # seconds: of time, and of processors
Round = Callable[[], tuple[Span, Span]]  # prompt, and tokens after the first


def main() -> None:
    parser = argparse.ArgumentParser(description="A model of another family, here and by mlx-lm.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, _ = elm_mlx.load(arguments.model, compute_dtype="float32")
    ids = [(i * 7919) % model.config.vocab_size for i in range(PROMPT)]
    sides: dict[str, Round] = {
        "elm-mlx": lambda: ours(model, ids),
        "mlx-lm, float32": by_mlx_lm(model, ids),
    }
    found: dict[str, list[tuple[Span, Span]]] = {name: [] for name in sides}
    for _ in range(arguments.rounds + 1):
        for name, timed in sides.items():
            found[name].append(timed())
    print(device.machine())
    for name, rounds in found.items():
        prompt, answer = zip(*rounds[1:], strict=True)  # the first warms up
        for what, spans, count in (("prompt", prompt, PROMPT), ("decode", answer, ANSWER - 1)):
            time_, processor = (statistics.median(span[i] for span in spans) / count for i in (0, 1))
            print(
                f"{name:<16} {what}  {1e3 * processor:6.2f} ms of processor time a token, {1e3 * time_:6.2f} ms of time"
                f" ({1 / time_:.1f} tokens/s; best {count / min(span[0] for span in spans):.1f})",
                flush=True,
            )


def ours(model: Any, ids: list[int]) -> tuple[Span, Span]:
    def tokens() -> Iterator[int]:
        caches, sampler = make_prompt_cache(model), Sampler()
        logits = generation.prefill(model, ids, caches)
        state = sampler.start([ids], 0)
        yield from (token for token, _ in generation.decode(model, caches, sampler, logits, state, ANSWER))

    return spans(tokens())


def spans(tokens: Iterator[Any]) -> tuple[Span, Span]:
    """Until the first token, and from there to the last."""
    times = [(time.perf_counter(), time.process_time())]
    for count, _ in enumerate(tokens, 1):
        if count in (1, ANSWER):
            times.append((time.perf_counter(), time.process_time()))
    first, second = ((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(times))
    return first, second


def by_mlx_lm(model: Any, ids: list[int]) -> Round:
    """Its own network and loop, with the arrays that `model` has."""
    from mlx.utils import tree_flatten
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import _get_classes

    network, arguments = _get_classes(dict(model.config.values))
    theirs = network(arguments.from_dict(dict(model.config.values)))
    theirs.load_weights(tree_flatten(model.parameters()))
    return lambda: spans(generate_step(mx.array(ids), theirs, max_tokens=ANSWER))


if __name__ == "__main__":
    main()
