"""The optimizers, and the limit on the gradients' norm.

Weight decay falls on matrices alone: what has one dimension (norms' weights, DoRA's magnitudes) scales, and is not to
be pulled to 0.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from elm_mlx.errors import InputError
from elm_mlx.train.settings import OptimizerName

OPTIMIZERS = get_args(OptimizerName)


class AdamW(optim.Adam):
    """MLX's Adam with bias correction, and decay on matrices."""

    def __init__(self, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8):
        super().__init__(learning_rate=0.0, betas=list(betas), eps=eps, bias_correction=True)
        self._weight_decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        decayed = _decayed(parameter, self.learning_rate, self._weight_decay)
        return super().apply_single(gradient, decayed, state)


class Adafactor(optim.Adafactor):
    """MLX's Adafactor with a learning rate from outside, and decay on matrices."""

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
