"""One side of a comparison in a process of its own: load a model directory, read a prompt, decode; figures as JSON.

    worker.py PEER MODEL PROMPT_TOKENS NEW_TOKENS REPEATS

PEER is `ours`, `stock` (mlx-lm as it is installed) or `equal` (mlx-lm with our BLAS and weights in float32).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Tokens = Callable[[list[int], int], Iterator[Any]]


def ours(model: Path) -> Tokens:
    from elm_mlx import load, stream_generate

    network, _ = load(model)
    return lambda ids, count: stream_generate(network, None, ids, max_tokens=count, stop_at_eos=False)


def mlx_lm(model: Path, equal: bool) -> Tokens:
    if equal:
        import elm_mlx  # noqa: F401  (its BLAS must come before MLX)
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    network, _ = load_model(model)
    if equal:
        network.update(tree_map(lambda array: array.astype(mx.float32), network.parameters()))
        mx.eval(network.parameters())
    return lambda ids, count: generate_step(mx.array(ids), network, max_tokens=count)


def measure(tokens: Tokens, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Tokens a second of the prompt, its last token and the first new one included, and of what follows."""
    ids = [1] + [(i * 37) % 3000 + 3 for i in range(prompt_tokens - 1)]
    start = time.perf_counter()
    times = [time.perf_counter() for _ in tokens(ids, new_tokens)]
    return {
        "prompt": prompt_tokens / (times[0] - start),
        "decode": (len(times) - 1) / (times[-1] - times[0]),
    }


if __name__ == "__main__":
    peer, path, prompt, new, repeats = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    side = ours(path) if peer == "ours" else mlx_lm(path, equal=peer == "equal")
    measure(side, 8, 4)  # warm up
    print(json.dumps([measure(side, prompt, new) for _ in range(repeats)]))
