"""Both sides of a roofline: the FLOPs and bytes of a model, by its shapes, and the speeds of a machine, measured.

A multiplication with its addition counts as 2 FLOPs. These are counted:

- weights of layers and head: `2 * outputs * inputs` for each token;
- attention: `4 * query heads * head_dim` in each layer for each position that each token sees, itself included, for
  the score and the weighted value, but not for positions that the causal mask hides.

Embeddings are looked up; norms, rotations, gates and the softmax are element-wise: no products, and not counted. Layers
are summed one by one, for each has its own widths. A decode step must read every weight once, but for an embedding
that is no head, and the keys and values of each position.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from elm_mlx.model.config import ModelConfig

HEAD = "lm_head"  # of every network that has one of its own
_READS = re.compile(r"\b(qkv|q|k|v)_proj\b")  # what a layer reads every token by
_SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of the products that are tried
_FASTER = 1.2  # so many times as fast, larger ones are worth a try
_LEAST = 3  # products of each kind: someone else may be using the machine
_MATRIX_BYTES = 1 << 28  # more than any cache holds


class Shaped(Protocol):
    """A config that knows the shapes of its network's weights, by name."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...


@dataclass(frozen=True)
class Cost:
    """The FLOPs of one token.

    Attributes:
        linear: of each layer's weights.
        attention: of each layer, for each position that the token sees.
        head: of its logits.
        unread: of the last layer's weights, those that a token does without whose hidden state nobody reads.
    """

    linear: tuple[int, ...]
    attention: tuple[int, ...]
    head: int
    unread: int = 0

    @classmethod
    def of(cls, config: Shaped) -> Cost:
        """Counts an OpenELM's; of another network all but attention."""
        matrices = {name: 2 * math.prod(shape) for name, shape in config.shapes().items() if len(shape) == 2}
        linear = [0] * (1 + max(layer_of(name) or 0 for name in matrices))
        outside = []  # embedding, and head where there is one
        for name, flops in matrices.items():
            layer = layer_of(name)
            if layer is None:
                outside.append((name.startswith(HEAD), flops))
            else:
                linear[layer] += flops
        attention = [0] * len(linear)
        if isinstance(config, ModelConfig):
            attention = [4 * heads * config.head_dim for heads in config.num_query_heads]
        reading = (
            flops for name, flops in matrices.items() if layer_of(name) == len(linear) - 1 and _READS.search(name)
        )
        return cls(tuple(linear), tuple(attention), max(outside)[1] if outside else 0, linear[-1] - sum(reading))

    def forward(self, tokens: int, seen: int, logits: int) -> int:
        """Returns the FLOPs of a forward pass.

        Args:
            tokens: the number of tokens.
            seen: the number of positions that each of them sees, summed: see `causal`.
            logits: the number of tokens that go through the head.
        """
        return tokens * sum(self.linear) + seen * sum(self.attention) + logits * self.head


def layer_of(name: str) -> int | None:
    """Returns the number of the layer that a weight or module is in, if it is in one."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found[1]) if found else None


def causal(length: int, past: int = 0) -> int:
    """Returns the number of positions that `length` tokens see, summed, with `past` ones before them."""
    return length * past + length * (length + 1) // 2


def matmul_speed(dtype: mx.Dtype, seconds: float = 0.25) -> float:
    """Measures the FLOP/s of a product of two square matrices: the best of as many as fit into about `seconds`.

    They have 256 rows at first, and twice as many whenever that was clearly faster than before, up to 8192: a slow
    machine is asked for little and a fast one for enough. Other work on the machine makes the figure smaller.
    """
    keys = mx.random.split(mx.random.key(0))  # of our own: the process's random state stays as it is
    deadline, best = time.perf_counter() + seconds, 0.0
    for side in _SIDES:
        left, right = (mx.random.uniform(-1, 1, (side, side), key=key).astype(dtype) for key in keys)
        mx.eval(left, right)
        smaller, speed = best, 0.0
        while speed <= _FASTER * smaller or side == _SIDES[-1]:
            speed = max(speed, 2 * side**3 / _timed(left, right))
            best = max(best, speed)
            if time.perf_counter() > deadline:
                return best
    return best


def read_bandwidth(seconds: float = 0.25) -> float:
    """Measures the bytes a second of a row times a float32 matrix of 268 MB: the best of what fits into `seconds`.

    Decoding is made of such products, and bound by reading.
    """
    columns = 4096
    matrix = mx.zeros((_MATRIX_BYTES // 4 // columns, columns)) + 1.0
    row = mx.ones((1, columns))
    mx.eval(matrix, row, row @ matrix.T)
    times, deadline = [_timed(row, matrix.T)], time.perf_counter() + seconds
    while len(times) < _LEAST or time.perf_counter() < deadline:
        times.append(_timed(row, matrix.T))
    return _MATRIX_BYTES / min(times)


def _timed(left: mx.array, right: mx.array) -> float:
    started = time.perf_counter()
    mx.eval(left @ right)
    return time.perf_counter() - started
