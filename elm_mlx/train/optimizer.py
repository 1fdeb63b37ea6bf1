"""How parameters move: the learning rate at each step, the optimizer, the limit on the gradients' norm.

Knows gradients as trees of arrays, and nothing of where they come from. Weight decay falls on matrices alone:
what has one dimension (norms' weights, DoRA's magnitudes) scales, and is not to be pulled to nought.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from elm_mlx.errors import InputError, counted

SHAPES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "adafactor")


@dataclass(frozen=True)
class Schedule:
    """The learning rate by step: up in a straight line, then down.

    Args:
        peak: the highest.
        steps: how many there are in all, `warmup` included.
        warmup: steps from `start` to `peak`.
        shape: "cosine", "linear" or "constant" after that.
        end: what share of `peak` is left at the last step; of no effect on "constant".
        start: where warm-up begins.

    Raises:
        InputError: a value makes no schedule.
    """

    peak: float
    steps: int
    warmup: int = 0
    shape: str = "cosine"
    end: float = 0.1
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InputError(f"no learning rate schedule {self.shape!r}; there are {', '.join(SHAPES)}")
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise InputError(f"the learning rate must be above 0, not {self.peak}")
        if self.steps < 1:
            raise InputError(f"a run has at least 1 update, not {self.steps}")
        if not 0 <= self.warmup <= self.steps:
            raise InputError(f"warm-up of {counted(self.warmup, 'update')} does not fit in {self.steps}")

    def __call__(self, step: int) -> float:
        """The rate of update number `step`, counted from 0."""
        if step < self.warmup:
            return self.start + (self.peak - self.start) * (step + 1) / self.warmup
        if self.shape == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup) / max(1, self.steps - 1 - self.warmup))
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.peak * (self.end + (1 - self.end) * left)


class AdamW(optim.Adam):
    """MLX's Adam with bias correction, and decay on matrices."""

    def __init__(self, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8):
        super().__init__(learning_rate=0.0, betas=list(betas), eps=eps, bias_correction=True)
        self._weight_decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        decayed = _decayed(parameter, self.learning_rate, self._weight_decay)
        return super().apply_single(gradient, decayed, state)


class Adafactor(optim.Adafactor):
    """MLX's Adafactor at the learning rate that it is given, and decay on matrices."""

    def __init__(self, weight_decay: float):
        super().__init__(learning_rate=0.0, relative_step=False, scale_parameter=False)
        self._weight_decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        decayed = _decayed(parameter, self.learning_rate, self._weight_decay)
        return super().apply_single(gradient, decayed, state)


Optimizer = AdamW | Adafactor


def make_optimizer(
    name: str, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
) -> Optimizer:
    """One of `OPTIMIZERS`. Raises InputError for another."""
    if name not in OPTIMIZERS:
        raise InputError(f"no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise InputError(f"weight decay must be at least 0, not {weight_decay}")
    return AdamW(weight_decay, betas, eps) if name == "adamw" else Adafactor(weight_decay)


def global_norm(gradients: Any) -> mx.array:
    """The length of all gradients taken as one vector, a float32 scalar."""
    squares = [grad.astype(mx.float32).square().sum() for _, grad in tree_flatten(gradients)]
    return mx.sqrt(mx.stack(squares).sum())


def clipped(gradients: Any, norm: mx.array, limit: float) -> Any:
    """`gradients` scaled down to the length `limit`, where `norm` is above it."""
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda grad: (grad * scale).astype(grad.dtype), gradients)


def _decayed(parameter: mx.array, rate: mx.array, decay: float) -> mx.array:
    if decay == 0 or parameter.ndim < 2:
        return parameter
    return parameter * (1 - rate * decay).astype(parameter.dtype)
