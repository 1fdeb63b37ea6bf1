"""What keys and values in 8 and 4 bits cost: memory, Kullback-Leibler divergence, perplexity, and speed.

    python benchmarks/kv_bits.py MODEL TEXT [--positions 6144] [--steps 32]

A text is read once for each kind of cache, all of them piece by piece side by side; the logits of each position are
compared with those of whole keys and values. Then tokens are decoded after it, a few of each kind in turn.
"""

from __future__ import annotations

import elm_mlx  # noqa: F401  before whatever imports MLX, for the sake of its BLAS

# isort: split
import argparse
import math
import time
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from elm_mlx.inference.rows import PREFILL_STEP, Rows
from elm_mlx.model import ops
from elm_mlx.model.cache import KVCache, make_prompt_cache
from elm_mlx.model.network import Model
from elm_mlx.store.loading import load

KINDS = (None, 8, 4)
_TURN = 8  # steps of a kind before the next kind's


def compare(model: Model, ids: list[int]) -> dict[int | None, tuple[list[KVCache], list[float], float, float]]:
    """Of each kind its caches, the divergence at each position, the sum of surprises in nats and seconds of reading."""
    caches = {kind: make_prompt_cache(model, kind) for kind in KINDS}
    divergences: dict[int | None, list[float]] = {kind: [] for kind in KINDS}
    surprise, seconds = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for start in range(0, len(ids), PREFILL_STEP):
        piece = ids[start : start + PREFILL_STEP]
        following = mx.array(ids[start + 1 : start + 1 + len(piece)])[:, None]
        whole = None
        for kind in KINDS:
            began = time.perf_counter()
            hidden = model.transformer(mx.array(piece)[None], caches[kind])
            mx.eval(hidden, [cache.state for cache in caches[kind]])
            seconds[kind] += time.perf_counter() - began
            logits = model.head(hidden)[0].astype(mx.float32)
            logprobs = logits - ops.logsumexp(logits)[:, None]
            whole = logprobs if whole is None else whole
            divergences[kind] += ops.kl_divergences(whole, logprobs).tolist()
            picked = mx.take_along_axis(logprobs[: following.shape[0]], following, axis=-1)
            surprise[kind] -= float(picked.sum().item())
    return {kind: (caches[kind], divergences[kind], surprise[kind], seconds[kind]) for kind in KINDS}


def paces(model: Model, found: dict[int | None, list[KVCache]], steps: int) -> dict[int | None, float]:
    """Seconds of a decoding step of each kind, the median of those after each first one."""
    rows = {}
    for kind, caches in found.items():
        rows[kind] = Rows(model)
        rows[kind].join(caches, None)
        mx.eval(rows[kind].step(mx.array([5])))  # traced
    times: dict[int | None, list[float]] = {kind: [] for kind in found}
    for _ in range(0, steps, _TURN):
        for kind, own in rows.items():
            for _ in range(_TURN):
                began = time.perf_counter()
                mx.eval(own.step(mx.array([5])))
                times[kind].append(time.perf_counter() - began)
    return {kind: median(each) for kind, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--positions", type=int, default=6144)
    parser.add_argument("--steps", type=int, default=32)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    ids = tokenizer.encode(options.text.read_text(encoding="utf-8"))[: options.positions]
    found = compare(model, ids)
    sizes = {kind: sum(cache.nbytes * cache.offset / cache.capacity for cache in found[kind][0]) for kind in KINDS}
    pace = paces(model, {kind: found[kind][0] for kind in KINDS}, options.steps)
    print(f"{options.model.name}, {len(ids):,} tokens of {options.text.name}\n")
    print("| keys and values | MB | KL, mean | 99 % | largest | perplexity | read | step |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind, (_, divergences, surprise, seconds) in found.items():
        kl = np.array(divergences)
        name = "as computed" if kind is None else f"{kind} bits"
        perplexity = math.exp(surprise / (len(ids) - 1))
        print(
            f"| {name} | {sizes[kind] / 1e6:.1f} | {kl.mean():.2g} | {np.quantile(kl, 0.99):.2g} | {kl.max():.2g} | "
            f"{perplexity:.3f} | {seconds / found[None][3]:.2f} | {pace[kind] / pace[None]:.2f} |"
        )
    print("\nKL in nats of the next token's distribution; reading and a step's time against those of whole ones.")


if __name__ == "__main__":
    main()
