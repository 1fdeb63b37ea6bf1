"""The throughput of a run, as a share of the machine's own matmul speed. Padding is no work.

An update costs, in forward passes (`elm_mlx.model.roofline` says what one counts):

- all weights: 3, for the backward pass has two products for each one of the forward pass;
- an adapter: 2 through frozen weights, which want no gradient of their own, 3 in attention and in the adapter, whose
  pair of matrices costs `2 * rank * (inputs + outputs)` a token; 1 below the first adapted layer, from where on no
  gradient is needed. DoRA's lengths, once an update, are not counted;
- with gradient checkpointing one more for each layer in the backward pass.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from elm_mlx.data.batches import Batch
from elm_mlx.model import roofline
from elm_mlx.model.roofline import Cost, Shaped
from elm_mlx.store.adapters import Adapter

_TRIALS = 5  # to measure the machine's speed anew


class Meter:
    """Counts what one process's batches cost, against its machine's speed.

    Args:
        model: the config of what is trained, or what a token of an update costs.
        adapter: what is trained; None, or one of kind "full", for all weights.
        grad_checkpoint: whether layers are computed again in the backward pass.
    """

    def __init__(self, model: Shaped | Cost, adapter: Adapter | None = None, grad_checkpoint: bool = False):
        self._cost = model if isinstance(model, Cost) else update_cost(model, adapter, grad_checkpoint)
        self._done = 0
        self._dtype, self._speed = mx.float32, 0.0
        self._trials = _TRIALS

    def measure(self, dtype: mx.Dtype) -> None:
        """Measures how fast products of `dtype` are; takes about a third of a second."""
        self._dtype, self._speed = dtype, max(self._speed, roofline.matmul_speed(dtype))

    def add(self, batch: Batch) -> None:
        """Counts a batch."""
        self._done += self._cost.forward(batch.tokens, seen(batch), int(batch.trained.sum()))

    def share(self, seconds: float) -> float | None:
        """Returns the share of the measured speed that the batches since the last call reached; None without one.

        More than all of it means that others had the machine when it was measured: then it is measured again, a few
        times in a run, and None is said until that helps.
        """
        done, self._done = self._done, 0
        if not self._speed:
            return None
        if done > seconds * self._speed and self._trials:
            self._trials -= 1
            self.measure(self._dtype)
        reached = done / seconds / self._speed
        return reached if reached <= 1 else None


def update_cost(config: Shaped, adapter: Adapter | None, grad_checkpoint: bool) -> Cost:
    """Returns a token's cost in an update, backward pass included."""
    forward, again = Cost.of(config), int(grad_checkpoint)
    if adapter is None or adapter.kind == "full":
        return Cost(
            tuple((3 + again) * flops for flops in forward.linear),
            tuple((3 + again) * flops for flops in forward.attention),
            3 * forward.head,
        )
    own, own_head = _adapters_cost(adapter, config)
    first = next((layer for layer, flops in enumerate(own) if flops), len(own))
    back = [layer >= first for layer in range(len(own))]
    return Cost(
        tuple(
            flops * (2 + again if on else 1) + extra * (3 + again)
            for flops, extra, on in zip(forward.linear, own, back, strict=True)
        ),
        tuple(flops * (3 + again if on else 1) for flops, on in zip(forward.attention, back, strict=True)),
        forward.head * (2 if any(back) else 1) + 3 * own_head,
    )


def _adapters_cost(adapter: Adapter, config: Shaped) -> tuple[list[int], int]:
    """Returns the FLOPs of a forward pass through a layer's pairs of matrices, by layer, and through the head's.

    An embedding's pair is looked up on its one side; its product stands at the first layer.
    """
    shapes, layers, head = config.shapes(), [0] * len(Cost.of(config).linear), 0
    for module, rank in adapter.ranks.items():
        rows, columns = shapes[f"{module}.weight"]
        layer, whole = roofline.layer_of(f"{module}."), 2 * rank * (rows + columns)
        if layer is not None:
            layers[layer] += whole
        elif module.startswith(roofline.HEAD):
            head += whole
        else:
            layers[0] += 2 * rank * columns
            head += whole if adapter.adapted_head else 0
    return layers, head


def seen(batch: Batch) -> int:
    """Sums the positions that a batch's tokens see: those of the same text up to each, padding left out."""
    lengths = batch.lengths().astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())
